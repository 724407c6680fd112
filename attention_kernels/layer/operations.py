"""The pieces of an HSTU layer as functions with their backward, on either backend.

These are for layers that write their own backward: none is differentiable by itself.  "reference" runs
`reference` (and autograd over it for gradients) on any device; "triton" runs the fused kernels, on CUDA tensors
or on CPU tensors in the interpreter.

Legend: T packed positions, D model width, W gate width (heads x value size).
"""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from attention_kernels.launcher import check_device
from attention_kernels.layer import gated_norm as gated_norm_kernels
from attention_kernels.layer import layer_norm as layer_norm_kernels
from attention_kernels.layer import reference, silu

LayerBackend = Literal["triton", "reference"]


def layer_backend(x: Tensor) -> LayerBackend:
    """The backend for tensors like `x`: Triton on a GPU, which must be the current one, the reference elsewhere."""
    check_device(x)
    return "triton" if x.device.type == "cuda" else "reference"


def layer_norm_forward(
    x_TD: Tensor, weight: Tensor, bias: Tensor, eps: float, *, backend: LayerBackend
) -> tuple[Tensor, Tensor, Tensor]:
    """Normed x in its type; mean and 1 / deviation of each row in float32 (float64 for float64)."""
    _check_rows(x_TD.shape, {"x_TD": x_TD}, {"weight": weight, "bias": bias})
    if backend == "triton":
        return layer_norm_kernels.forward(x_TD, weight, bias, eps)
    wide = x_TD.to(torch.promote_types(x_TD.dtype, torch.float32))
    mean = wide.mean(dim=1)
    variance = (wide - mean[:, None]).square().mean(dim=1)
    return reference.layer_norm(x_TD, weight, bias, eps), mean, torch.rsqrt(variance + eps)


