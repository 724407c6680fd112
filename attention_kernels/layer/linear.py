"""The two products of an HSTU layer with everything that happens to their results, on either backend.

None is differentiable by itself; the layer's backward uses plain products.  FP8 is for the forward only: E4M3 with one
scale a row of the left operand and one a column of the right one.

Legend: T packed positions, D model width, N columns of a product.
"""

import functools
import logging
from collections.abc import Callable

import torch
from torch import Tensor

from attention_kernels.layer import fp8, hopper_linear, linear_kernel, operations, reference
from attention_kernels.layer.linear_kernel import Epilogue
from attention_kernels.layer.operations import LayerBackend
from attention_kernels.rows import is_hopper

logger = logging.getLogger(__name__)

FP8_MAX = 448.0
"""The largest finite E4M3 number."""
SCALE_FLOOR = 1e-12
"""Scale of a row of zeros."""


def matmul_residual(a: Tensor, b: Tensor, residual: Tensor, *, backend: LayerBackend) -> Tensor:
    """residual + a b.  The Triton kernel adds in the epilogue; `torch.addmm` would first copy the residual.

    float32, and rows that do not start at multiples of 16 bytes, go through `torch.addmm` on either backend.
    """
    if backend == "triton" and _fused("the output product with its residual", a, b, residual):
        out = torch.empty_like(residual)
        _product(a)(a, b, out, Epilogue(residual=residual))
        return out
    return torch.addmm(residual, a, b)


def linear(
    a: Tensor,
    b: Tensor,
    bias: Tensor,
    *,
    scales: tuple[Tensor, Tensor] | None = None,
    dtype: torch.dtype,
    backend: LayerBackend,
) -> Tensor:
    """a b + bias.  `scales` (of rows of a, of columns of b) marks FP8 operands, b then being [N, K]."""
    if scales:
        return matmul_fp8(a, scales[0], b, scales[1], bias=bias, dtype=dtype, backend=backend)
    return torch.addmm(bias.to(dtype), a, b)


def linear_silu(
    a: Tensor,
    b: Tensor,
    bias: Tensor,
    *,
    slopes: Tensor | None = None,
    scales: tuple[Tensor, Tensor] | None = None,
    dtype: torch.dtype,
    backend: LayerBackend,
) -> Tensor:
    """silu(`linear`), and the slope of SiLU there into `slopes` if given.  Both run in the product's epilogue.

    The values are the same bits with and without `slopes`.
    """
    if backend == "triton":
        N = b.shape[0] if scales else b.shape[1]
        out = torch.empty(a.shape[0], N, dtype=dtype, device=a.device)
        if _fused("the product of V, Q and K with SiLU", a, b, slopes, out):
            row_scale, column_scale = scales or (None, None)
            epilogue = Epilogue(silu=True, slopes=slopes, bias=bias, row_scale=row_scale, column_scale=column_scale)
            _product(a)(a, b, out, epilogue)
            return out
        # What follows makes its own: both at once would be the peak of a layer's memory.
        del out
    product = linear(a, b, bias, scales=scales, dtype=dtype, backend=backend)
    if slopes is not None:
        slopes.copy_(reference.silu_slope(product))
    return operations.silu_(product, backend=backend)


def quantise_rows(x: Tensor, *, backend: LayerBackend) -> tuple[Tensor, Tensor]:
    """(x / scale in E4M3, scale [rows] float32) with the largest value of a row on the largest E4M3 number."""
    if backend == "triton":
        return fp8.quantise_rows(x)
    wide = x.float()
    scale = (wide.abs().amax(dim=1) / FP8_MAX).clamp(min=SCALE_FLOOR)
    quantised = (wide / scale[:, None]).clamp(-FP8_MAX, FP8_MAX)
    return quantised.to(fp8.FP8, memory_format=torch.contiguous_format), scale


def quantise_columns(weight: Tensor, *, backend: LayerBackend) -> tuple[Tensor, Tensor]:
    """The weight [K, N] transposed to [N, K] in E4M3, as FP8 tensor cores read it, and its scale a column [N]."""
    if backend == "triton":
        if weight.stride(1) != 1:
            raise ValueError(f"the weight has strides {weight.stride()}, expected rows of stride 1; call contiguous()")
        return fp8.quantise_columns(weight)
    return quantise_rows(weight.t(), backend=backend)


