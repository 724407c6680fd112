"""Row-wise FP8 (E4M3) in Triton: quantisation by itself, and fused into the two norms of a layer.  Validates nothing.

A row is divided by its largest magnitude over 448, the largest E4M3 number.  Fusing saves a write and two reads of the
16-bit values.  With three reductions along each row, rows lie within a warp.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from attention_kernels.launcher import INTERPRETED, launch
from attention_kernels.layer.layer_norm import normalise
from attention_kernels.rows import cdiv, warp_blocks
from attention_kernels.sigmoid import approximate, sigmoid

FP8 = torch.float8_e4m3fn


@triton.jit
def _store_quantised(values, p_out, p_scale, rows, columns, m_row, mask, D: tl.constexpr):
    scale = tl.maximum(tl.max(tl.abs(values), axis=1) / 448.0, 1e-12)
    # One division a row; the product may differ from a division in the last bit of float32.  No value exceeds 448 by
    # more than that bit, which the conversion rounds off: nothing to clamp.
    quantised = values * (1.0 / scale)[:, None]
    tl.store(p_out + rows[:, None] * D + columns[None, :], quantised.to(p_out.dtype.element_ty), mask=mask)
    tl.store(p_scale + rows, scale, mask=m_row)


@triton.jit
def _rows_kernel(
    p_x, p_out, p_scale, num_rows, row_stride, column_stride, D: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr
):
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, COLS)
    m_row = rows < num_rows
    mask = m_row[:, None] & (columns < D)[None, :]
    addresses = rows[:, None] * row_stride + columns[None, :].to(tl.int64) * column_stride
    x = tl.load(p_x + addresses, mask=mask, other=0.0).to(tl.float32)
    _store_quantised(x, p_out, p_scale, rows, columns, m_row, mask, D)


@triton.jit
def _norm_kernel(
    p_x,
    p_weight,
    p_bias,
    p_out,
    p_scale,
    p_mean,
    p_rstd,
    eps,
    num_rows,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, COLS)
    m_row, m_column = rows < num_rows, columns < D
    mask = m_row[:, None] & m_column[None, :]
    xhat, mean, rstd = normalise(p_x, rows, columns, mask, D, D, 0, eps)
    weight = tl.load(p_weight + columns, mask=m_column, other=0.0).to(tl.float32)
    bias = tl.load(p_bias + columns, mask=m_column, other=0.0).to(tl.float32)
    _store_quantised(xhat * weight[None, :] + bias[None, :], p_out, p_scale, rows, columns, m_row, mask, D)
    tl.store(p_mean + rows, mean, mask=m_row)
    tl.store(p_rstd + rows, rstd, mask=m_row)


@triton.jit
def _gated_norm_kernel(
    p_attention,
    p_u,
    p_weight,
    p_bias,
    p_out,
    p_scale,
    eps,
    num_rows,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    APPROXIMATE: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, COLS)
    m_row, m_column = rows < num_rows, columns < D
    mask = m_row[:, None] & m_column[None, :]
    xhat, _, _ = normalise(p_attention, rows, columns, mask, D, D, 0, eps)
    weight = tl.load(p_weight + columns, mask=m_column, other=0.0).to(tl.float32)
    bias = tl.load(p_bias + columns, mask=m_column, other=0.0).to(tl.float32)
    u = tl.load(p_u + rows[:, None] * D + columns[None, :], mask=mask, other=0.0).to(tl.float32)
    gated = (xhat * weight[None, :] + bias[None, :]) * u * sigmoid(u, APPROXIMATE)
    _store_quantised(gated, p_out, p_scale, rows, columns, m_row, mask, D)


@triton.jit
def _columns_kernel(
    p_weight,
    p_out,
    p_scale,
    row_stride,
    num_columns,
    K: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Twice over the weight, the second time from the cache: once for the scales, once to turn it round."""
    columns = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    m_column = columns < num_columns
    inner = tl.arange(0, BLOCK_K)
    largest = tl.zeros([BLOCK_K, BLOCK_N], tl.float32)
    for first in range(0, K, BLOCK_K):
        k = first + inner
        mask = (k < K)[:, None] & m_column[None, :]
        x = tl.load(p_weight + k[:, None] * row_stride + columns[None, :], mask=mask, other=0.0).to(tl.float32)
        largest = tl.maximum(largest, tl.abs(x))
    scale = tl.maximum(tl.max(largest, axis=0) / 448.0, 1e-12)
    tl.store(p_scale + columns, scale, mask=m_column)
    inverse = 1.0 / scale
    for first in range(0, K, BLOCK_K):
        k = first + inner
        mask = (k < K)[:, None] & m_column[None, :]
        x = tl.load(p_weight + k[:, None] * row_stride + columns[None, :], mask=mask, other=0.0).to(tl.float32)
        turned = tl.trans(x * inverse[None, :])
        tl.store(
            p_out + columns[:, None].to(tl.int64) * K + k[None, :],
            turned.to(p_out.dtype.element_ty),
            mask=m_column[:, None] & (k < K)[None, :],
        )


