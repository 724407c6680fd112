"""norm(attention) * silu(U) in Triton, forward and backward, with dropout and Meta's concatenation.  Validates nothing.

U comes as the product gave it, before SiLU: so it is kept for the backward, which needs SiLU's slope there.

The norm runs over each of G groups of C columns (G = 1: layer norm).  A program handles rows of one group, so that its
sums over rows belong to fixed columns.  The backward needs attention and U only: statistics and the gated product are
computed again on the way.

With concatenation the result is [silu(U), x, norm(attention) * silu(U)]; the programs of group 0 also carry x.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from attention_kernels.launcher import launch
from attention_kernels.layer.layer_norm import normalise
from attention_kernels.rows import cdiv, pad_size, row_blocks, serial_blocks
from attention_kernels.sigmoid import approximate, sigmoid

_BACKWARD_WARPS = 12
_BACKWARD_REGISTERS = 168
"""Registers of a thread: the compiler would take 224, with which 9 warps fit a multiprocessor; with 168 it is 12."""


@triton.jit
def _mix(x):
    """`reference._hash`."""
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15)) * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def _keep_factor(rows, columns, seed, threshold, scale):
    """What dropout multiplies elements with: `scale` or 0, as `reference.keep_mask`."""
    row_hash = _mix(rows.to(tl.uint32) + seed.to(tl.uint32))
    spread = columns.to(tl.uint32) * tl.full([1], 0x9E3779B9, tl.uint32)
    return tl.where(_mix(row_hash[:, None] ^ spread[None, :]) >= threshold.to(tl.uint32), scale, 0.0)


@triton.jit(do_not_specialize=["threshold"])
def _forward_kernel(
    p_attention,
    p_u,
    p_x,
    p_weight,
    p_bias,
    p_out,
    num_rows,
    eps,
    p_seed,
    threshold,
    scale,
    W: tl.constexpr,
    C: tl.constexpr,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    X_COLS: tl.constexpr,
    CONCAT: tl.constexpr,
    DROPOUT: tl.constexpr,
    APPROXIMATE: tl.constexpr,
):
    group = tl.program_id(1)
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    m_row = rows < num_rows
    columns = tl.arange(0, COLS)
    m_column = columns < C
    mask = m_row[:, None] & m_column[None, :]
    Y: tl.constexpr = W + D if CONCAT else 0
    p_rows = p_out + rows[:, None] * (Y + W)
    if DROPOUT:
        seed = tl.load(p_seed)
    xhat, _, _ = normalise(p_attention, rows, columns, mask, W, C, group, eps)
    weight = tl.load(p_weight + group * C + columns, mask=m_column, other=0.0).to(tl.float32)
    bias = tl.load(p_bias + group * C + columns, mask=m_column, other=0.0).to(tl.float32)
    u = tl.load(p_u + rows[:, None] * W + group * C + columns[None, :], mask=mask, other=0.0).to(tl.float32)
    u = u * sigmoid(u, APPROXIMATE)
    y = (xhat * weight[None, :] + bias[None, :]) * u
    if DROPOUT:
        y = y * _keep_factor(rows, Y + group * C + columns, seed, threshold, scale)
    tl.store(p_rows + Y + group * C + columns[None, :], y.to(p_out.dtype.element_ty), mask=mask)
    if CONCAT:
        if DROPOUT:
            u = u * _keep_factor(rows, group * C + columns, seed, threshold, scale)
        tl.store(p_rows + group * C + columns[None, :], u.to(p_out.dtype.element_ty), mask=mask)
        if group == 0:
            x_columns = tl.arange(0, X_COLS)
            m_x = m_row[:, None] & (x_columns < D)[None, :]
            x = tl.load(p_x + rows[:, None] * D + x_columns[None, :], mask=m_x, other=0.0).to(tl.float32)
            if DROPOUT:
                x = x * _keep_factor(rows, W + x_columns, seed, threshold, scale)
            tl.store(p_rows + W + x_columns[None, :], x.to(p_out.dtype.element_ty), mask=m_x)


@triton.jit(do_not_specialize=["threshold"])
def _backward_kernel(
    p_dout,
    p_attention,
    p_u,
    p_x,
    p_weight,
    p_bias,
    p_residual,
    p_dattention,
    p_du,
    p_dx,
    p_gated,
    p_dweight,
    p_dbias,
    p_du_sum,
    du_stride,
    num_rows,
    eps,
    p_seed,
    threshold,
    scale,
    W: tl.constexpr,
    C: tl.constexpr,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    X_COLS: tl.constexpr,
    CONCAT: tl.constexpr,
    DROPOUT: tl.constexpr,
    APPROXIMATE: tl.constexpr,
    PROGRAMS: tl.constexpr,
):
    group = tl.program_id(1)
    columns = tl.arange(0, COLS)
    m_column = columns < C
    Y: tl.constexpr = W + D if CONCAT else 0
    weight = tl.load(p_weight + group * C + columns, mask=m_column, other=0.0).to(tl.float32)
    bias = tl.load(p_bias + group * C + columns, mask=m_column, other=0.0).to(tl.float32)
    dweight = tl.zeros([ROWS, COLS], tl.float32)
    dbias = tl.zeros([ROWS, COLS], tl.float32)
    du_sum = tl.zeros([ROWS, COLS], tl.float32)
    if DROPOUT:
        seed = tl.load(p_seed)
    # A while loop: with numpy 2.4, Triton's interpreter cannot use its tensors as bounds of a range.
    first = tl.program_id(0) * ROWS
    while first < num_rows:
        rows = first + tl.arange(0, ROWS).to(tl.int64)
        m_row = rows < num_rows
        mask = m_row[:, None] & m_column[None, :]
        o_wide = rows[:, None] * (Y + W)
        xhat, _, rstd = normalise(p_attention, rows, columns, mask, W, C, group, eps)
        normed = xhat * weight[None, :] + bias[None, :]
        raw = tl.load(p_u + rows[:, None] * W + group * C + columns[None, :], mask=mask, other=0.0).to(tl.float32)
        gate = sigmoid(raw, APPROXIMATE)
        u = raw * gate
        dy = tl.load(p_dout + o_wide + Y + group * C + columns[None, :], mask=mask, other=0.0).to(tl.float32)
        gated = normed * u
        if DROPOUT:
            factor = _keep_factor(rows, Y + group * C + columns, seed, threshold, scale)
            dy, gated = dy * factor, gated * factor
        tl.store(p_gated + o_wide + Y + group * C + columns[None, :], gated.to(p_gated.dtype.element_ty), mask=mask)
        du = dy * normed
        dnormed = dy * u
        if CONCAT:
            du_direct = tl.load(p_dout + o_wide + group * C + columns[None, :], mask=mask, other=0.0).to(tl.float32)
            if DROPOUT:
                factor = _keep_factor(rows, group * C + columns, seed, threshold, scale)
                du_direct, u = du_direct * factor, u * factor
            du += du_direct
            tl.store(p_gated + o_wide + group * C + columns[None, :], u.to(p_gated.dtype.element_ty), mask=mask)
            if group == 0:
                x_columns = tl.arange(0, X_COLS)
                m_x = m_row[:, None] & (x_columns < D)[None, :]
                o_x = rows[:, None] * D + x_columns[None, :]
                x = tl.load(p_x + o_x, mask=m_x, other=0.0).to(tl.float32)
                dx = tl.load(p_dout + o_wide + W + x_columns[None, :], mask=m_x, other=0.0).to(tl.float32)
                if DROPOUT:
                    x_factor = _keep_factor(rows, W + x_columns, seed, threshold, scale)
                    dx, x = dx * x_factor, x * x_factor
                dx += tl.load(p_residual + o_x, mask=m_x, other=0.0).to(tl.float32)
                tl.store(p_dx + o_x, dx.to(p_dx.dtype.element_ty), mask=m_x)
                tl.store(p_gated + o_wide + W + x_columns[None, :], x.to(p_gated.dtype.element_ty), mask=m_x)
        du = du * gate * (1.0 + raw * (1.0 - gate))
        du_sum += du
        tl.store(
            p_du + rows[:, None] * du_stride + group * C + columns[None, :], du.to(p_du.dtype.element_ty), mask=mask
        )
        dweight += dnormed * xhat
        dbias += dnormed
        dxhat = dnormed * weight[None, :]
        mean_d = tl.sum(dxhat, axis=1) / C
        mean_dx = tl.sum(dxhat * xhat, axis=1) / C
        dattention = (dxhat - mean_d[:, None] - xhat * mean_dx[:, None]) * rstd[:, None]
        o_attention = rows[:, None] * W + group * C + columns[None, :]
        tl.store(p_dattention + o_attention, dattention.to(p_dattention.dtype.element_ty), mask=mask)
        first += PROGRAMS * ROWS
    o_partial = tl.program_id(0) * W + group * C + columns
    tl.store(p_dweight + o_partial, tl.sum(dweight, axis=0), mask=m_column)
    tl.store(p_dbias + o_partial, tl.sum(dbias, axis=0), mask=m_column)
    tl.store(p_du_sum + o_partial, tl.sum(du_sum, axis=0), mask=m_column)


def _sizes(attention_TW: Tensor, x_TD: Tensor | None, num_groups: int, dropout: float) -> dict[str, int | bool]:
    """Compile-time sizes that both kernels share."""
    width = attention_TW.shape[1]
    x_width = x_TD.shape[1] if x_TD is not None else 0
    return {
        "W": width,
        "C": width // num_groups,
        "D": x_width,
        "X_COLS": pad_size(x_width),
        "CONCAT": x_TD is not None,
        "DROPOUT": dropout > 0,
        "APPROXIMATE": approximate(attention_TW),
    }


def _new_result(attention_TW: Tensor, x_TD: Tensor | None) -> Tensor:
    rows, width = attention_TW.shape
    out_width = width if x_TD is None else 2 * width + x_TD.shape[1]
    return torch.empty(rows, out_width, dtype=attention_TW.dtype, device=attention_TW.device)


def forward(
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
) -> Tensor:
    """`reference.gated_norm` of contiguous inputs.  A program for a block of rows and a group."""
    num_rows = attention_TW.shape[0]
    rows, columns, warps = row_blocks(attention_TW.shape[1] // num_groups)
    out = _new_result(attention_TW, x_TD)
    if num_rows:
        launch(
            _forward_kernel,
            (cdiv(num_rows, rows), num_groups),
            attention_TW,
            u_TW,
            attention_TW if x_TD is None else x_TD,
            weight,
            bias,
            out,
            num_rows,
            eps,
            seed,
            int(dropout * 2**32),
            1 / (1 - dropout),
            **_sizes(attention_TW, x_TD, num_groups, dropout),
            ROWS=rows,
            COLS=columns,
            num_warps=warps,
        )
    return out


def backward(
    dout: Tensor,
    attention_TW: Tensor,
    u_TW: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    *,
    num_groups: int,
    x_TD: Tensor | None,
    residual_TD: Tensor,
    dropout: float,
    seed: Tensor | None,
    du: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of `forward`, and its result once more for the output product's weights.

    `du` [T, W], possibly a slice of a wider buffer, is overwritten.  Returns (dattention, residual, gated, dweight,
    dbias, sum of du over rows): `residual_TD` plus the gradient of the concatenated x (itself without concatenation),
    the last three in float32.  A fixed number of programs a group walks over the rows.
    """
    num_rows = attention_TW.shape[0]
    dattention = torch.empty_like(attention_TW)
    gated = _new_result(attention_TW, x_TD)
    residual = residual_TD if x_TD is None else torch.empty_like(x_TD)
    programs, rows, columns, warps = serial_blocks(attention_TW.shape[1] // num_groups, dout.device, _BACKWARD_WARPS)
    sums = torch.empty(3, programs, attention_TW.shape[1], dtype=torch.float32, device=dout.device)
    launch(
        _backward_kernel,
        (programs, num_groups),
        dout,
        attention_TW,
        u_TW,
        attention_TW if x_TD is None else x_TD,
        weight,
        bias,
        residual_TD,
        dattention,
        du,
        residual,
        gated,
        *sums,
        du.stride(0),
        num_rows,
        eps,
        seed,
        int(dropout * 2**32),
        1 / (1 - dropout),
        **_sizes(attention_TW, x_TD, num_groups, dropout),
        ROWS=rows,
        COLS=columns,
        PROGRAMS=programs,
        num_warps=warps,
        maxnreg=_BACKWARD_REGISTERS,
    )
    dweight, dbias, du_sum = sums.sum(1)
    return dattention, residual, gated, dweight, dbias, du_sum
