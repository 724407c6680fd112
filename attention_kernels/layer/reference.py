"""The pieces of an HSTU layer around its products and attention, in plain PyTorch: what the fused kernels compute.

Every function is written with ordinary differentiable operations, so that autograd gives the gradients that the kernels
are tested against.  float64 is computed in float64, everything else in float32; results have the input's type.

Legend: T packed positions, D model width, W gate width (heads x value size), G groups of a norm.
"""

import torch
from torch import Tensor


def layer_norm(x_TD: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """(x - mean) / sqrt(variance + eps) * weight + bias, a row at a time."""
    return group_norm(x_TD, weight, bias, eps, num_groups=1)


def group_norm(x_TD: Tensor, weight: Tensor, bias: Tensor, eps: float, *, num_groups: int) -> Tensor:
    """`layer_norm` over each of `num_groups` equal parts of a row; weight and bias are [D]."""
    kind = _accumulate_dtype(x_TD)
    x_TGC = x_TD.to(kind).reshape(x_TD.shape[0], num_groups, x_TD.shape[1] // num_groups)
    centred = x_TGC - x_TGC.mean(dim=2, keepdim=True)
    normed = centred * torch.rsqrt(centred.square().mean(dim=2, keepdim=True) + eps)
    return (normed.reshape(x_TD.shape) * weight.to(kind) + bias.to(kind)).to(x_TD.dtype)


def silu(x: Tensor) -> Tensor:
    """x * sigmoid(x)."""
    wide = x.to(_accumulate_dtype(x))
    return (wide * torch.sigmoid(wide)).to(x.dtype)


def silu_slope(x: Tensor) -> Tensor:
    """The derivative of `silu`."""
    wide = x.to(_accumulate_dtype(x))
    sigmoid = torch.sigmoid(wide)
    return (sigmoid * (1 + wide * (1 - sigmoid))).to(x.dtype)


def gated_norm(
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
) -> Tensor:
    """norm(attention) * g with g = silu(u), [T, W]; with `x_TD` the concatenation [g, x, norm(attention) * g],
    [T, 2 W + D].

    With `dropout` each element is zeroed where `keep_mask` says so, and the others are scaled up.
    """
    kind = _accumulate_dtype(attention_TW)
    normed = group_norm(attention_TW.to(kind), weight, bias, eps, num_groups=num_groups)
    gate = silu(u_TW.to(kind))
    gated = normed * gate
    if x_TD is not None:
        gated = torch.cat([gate, x_TD.to(kind), gated], dim=1)
    if dropout > 0:
        assert seed is not None
        gated = gated * keep_mask(gated.shape, dropout, seed, gated.device) / (1 - dropout)
    return gated.to(attention_TW.dtype)


def keep_mask(shape: torch.Size, dropout: float, seed: Tensor, device: torch.device) -> Tensor:
    """Which elements dropout keeps: a hash of seed [1] int64, row and column, so that a backward can draw it again."""
    rows = torch.arange(shape[0], device=device)[:, None]
    columns = torch.arange(shape[1], device=device)[None, :]
    return _hash(_hash(rows + seed) ^ _low_bits(columns * 0x9E3779B9)) >= int(dropout * 2**32)


def _hash(x: Tensor) -> Tensor:
    """A 32-bit mixing function (lowbias32 of hash-prospector) on int64 values."""
    x = _low_bits(x)
    x = _low_bits((x ^ (x >> 16)) * 0x7FEB352D)
    x = _low_bits((x ^ (x >> 15)) * 0x846CA68B)
    return x ^ (x >> 16)


def _low_bits(x: Tensor) -> Tensor:
    return x & 0xFFFFFFFF


def _accumulate_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32