def _outputs(x: Tensor) -> tuple[Tensor, Tensor, tuple[int], dict[str, int]]:
    """E4M3 rows and their scales, the grid (a program for a block of rows), and the sizes of a block."""
    num_rows, width = x.shape
    rows, columns, warps = warp_blocks(width)
    out = torch.empty(num_rows, width, dtype=FP8, device=x.device)
    scale = torch.empty(num_rows, dtype=torch.float32, device=x.device)
    return out, scale, (cdiv(num_rows, rows),), {"D": width, "ROWS": rows, "COLS": columns, "num_warps": warps}


def quantise_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """(E4M3 rows, scale) of x [rows, D] with any strides."""
    out, scale, grid, sizes = _outputs(x)
    if x.shape[0]:
        launch(_rows_kernel, grid, x, out, scale, x.shape[0], x.stride(0), x.stride(1), **sizes)
    return out, scale


def layer_norm(x_TD: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(E4M3 rows, scale, mean, 1 / deviation) of contiguous rows."""
    out, scale, grid, sizes = _outputs(x_TD)
    mean, rstd = torch.empty_like(scale), torch.empty_like(scale)
    if x_TD.shape[0]:
        launch(_norm_kernel, grid, x_TD, weight, bias, out, scale, mean, rstd, eps, x_TD.shape[0], **sizes)
    return out, scale, mean, rstd


def gated_norm(attention_TW: Tensor, u_TW: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(E4M3 rows, scale) of norm(attention) * silu(u), one group, contiguous inputs."""
    out, scale, grid, sizes = _outputs(attention_TW)
    if attention_TW.shape[0]:
        launch(
            _gated_norm_kernel,
            grid,
            attention_TW,
            u_TW,
            weight,
            bias,
            out,
            scale,
            eps,
            attention_TW.shape[0],
            APPROXIMATE=approximate(u_TW),
            **sizes,
        )
    return out, scale


def quantise_columns(weight: Tensor) -> tuple[Tensor, Tensor]:
    """(the weight [K, N] turned round to [N, K] in E4M3, scale of each of its columns).

    Read along its rows: as rows of the transposed weight, each element would cost a memory transaction of its own.
    """
    inner, num_columns = weight.shape
    out = torch.empty(num_columns, inner, dtype=FP8, device=weight.device)
    scale = torch.empty(num_columns, dtype=torch.float32, device=weight.device)
    block = 16 if INTERPRETED else 32
    launch(
        _columns_kernel,
        (cdiv(num_columns, block),),
        weight,
        out,
        scale,
        weight.stride(0),
        num_columns,
        K=inner,
        BLOCK_K=128,
        BLOCK_N=block,
        num_warps=8,
    )
    return out, scale