def layer_norm_backward(
    dnormed_TD: Tensor,
    x_TD: Tensor,
    weight: Tensor,
    bias: Tensor,
    mean: Tensor,
    rstd: Tensor,
    eps: float,
    *,
    residual_TD: Tensor,
    backend: LayerBackend,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dx + residual_TD in x's type, dweight, dbias)."""
    rows = {"x_TD": x_TD, "dnormed_TD": dnormed_TD, "residual_TD": residual_TD}
    _check_rows(x_TD.shape, rows, {"weight": weight, "bias": bias})
    if backend == "triton":
        return layer_norm_kernels.backward(dnormed_TD, x_TD, weight, mean, rstd, residual_TD)
    with torch.enable_grad():
        inputs = [x.detach().requires_grad_() for x in (x_TD, weight, bias)]
        normed = reference.layer_norm(inputs[0], inputs[1], inputs[2], eps)
        dx, dweight, dbias = torch.autograd.grad(normed, inputs, dnormed_TD)
    return dx + residual_TD, dweight, dbias


def silu_(x: Tensor, *, backend: LayerBackend) -> Tensor:
    """SiLU of `x` [T, width], written over it."""
    _check_columns("x", x, x.shape)
    if backend == "triton":
        silu.forward_(x)
        return x
    return x.copy_(reference.silu(x))


def gated_norm_forward(
    attention_TW: Tensor,
    u_TW: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    *,
    num_groups: int = 1,
    x_TD: Tensor | None = None,
    dropout: float = 0.0,
    seed: Tensor | None = None,
    backend: LayerBackend,
) -> Tensor:
    """`reference.gated_norm`; `seed` is on x's device, and only dropout needs one."""
    _check_gated_norm(attention_TW, u_TW, weight, bias, num_groups, x_TD, dropout, seed)
    function = gated_norm_kernels.forward if backend == "triton" else reference.gated_norm
    return function(attention_TW, u_TW, weight, bias, eps, num_groups=num_groups, x_TD=x_TD, dropout=dropout, seed=seed)


def gated_norm_backward(
    dout: Tensor,
    attention_TW: Tensor,
    u_TW: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    *,
    residual_TD: Tensor,
    du: Tensor,
    num_groups: int = 1,
    x_TD: Tensor | None = None,
    dropout: float = 0.0,
    seed: Tensor | None = None,
    backend: LayerBackend,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of `gated_norm_forward`; `du` [T, W] is overwritten and may be a slice of a wider buffer.

    Returns (dattention, residual_TD plus the gradient of the concatenated x, the forward's result, dweight, dbias, the
    sum of du over rows).
    """
    _check_gated_norm(attention_TW, u_TW, weight, bias, num_groups, x_TD, dropout, seed)
    _check_rows(residual_TD.shape if x_TD is None else x_TD.shape, {"residual_TD": residual_TD}, {})
    width = attention_TW.shape[1] if x_TD is None else 2 * attention_TW.shape[1] + x_TD.shape[1]
    _check_rows((attention_TW.shape[0], width), {"dout": dout}, {})
    _check_columns("du", du, attention_TW.shape)
    if backend == "triton":
        return gated_norm_kernels.backward(
            dout,
            attention_TW,
            u_TW,
            weight,
            bias,
            eps,
            num_groups=num_groups,
            x_TD=x_TD,
            residual_TD=residual_TD,
            dropout=dropout,
            seed=seed,
            du=du,
        )
    with torch.enable_grad():
        inputs = [x.detach().requires_grad_() for x in (attention_TW, u_TW, weight, bias)]
        if x_TD is not None:
            inputs.append(x_TD.detach().requires_grad_())
        gated = reference.gated_norm(
            inputs[0],
            inputs[1],
            inputs[2],
            inputs[3],
            eps,
            num_groups=num_groups,
            x_TD=inputs[4] if x_TD is not None else None,
            dropout=dropout,
            seed=seed,
        )
        gradients = torch.autograd.grad(gated, inputs, dout)
    du.copy_(gradients[1])
    residual = residual_TD if x_TD is None else residual_TD + gradients[4]
    du_sum = gradients[1].sum(0, dtype=torch.promote_types(du.dtype, torch.float32))
    return gradients[0], residual, gated.detach(), gradients[2], gradients[3], du_sum


def _check_gated_norm(
    attention_TW: Tensor,
    u_TW: Tensor,
    weight: Tensor,
    bias: Tensor,
    num_groups: int,
    x_TD: Tensor | None,
    dropout: float,
    seed: Tensor | None,
) -> None:
    rows = {"attention_TW": attention_TW, "u_TW": u_TW}
    _check_rows(attention_TW.shape, rows, {"weight": weight, "bias": bias})
    if x_TD is not None:
        _check_rows((attention_TW.shape[0], x_TD.shape[-1]), {"x_TD": x_TD}, {})
    if attention_TW.shape[1] % num_groups:
        raise ValueError(f"num_groups={num_groups} does not divide the width {attention_TW.shape[1]}")
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout={dropout} must lie in [0, 1)")
    if dropout > 0 and seed is None:
        raise ValueError(f"dropout={dropout} needs a seed, a tensor [1] of int64 beside the rows")
    if seed is not None and seed.device != attention_TW.device:
        raise ValueError(f"seed is on {seed.device}, attention_TW on {attention_TW.device}; put both on one device")


def _check_rows(shape: Sequence[int], rows: dict[str, Tensor], vectors: dict[str, Tensor]) -> None:
    """Rows are contiguous and of one shape [T, width], vectors [width]."""
    for name, x in rows.items():
        if x.dim() != 2 or x.shape != tuple(shape) or not x.is_contiguous():
            raise ValueError(
                f"{name} is {tuple(x.shape)} with strides {x.stride()}, expected contiguous rows {list(shape)}"
            )
    for name, vector in vectors.items():
        if vector.shape != tuple(shape[1:]):
            raise ValueError(
                f"{name} is {tuple(vector.shape)}, expected [{shape[1]}] as the rows of {next(iter(rows))}"
            )


def _check_columns(name: str, x: Tensor, shape: Sequence[int]) -> None:
    """Rows of `shape` that may be a slice of wider ones."""
    if x.dim() != 2 or x.shape != tuple(shape) or (x.shape[1] > 1 and x.stride(1) != 1):
        raise ValueError(
            f"{name} is {tuple(x.shape)} with strides {x.stride()}, expected rows {list(shape)} of stride 1"
        )
