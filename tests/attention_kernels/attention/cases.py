"""One attention problem with random inputs, and the comparison of a backend with the float64 reference."""

import itertools
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from attention_kernels import (
    AttentionPlan,
    SemiLocalMask,
    attention_backward,
    attention_forward,
    hstu_attention,
    make_plan,
    projection_backward,
    reference,
)

NAMES = ("out", "dq", "dk", "dv", "sum of dq", "sum of dk", "sum of dv")


@dataclass(frozen=True, kw_only=True)
class Case:
    """`histories` are history lengths; a sequence holds context, history and targets; None is an empty sequence."""

    mask: SemiLocalMask
    histories: tuple[int | None, ...]
    targets: tuple[int, ...] | None = None
    heads: int = 1
    key_size: int = 32
    value_size: int = 32
    dtype: torch.dtype = torch.float32
    strided: bool = False
    projection: Literal["linear", "scaled"] | None = None
    """Whose gradients are wanted, if not those of q, k and v: of a projection that gives them, after an elementwise
    function if "scaled"."""

    @property
    def lengths(self) -> list[int]:
        targets = self.targets or (0,) * len(self.histories)
        pairs = zip(self.histories, targets, strict=True)
        return [0 if h is None else self.mask.num_context + h + t for h, t in pairs]


def index_tensors(case: Case, device: str) -> tuple[Tensor, Tensor | None]:
    offsets = torch.tensor([0, *itertools.accumulate(case.lengths)], device=device)
    if case.targets is None:
        return offsets, None
    values = [0 if h is None else t for h, t in zip(case.histories, case.targets, strict=True)]
    return offsets, torch.tensor(values, device=device, dtype=torch.int32)


def plan_of(case: Case, device: str, backend: str) -> AttentionPlan:
    offsets, targets = index_tensors(case, device)
    return make_plan(offsets, case.mask, num_targets=targets, max_len=max([1, *case.lengths]), backend=backend)


def random_inputs(case: Case, device: str, seed: int = 0) -> list[Tensor]:
    """q, k, v, dout; strided: q, k and v are slices of one buffer of poison, as a fused projection gives them."""
    generator = torch.Generator().manual_seed(seed)
    total = sum(case.lengths)
    sizes = (case.key_size, case.key_size, case.value_size, case.value_size)
    tensors = [torch.randn(total, case.heads, size, generator=generator).to(device, case.dtype) for size in sizes]
    if case.strided:
        tensors[:3] = _slices(tensors[:3])
    return tensors


def _slices(tensors: list[Tensor]) -> list[Tensor]:
    """The same values as slices of one buffer that holds NaN before, between and behind them."""
    pad = 8
    width = sum(x.shape[1] * x.shape[2] + pad for x in tensors) + pad
    buffer = torch.full((tensors[0].shape[0], width), torch.nan, dtype=tensors[0].dtype, device=tensors[0].device)
    views, start = [], pad
    for x in tensors:
        view = buffer[:, start : start + x.shape[1] * x.shape[2]].unflatten(1, x.shape[1:])
        view.copy_(x)
        views.append(view)
        start += x.shape[1] * x.shape[2] + pad
    return views


def factors(case: Case, device: str, seed: int = 0) -> list[Tensor]:
    """What multiplies the gradients of a scaled case."""
    generator = torch.Generator().manual_seed(seed + 1)
    shapes = [(sum(case.lengths), case.heads, size) for size in (case.key_size, case.key_size, case.value_size)]
    return [torch.randn(shape, generator=generator).to(device, case.dtype) for shape in shapes]


def through_projection(case: Case, gradients: list[Tensor], device: str, seed: int) -> list[Tensor]:
    """Gradients, and their sums over positions, of the case's projection, computed in the gradients' own dtype."""
    if case.projection == "scaled":
        gradients = [x * f.to(x.dtype) for x, f in zip(gradients, factors(case, device, seed), strict=True)]
    return gradients + [x.sum(0) for x in gradients] if case.projection else gradients


