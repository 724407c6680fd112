"""The HSTU layer against a float64 implementation written here, and its memory switches."""

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from attention_kernels import SemiLocalMask, make_plan
from attention_kernels.layer import operations
from attention_kernels.reference import dense_mask
from trainer.models import layer_function
from trainer.models.hstu import HstuLayer
from trainer.models.layer import LayerBatch, LayerParameters, LayerSpec, plain_layer
from trainer.models.layer_function import fused_layer

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
CPU = torch.device("cpu")
DIM = 24
HISTORY, CANDIDATES, CONTEXT = (9, 0, 17, 1), (2, 0, 3, 4), 2
MASK = SemiLocalMask(local=3, global_rows=4, num_context=CONTEXT)
SPECS = {
    "paper": LayerSpec(num_heads=2, qk_dim=8, value_dim=16, max_len=30),
    "production": LayerSpec(num_heads=2, qk_dim=8, value_dim=16, max_len=30, production=True),
    "scale": LayerSpec(num_heads=2, qk_dim=8, value_dim=16, max_len=30, scale=1.0),
    "group norm": LayerSpec(num_heads=4, qk_dim=16, value_dim=8, max_len=30, group_norm=True),
    "production with group norm": LayerSpec(
        num_heads=2, qk_dim=16, value_dim=8, max_len=30, group_norm=True, production=True
    ),
}


def make(
    spec: LayerSpec, dtype: torch.dtype = torch.float64, device: torch.device = CPU
) -> tuple[Tensor, LayerParameters, LayerBatch]:
    generator = torch.Generator().manual_seed(0)
    lens = torch.tensor([CONTEXT + h + t for h, t in zip(HISTORY, CANDIDATES, strict=True)])
    tokens = int(lens.sum())

    def random(*shape: int) -> Tensor:
        values = torch.randn(shape, generator=generator, dtype=torch.float64)
        # Products keep the size of their input, as after Xavier's initialisation.
        scaled = values / shape[0] ** 0.5 if len(shape) == 2 and shape[0] != tokens else values
        return scaled.to(device, dtype).requires_grad_()

    parameters = LayerParameters(
        input_norm_weight=random(DIM),
        input_norm_bias=random(DIM),
        uvqk_weight=random(DIM, spec.uvqk_width),
        uvqk_bias=random(spec.uvqk_width),
        output_norm_weight=random(spec.gate_width),
        output_norm_bias=random(spec.gate_width),
        output_weight=random(spec.output_inputs(DIM), DIM),
    )
    offsets = torch.nn.functional.pad(lens.cumsum(0), (1, 0))
    number = torch.tensor(CANDIDATES, device=device)
    plan = make_plan(offsets.to(device), MASK, num_targets=number, scale=spec.scale, max_len=spec.max_len)
    batch = LayerBatch(plan=plan)
    return random(tokens, DIM), parameters, batch


def tensors(parameters: LayerParameters) -> list[Tensor]:
    return [getattr(parameters, name) for name in LayerParameters.__dataclass_fields__ if name != "biases"]


def independent_layer(x: Tensor, p: LayerParameters, spec: LayerSpec, batch: LayerBatch) -> Tensor:
    """Equations 1 to 5 with torch's own norms and a dense mask, one user and one head at a time."""
    silu, heads = torch.nn.functional.silu, spec.num_heads
    normed = torch.nn.functional.layer_norm(x, (DIM,), p.input_norm_weight, p.input_norm_bias, spec.norm_eps)
    uvqk = normed @ p.uvqk_weight + p.uvqk_bias
    W, K = spec.gate_width, heads * spec.qk_dim
    u, v, q, k = uvqk[:, :W], uvqk[:, W : 2 * W], uvqk[:, 2 * W : 2 * W + K], uvqk[:, 2 * W + K :]
    u = silu(u)
    if not spec.production:
        v, q, k = silu(v), silu(q), silu(k)
    users = []
    for (start, end), h, t in zip(pairwise(batch.plan.offsets.tolist()), HISTORY, CANDIDATES, strict=True):
        allowed = dense_mask(MASK, h, t)
        rows = []
        for v_head, q_head, k_head in zip(*(part[start:end].chunk(heads, dim=1) for part in (v, q, k)), strict=True):
            scores = silu(q_head @ k_head.T * (spec.scale or spec.qk_dim**-0.5)) / spec.max_len
            rows.append((scores * allowed) @ v_head)
        users.append(torch.cat(rows, dim=1))
    attention = torch.cat(users)
    if spec.group_norm:
        normed = torch.nn.functional.group_norm(
            attention, heads, p.output_norm_weight, p.output_norm_bias, spec.norm_eps
        )
    else:
        normed = torch.nn.functional.layer_norm(
            attention, (W,), p.output_norm_weight, p.output_norm_bias, spec.norm_eps
        )
    gated = normed * u
    if spec.production:
        gated = torch.cat([u, x, gated], dim=1)
    return x + gated @ p.output_weight