def layer_norm_fp8(
    x_TD: Tensor, weight: Tensor, bias: Tensor, eps: float, *, backend: LayerBackend
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Layer norm and quantisation of its rows: (E4M3 rows, scale, mean, 1 / deviation)."""
    if backend == "triton":
        return fp8.layer_norm(x_TD, weight, bias, eps)
    normed, mean, rstd = operations.layer_norm_forward(x_TD, weight, bias, eps, backend=backend)
    return (*quantise_rows(normed, backend=backend), mean, rstd)


def matmul_fp8(
    a: Tensor,
    row_scale: Tensor,
    b_NK: Tensor,
    column_scale: Tensor,
    *,
    dtype: torch.dtype,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    backend: LayerBackend,
) -> Tensor:
    """a b row_scale column_scale + bias or + residual, in `dtype`.

    A one-dimensional bias goes through `torch._scaled_mm` (CUTLASS), a residual through our kernel's epilogue.
    """
    if backend == "reference" or a.shape[0] == 0:
        product = (a.float() * row_scale[:, None]) @ (b_NK.float() * column_scale[:, None]).t()
        for term in (bias, residual):
            product = product if term is None else product + term.float()
        return product.to(dtype)
    if residual is None:
        return torch._scaled_mm(
            a,
            b_NK.t(),
            scale_a=row_scale[:, None],
            scale_b=column_scale[None, :],
            bias=None if bias is None else bias.to(dtype),
            out_dtype=dtype,
            use_fast_accum=True,
        )
    out = torch.empty_like(residual)
    if not linear_kernel.aligned(a, b_NK, residual):
        raise ValueError(
            f"FP8 operands {list(a.shape)} and {list(b_NK.shape)} with a residual {list(residual.shape)}: rows must "
            "start at multiples of 16 bytes, so widths must be multiples of 16"
        )
    _product(a)(a, b_NK, out, Epilogue(row_scale=row_scale, column_scale=column_scale, residual=residual))
    return out


def gated_norm_fp8(
    attention_TW: Tensor,
    u_TW: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    *,
    num_groups: int,
    x_TD: Tensor | None,
    dropout: float,
    seed: Tensor | None,
    backend: LayerBackend,
) -> tuple[Tensor, Tensor]:
    """`operations.gated_norm_forward` and quantisation of its rows: (E4M3 rows, scale).

    The fused kernel takes the paper's layer; groups, concatenation and dropout quantise in a second pass.
    """
    if backend == "triton" and num_groups == 1 and x_TD is None and dropout == 0:
        return fp8.gated_norm(attention_TW, u_TW, weight, bias, eps)
    if backend == "triton":
        _log_unfused(
            "the gated norm with quantisation", "its kernel takes neither groups nor concatenation nor dropout"
        )
    gated = operations.gated_norm_forward(
        attention_TW,
        u_TW,
        weight,
        bias,
        eps,
        num_groups=num_groups,
        x_TD=x_TD,
        dropout=dropout,
        seed=seed,
        backend=backend,
    )
    return quantise_rows(gated, backend=backend)


def _product(a: Tensor) -> Callable[[Tensor, Tensor, Tensor, Epilogue], None]:
    """The kernel of this GPU whose epilogue does the rest."""
    return hopper_linear.product if is_hopper(a.device) else linear_kernel.product


def _fused(what: str, *operands: Tensor | None) -> bool:
    """Whether the Triton kernel takes the operands (None: there is none); where it does not, the log says why."""
    tensors = [x for x in operands if x is not None]
    if linear_kernel.fits(*tensors):
        return True
    if all(x.numel() for x in tensors):
        is_wide = any(x.element_size() > 2 for x in tensors)
        _log_unfused(what, "float32" if is_wide else "a width whose rows do not start at multiples of 16 bytes")
    return False


# Cached, so that each reason is logged once.
@functools.cache
def _log_unfused(what: str, reason: str) -> None:
    logger.info("%s is not fused: %s", what, reason)