def run(case: Case, device: str, backend: str, seed: int = 0) -> list[Tensor]:
    """Output and gradients; for a strided case the gradients are written into slices of one poisoned buffer."""
    q, k, v, dout = random_inputs(case, device, seed)
    offsets, targets = index_tensors(case, device)
    plan = plan_of(case, device, backend)
    if case.projection:
        out = attention_forward(q, k, v, plan)
        gradients = factors(case, device, seed)
        gradients = _slices(gradients) if case.strided else gradients
        scaled = case.projection == "scaled"
        if not scaled:
            for x in gradients:
                x.fill_(torch.nan)
        sums = projection_backward(dout, q, k, v, plan, scaled=scaled, out=tuple(gradients))
        return [out, *gradients, *sums]
    if case.strided:
        out = attention_forward(q, k, v, plan)
        gradients = tuple(x.fill_(torch.nan) for x in _slices([q, k, v]))
        attention_backward(dout, q, k, v, plan, out=gradients)
        return [out, *gradients]
    inputs = [x.requires_grad_() for x in (q, k, v)]
    out = hstu_attention(*inputs, offsets, case.mask, targets, None, plan.max_len, backend)
    return [out.detach(), *torch.autograd.grad(out, inputs, dout)]


def exact(case: Case, device: str, seed: int = 0) -> list[Tensor]:
    """Output and gradients of the reference in float64."""
    q, k, v, dout = (x.double() for x in random_inputs(case, device, seed))
    plan = plan_of(case, device, "reference")
    out = reference.forward(q, k, v, plan)
    gradients = list(reference.backward(dout, q, k, v, plan))
    return [out, *through_projection(case, gradients, device, seed)]


def plain(case: Case, device: str, seed: int = 0) -> list[Tensor]:
    """Output and gradients of a few lines of PyTorch that compute everything in the case's own dtype."""
    tensors = random_inputs(replace(case, strided=False), device, seed)
    q, k, v = (x.requires_grad_() for x in tensors[:3])
    targets = case.targets or (0,) * len(case.histories)
    rows, start = [], 0
    for h, t, n in zip(case.histories, targets, case.lengths, strict=True):
        if n:
            part = slice(start, start + n)
            mask = reference.dense_mask(case.mask, h or 0, t, device=device)
            score = torch.einsum("qhd,khd->hqk", q[part], k[part]) * case.key_size**-0.5
            weight = torch.nn.functional.silu(score) / max(case.lengths) * mask
            rows.append(torch.einsum("hqk,khd->qhd", weight, v[part]))
        start += n
    out = torch.cat(rows)
    gradients = list(torch.autograd.grad(out, (q, k, v), tensors[3]))
    return [out.detach(), *through_projection(case, gradients, device, seed)]


def errors(actual: list[Tensor], expected: list[Tensor]) -> dict[str, float]:
    """Relative error of each tensor in the Frobenius norm; NaN where NaN appears, inf where zeros are missed."""
    result = {}
    assert len(actual) == len(expected)
    for name, a, b in zip(NAMES, actual, expected, strict=False):
        distance, norm = (a.double() - b).norm().item(), b.norm().item()
        result[name] = distance if distance == 0 else distance / norm if norm else float("inf")
    return result


def check(case: Case, device: str, backend: str = "triton") -> None:
    """Float32: within 1e-5 of float64.  16 bits: at most twice as far from float64 as plain PyTorch in 16 bits."""
    expected = exact(case, device)
    actual = errors(run(case, device, backend), expected)
    if case.dtype == torch.float32:
        limits = dict.fromkeys(NAMES, 1e-5)
    elif sum(case.lengths) == 0:
        limits = dict.fromkeys(NAMES, 0.0)
    else:
        limits = {name: 2 * error for name, error in errors(plain(case, device), expected).items()}
    wrong = {name: (actual[name], limits[name]) for name in actual if not actual[name] <= limits[name]}
    assert not wrong, f"{case}: relative errors and limits {wrong}"
