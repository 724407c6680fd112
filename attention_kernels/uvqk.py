"""SiLU on the fused U, V, Q, K product, in Triton.  Validates nothing.

`forward` splits U off into a tensor of its own, because U is kept for the backward and the rest is not.  `backward`
turns gradients of the activated columns into gradients of the product in place, and sums them for the bias.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from attention_kernels.rows import serial_blocks

_COLUMNS = 512
_ROWS = 8


@triton.jit
def _sigmoid(x):
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def _forward_kernel(
    p_raw,
    p_u,
    p_rest,
    num_rows,
    raw_stride,
    rest_stride,
    U_WIDTH: tl.constexpr,
    ACTIVE: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = tl.program_id(1) * COLS + tl.arange(0, COLS)
    mask = (rows < num_rows)[:, None] & (columns < WIDTH)[None, :]
    x = tl.load(p_raw + rows[:, None] * raw_stride + columns[None, :], mask=mask, other=0.0).to(tl.float32)
    x = tl.where((columns < ACTIVE)[None, :], x * _sigmoid(x), x).to(p_rest.dtype.element_ty)
    is_u = (columns < U_WIDTH)[None, :]
    tl.store(p_u + rows[:, None] * U_WIDTH + columns[None, :], x, mask=mask & is_u)
    tl.store(p_rest + rows[:, None] * rest_stride + columns[None, :] - U_WIDTH, x, mask=mask & ~is_u)


@triton.jit
def _backward_kernel(
    p_gradient,
    p_raw,
    p_dbias,
    num_rows,
    raw_stride,
    ACTIVE: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    PROGRAMS: tl.constexpr,
):
    columns = tl.program_id(1) * COLS + tl.arange(0, COLS)
    m_column = columns < WIDTH
    m_active = columns < ACTIVE
    dbias = tl.zeros([ROWS, COLS], tl.float32)
    # A while loop: with numpy 2.4, Triton's interpreter cannot use its tensors as bounds of a range.
    first = tl.program_id(0) * ROWS
    while first < num_rows:
        rows = first + tl.arange(0, ROWS).to(tl.int64)
        mask = (rows < num_rows)[:, None] & m_column[None, :]
        addresses = rows[:, None] * WIDTH + columns[None, :]
        gradient = tl.load(p_gradient + addresses, mask=mask, other=0.0).to(tl.float32)
        # Columns without SiLU are only summed.
        active = mask & m_active[None, :]
        raw = tl.load(p_raw + rows[:, None] * raw_stride + columns[None, :], mask=active, other=0.0).to(tl.float32)
        sigmoid = _sigmoid(raw)
        slope = tl.where(m_active[None, :], sigmoid * (1.0 + raw * (1.0 - sigmoid)), 1.0)
        gradient = gradient * slope
        tl.store(p_gradient + addresses, gradient.to(p_gradient.dtype.element_ty), mask=active)
        dbias += gradient
        first += PROGRAMS * ROWS
    tl.store(p_dbias + tl.program_id(0) * WIDTH + columns, tl.sum(dbias, axis=0), mask=m_column)


def forward(raw: Tensor, u_width: int, active: int, *, out: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """U, [T, u_width], and the columns behind it, SiLU applied to the first `active` of all columns.

    The columns behind U are written into `out` [T, width - u_width], which may be those columns of `raw` itself (a
    program reads what it overwrites before it does); None makes a new tensor.
    """
    num_rows, width = raw.shape
    u = torch.empty(num_rows, u_width, dtype=raw.dtype, device=raw.device)
    rest = torch.empty(num_rows, width - u_width, dtype=raw.dtype, device=raw.device) if out is None else out
    if num_rows:
        _forward_kernel[(triton.cdiv(num_rows, _ROWS), triton.cdiv(width, _COLUMNS))](
            raw,
            u,
            rest,
            num_rows,
            raw.stride(0),
            rest.stride(0),
            U_WIDTH=u_width,
            ACTIVE=active,
            WIDTH=width,
            ROWS=_ROWS,
            COLS=_COLUMNS,
        )
    return u, rest


def backward_(gradient: Tensor, raw: Tensor, active: int) -> Tensor:
    """Multiply `gradient` [T, width], contiguous, by SiLU's slope at `raw` in its first `active` columns, in place.

    `raw` needs only these columns.  Returns the sum over rows of the result, [width] float32.
    """
    num_rows, width = gradient.shape
    columns = min(_COLUMNS, max(16, triton.next_power_of_2(width)))
    programs, rows, columns, warps = serial_blocks(columns, gradient.device)
    dbias = torch.empty(programs, width, dtype=torch.float32, device=gradient.device)
    _backward_kernel[(programs, triton.cdiv(width, columns))](
        gradient,
        raw,
        dbias,
        num_rows,
        raw.stride(0),
        ACTIVE=active,
        WIDTH=width,
        ROWS=rows,
        COLS=columns,
        PROGRAMS=programs,
        num_warps=warps,
    )
    return dbias.sum(0)