def gradients(out: Tensor, x: Tensor, parameters: LayerParameters) -> list[Tensor]:
    dout = torch.linspace(-1, 1, out.numel(), dtype=out.dtype, device=out.device).view(out.shape)
    return list(torch.autograd.grad(out, [x, *tensors(parameters)], dout))


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("function", [plain_layer, fused_layer])
def test_layer_equals_an_independent_float64_implementation(name: str, function: Callable[..., Tensor]) -> None:
    spec = SPECS[name]
    x, parameters, batch = make(spec)
    out = function(x, parameters, spec, batch)
    expected = independent_layer(x, parameters, spec, batch)
    torch.testing.assert_close(out, expected, rtol=1e-9, atol=1e-9)
    found, wanted = gradients(out, x, parameters), gradients(expected, x, parameters)
    for actual, reference in zip(found, wanted, strict=True):
        torch.testing.assert_close(actual, reference, rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize(
    ("name", "backend", "dropout"),
    [
        ("paper", "reference", 0.0),
        ("production", "reference", 0.4),
        ("paper", "triton", 0.4),
        ("production", "triton", 0.0),
    ],
)
def test_rematerialisation_gives_identical_gradients(
    name: str, backend: str, dropout: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(operations, "layer_backend", lambda x: backend)
    x, parameters, batch = make(SPECS[name], torch.float32, DEVICE if backend == "triton" else CPU)
    batch = replace(batch, dropout=dropout, seed=torch.tensor([5], device=x.device))
    results = []
    for normed, uvqk, gated in [(True, True, True), (False, False, False), (True, False, True), (False, True, False)]:
        spec = replace(SPECS[name], recompute_normed=normed, recompute_uvqk=uvqk, recompute_gated=gated)
        out = fused_layer(x, parameters, spec, batch)
        results.append([out, *gradients(out, x, parameters)])
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))


def test_kept_slopes_are_used_up_by_the_backward() -> None:
    """Gradients overwrite them, so a second backward is refused; a layer that rebuilds them allows it."""
    x, parameters, batch = make(SPECS["paper"], torch.float32)
    rebuilt = fused_layer(x, parameters, SPECS["paper"], batch).sum()
    kept = fused_layer(x, parameters, replace(SPECS["paper"], recompute_uvqk=False), batch).sum()
    for loss in (rebuilt, rebuilt, kept):
        loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        kept.backward()


def test_slopes_are_kept_only_for_a_backward(monkeypatch: pytest.MonkeyPatch) -> None:
    x, parameters, batch = make(SPECS["paper"], torch.float32)
    spec = replace(SPECS["paper"], recompute_uvqk=False)
    expected = fused_layer(x, parameters, spec, batch)
    monkeypatch.setattr(layer_function, "_gradient_buffer", lambda *_: pytest.fail("room for gradients"))
    with torch.no_grad():
        assert torch.equal(fused_layer(x, parameters, spec, batch), expected)


