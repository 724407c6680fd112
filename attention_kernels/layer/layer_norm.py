"""Layer norm in Triton: forward, and a backward that adds the residual's gradient.  Validates nothing.

A program handles rows `i, i + programs, ...`, a few at a time.  Sums over rows (gradients of weight and bias) stay in
registers until the program ends, then one partial row a program is written and PyTorch adds the partials: no atomics,
the same bits every time.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from attention_kernels.launcher import launch
from attention_kernels.rows import cdiv, row_blocks, serial_blocks


@triton.jit
def normalise(p_x, rows, columns, mask, W: tl.constexpr, C: tl.constexpr, group, eps):
    """Columns of one group of C, of rows of W, normalised and 0 outside `mask`; mean and 1 / deviation of each row."""
    x = tl.load(p_x + rows[:, None] * W + group * C + columns[None, :], mask=mask, other=0.0).to(tl.float32)
    mean = tl.sum(x, axis=1) / C
    centred = tl.where(mask, x - mean[:, None], 0.0)
    rstd = tl.rsqrt(tl.sum(centred * centred, axis=1) / C + eps)
    return centred * rstd[:, None], mean, rstd


@triton.jit
def _forward_kernel(
    p_x,
    p_weight,
    p_bias,
    p_normed,
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
    normed = xhat * weight[None, :] + bias[None, :]
    tl.store(p_normed + rows[:, None] * D + columns[None, :], normed.to(p_normed.dtype.element_ty), mask=mask)
    tl.store(p_mean + rows, mean, mask=m_row)
    tl.store(p_rstd + rows, rstd, mask=m_row)


@triton.jit
def _backward_kernel(
    p_dnormed,
    p_x,
    p_weight,
    p_mean,
    p_rstd,
    p_residual,
    p_dx,
    p_dweight,
    p_dbias,
    num_rows,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    PROGRAMS: tl.constexpr,
):
    columns = tl.arange(0, COLS)
    m_column = columns < D
    weight = tl.load(p_weight + columns, mask=m_column, other=0.0).to(tl.float32)
    dweight = tl.zeros([ROWS, COLS], tl.float32)
    dbias = tl.zeros([ROWS, COLS], tl.float32)
    # A while loop: with numpy 2.4, Triton's interpreter cannot use its tensors as bounds of a range.
    first = tl.program_id(0) * ROWS
    while first < num_rows:
        rows = first + tl.arange(0, ROWS).to(tl.int64)
        m_row = rows < num_rows
        mask = m_row[:, None] & m_column[None, :]
        addresses = rows[:, None] * D + columns[None, :]
        x = tl.load(p_x + addresses, mask=mask, other=0.0).to(tl.float32)
        dnormed = tl.load(p_dnormed + addresses, mask=mask, other=0.0).to(tl.float32)
        residual = tl.load(p_residual + addresses, mask=mask, other=0.0).to(tl.float32)
        mean = tl.load(p_mean + rows, mask=m_row, other=0.0)
        rstd = tl.load(p_rstd + rows, mask=m_row, other=0.0)
        xhat = tl.where(mask, (x - mean[:, None]) * rstd[:, None], 0.0)
        dxhat = dnormed * weight[None, :]
        mean_d = tl.sum(dxhat, axis=1) / D
        mean_dx = tl.sum(dxhat * xhat, axis=1) / D
        dx = (dxhat - mean_d[:, None] - xhat * mean_dx[:, None]) * rstd[:, None] + residual
        tl.store(p_dx + addresses, dx.to(p_dx.dtype.element_ty), mask=mask)
        dweight += dnormed * xhat
        dbias += dnormed
        first += PROGRAMS * ROWS
    partial = tl.program_id(0) * D + columns
    tl.store(p_dweight + partial, tl.sum(dweight, axis=0), mask=m_column)
    tl.store(p_dbias + partial, tl.sum(dbias, axis=0), mask=m_column)


def forward(x_TD: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Normed rows in x's type, and mean and 1 / deviation of each row in float32.

    One program for a block of rows that fills its registers; float32 arithmetic.
    """
    num_rows, width = x_TD.shape
    normed = torch.empty_like(x_TD)
    mean, rstd = (torch.empty(num_rows, dtype=torch.float32, device=x_TD.device) for _ in range(2))
    rows, columns, warps = row_blocks(width)
    if num_rows:
        launch(
            _forward_kernel,
            (cdiv(num_rows, rows),),
            x_TD,
            weight,
            bias,
            normed,
            mean,
            rstd,
            eps,
            num_rows,
            D=width,
            ROWS=rows,
            COLS=columns,
            num_warps=warps,
        )
    return normed, mean, rstd


def backward(
    dnormed_TD: Tensor, x_TD: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor, residual_TD: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """dx (with `residual_TD`, the gradient that bypasses the norm, added) in x's type; dweight and dbias in float32.

    A fixed number of programs walks over the rows.
    """
    num_rows, width = x_TD.shape
    dx = torch.empty_like(x_TD)
    programs, rows, columns, warps = serial_blocks(width, x_TD.device)
    sums = torch.empty(2, programs, width, dtype=torch.float32, device=x_TD.device)
    launch(
        _backward_kernel,
        (programs,),
        dnormed_TD,
        x_TD,
        weight,
        mean,
        rstd,
        residual_TD,
        dx,
        *sums,
        num_rows,
        D=width,
        ROWS=rows,
        COLS=columns,
        PROGRAMS=programs,
        num_warps=warps,
    )
    dweight, dbias = sums.sum(1)
    return dx, dweight, dbias