@pytest.mark.parametrize("name", SPECS)
def test_fused_kernels_equal_the_plain_layer(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The Triton path in float32, against the plain float64 layer; dropout included."""
    spec = SPECS[name]
    x, parameters, batch = make(spec)
    batch = replace(batch, dropout=0.2, seed=torch.tensor([11], device=x.device))
    expected = plain_layer(x, parameters, spec, batch)
    wanted = [expected, *gradients(expected, x, parameters)]
    monkeypatch.setattr(operations, "layer_backend", lambda x: "triton")
    x, parameters, batch = make(spec, torch.float32, DEVICE)
    batch = replace(batch, dropout=0.2, seed=torch.tensor([11], device=x.device))
    out = fused_layer(x, parameters, spec, batch)
    for actual, reference in zip([out, *gradients(out, x, parameters)], wanted, strict=True):
        scale = float(reference.detach().abs().max())
        torch.testing.assert_close(actual.double().cpu() / scale, reference / scale, rtol=0, atol=1e-4)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_products_begin_as_large_as_stated() -> None:
    spec = LayerSpec(num_heads=2, qk_dim=32, value_dim=32, max_len=30)
    of_xavier, stated = (HstuLayer(dim=64, spec=replace(spec, initial_std=std)) for std in (None, 0.02))
    # Xavier's have a variance of 2 / (64 + 256); a deviation of 16,384 values is known to 2% at four of its own.
    assert of_xavier.uvqk_weight.std().item() == pytest.approx(320**-0.5 * 2**0.5, rel=0.03)
    assert stated.uvqk_weight.std().item() == pytest.approx(0.02, rel=0.03)


@pytest.mark.parametrize("production", [False, True])
def test_bfloat16_is_as_good_as_plain_pytorch(production: bool) -> None:
    """Errors against float64 at most twice those of the plain layer in bfloat16, and the same bits with and without
    rematerialisation; wide enough for every fused kernel."""
    spec = LayerSpec(num_heads=2, qk_dim=64, value_dim=64, max_len=30, production=production)
    exact_x, exact_parameters, batch = make(spec)
    exact = plain_layer(exact_x, exact_parameters, spec, batch)
    wanted = [value.to(DEVICE) for value in (exact, *gradients(exact, exact_x, exact_parameters))]
    x, parameters, batch = make(spec, torch.bfloat16, DEVICE)

    def run(function: Callable[..., Tensor], spec: LayerSpec) -> list[Tensor]:
        out = function(x, parameters, spec, batch)
        return [out, *gradients(out, x, parameters)]

    plain, fused = run(plain_layer, spec), run(fused_layer, spec)
    for found, reference, value in zip(fused, plain, wanted, strict=True):
        scale = value.detach().norm()
        assert (found.double() - value).norm() / scale <= 2 * (reference.double() - value).norm() / scale + 1e-3
    kept = run(fused_layer, replace(spec, recompute_normed=False, recompute_uvqk=False, recompute_gated=False))
    assert all(torch.equal(a, b) for a, b in zip(kept, fused, strict=True))


def saved_bytes(spec: LayerSpec) -> int:
    """Bytes that one layer keeps for its backward, its own parameters not counted."""
    x, parameters, batch = make(spec, torch.float32)
    own = {tensor.data_ptr() for tensor in tensors(parameters)}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if tensor.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        fused_layer(x, parameters, spec, batch)
    return sum(kept.values())


@pytest.mark.parametrize("production", [False, True])
def test_three_tensors_of_a_tokens_width_are_kept(production: bool) -> None:
    """Layer input, U and attention output, and nothing else."""
    spec = LayerSpec(num_heads=2, qk_dim=12, value_dim=12, max_len=30, production=production)
    tokens = sum(HISTORY) + sum(CANDIDATES) + CONTEXT * len(HISTORY)
    assert saved_bytes(spec) == 4 * tokens * 3 * DIM
    everything = replace(spec, recompute_normed=False, recompute_uvqk=False, recompute_gated=False)
    assert saved_bytes(everything) > 2 * saved_bytes(spec)


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_fp8_is_close_to_full_precision_and_keeps_its_gradients(name: str, dropout: float) -> None:
    """E4M3 has three bits of mantissa: a few percent on a product.  The backward is not quantised, its inputs are.

    Gradients of the input are compared token by token: where a head attends to next to nothing, its group's norm
    divides by next to nothing, and that token's gradient is mostly rounding.
    """
    spec = SPECS[name]
    x, parameters, batch = make(spec, torch.float32)
    batch = replace(batch, dropout=dropout, seed=torch.tensor([5], device=x.device))
    exact = fused_layer(x, parameters, spec, batch)
    quantised = fused_layer(x, parameters, replace(spec, fp8=True), batch)
    error = (quantised - exact).norm() / (exact - x).norm()
    assert 0 < error < 0.1
    found, wanted = (gradients(out, x, parameters) for out in (quantised, exact))
    assert float(((found[0] - wanted[0]).norm(dim=1) / wanted[0].norm(dim=1)).median()) < 0.08
    if not spec.group_norm:
        flat = [torch.cat([gradient.flatten() for gradient in parts]) for parts in (found, wanted)]
        assert (flat[0] - flat[1]).norm() / flat[1].norm() < 0.1


def test_fp8_refuses_widths_that_its_products_do_not_take() -> None:
    with pytest.raises(ValueError, match="multiples of 16: dim is 24"):
        HstuLayer(dim=24, spec=replace(SPECS["paper"], fp8=True))
