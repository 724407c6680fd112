"""SiLU in Triton: by itself over the columns of a product, its slope in place, and as a part of other kernels.

`forward` serves products whose kernel has no SiLU of its own.  `backward_` turns gradients of activated columns into
gradients of the product in place, and sums them for the bias.  Validates nothing.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from attention_kernels.launcher import INTERPRETED, launch
from attention_kernels.rows import cdiv, power_of_two, serial_blocks

_COLUMNS = 512
_ROWS = 8


def approximate(x: Tensor) -> bool:
    """Whether kernels on tensors like `x` take the hardware's tanh (about 11 bits): 16-bit values on a GPU."""
    return x.element_size() == 2 and not INTERPRETED


@triton.jit
def sigmoid(x, APPROXIMATE: tl.constexpr):
    """1 / (1 + exp(-x)) = 1/2 + tanh(x / 2) / 2: one special-function instruction instead of two."""
    if APPROXIMATE:
        t = tl.inline_asm_elementwise(
            "tanh.approx.f32 $0, $1;", "=f,f", [0.5 * x], dtype=tl.float32, is_pure=True, pack=1
        )
        return 0.5 + 0.5 * t
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def _forward_kernel(
    p_raw,
    p_out,
    num_rows,
    raw_stride,
    out_stride,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    APPROXIMATE: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = tl.program_id(1) * COLS + tl.arange(0, COLS)
    mask = (rows < num_rows)[:, None] & (columns < WIDTH)[None, :]
    x = tl.load(p_raw + rows[:, None] * raw_stride + columns[None, :], mask=mask, other=0.0).to(tl.float32)
    activated = (x * sigmoid(x, APPROXIMATE)).to(p_out.dtype.element_ty)
    tl.store(p_out + rows[:, None] * out_stride + columns[None, :], activated, mask=mask)


@triton.jit
def _backward_kernel(
    p_gradient,
    p_raw,
    p_sum,
    num_rows,
    gradient_stride,
    raw_stride,
    ACTIVE: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    PROGRAMS: tl.constexpr,
    APPROXIMATE: tl.constexpr,
):
    columns = tl.program_id(1) * COLS + tl.arange(0, COLS)
    m_column = columns < WIDTH
    total = tl.zeros([ROWS, COLS], tl.float32)
    # A while loop: with numpy 2.4, Triton's interpreter cannot use its tensors as bounds of a range.
    first = tl.program_id(0) * ROWS
    while first < num_rows:
        rows = first + tl.arange(0, ROWS).to(tl.int64)
        mask = (rows < num_rows)[:, None] & m_column[None, :]
        addresses = rows[:, None] * gradient_stride + columns[None, :]
        gradient = tl.load(p_gradient + addresses, mask=mask, other=0.0).to(tl.float32)
        if ACTIVE:
            raw = tl.load(p_raw + rows[:, None] * raw_stride + columns[None, :], mask=mask, other=0.0).to(tl.float32)
            s = sigmoid(raw, APPROXIMATE)
            gradient = gradient * s * (1.0 + raw * (1.0 - s))
            tl.store(p_gradient + addresses, gradient.to(p_gradient.dtype.element_ty), mask=mask)
        total += gradient
        first += PROGRAMS * ROWS
    tl.store(p_sum + tl.program_id(0) * WIDTH + columns, tl.sum(total, axis=0), mask=m_column)


def forward(raw: Tensor, out: Tensor) -> None:
    """Write SiLU of `raw` [T, width] into `out`, which may be `raw` itself; rows of either may lie apart."""
    num_rows, width = raw.shape
    if num_rows:
        launch(
            _forward_kernel,
            (cdiv(num_rows, _ROWS), cdiv(width, _COLUMNS)),
            raw,
            out,
            num_rows,
            raw.stride(0),
            out.stride(0),
            WIDTH=width,
            ROWS=_ROWS,
            COLS=_COLUMNS,
            APPROXIMATE=approximate(raw),
        )


def backward_(gradient: Tensor, raw: Tensor | None) -> Tensor:
    """Multiply `gradient` [T, width] by SiLU's slope at `raw`, in place; without `raw` leave it as it is.

    Rows of either may lie apart.  Returns the sum over rows of the result, [width] float32.
    """
    num_rows, width = gradient.shape
    columns = min(_COLUMNS, max(16, power_of_two(width)))
    blocks = cdiv(width, columns)
    programs, rows, columns, warps = serial_blocks(columns, gradient.device)
    # As many programs over all columns as fill the device, no matter how many blocks of columns there are.
    programs = cdiv(programs, blocks)
    sums = torch.empty(programs, width, dtype=torch.float32, device=gradient.device)
    launch(
        _backward_kernel,
        (programs, blocks),
        gradient,
        gradient if raw is None else raw,
        sums,
        num_rows,
        gradient.stride(0),
        0 if raw is None else raw.stride(0),
        ACTIVE=raw is not None,
        WIDTH=width,
        ROWS=rows,
        COLS=columns,
        PROGRAMS=programs,
        APPROXIMATE=approximate(gradient),
        num_warps=warps,
    )
    return sums.sum(0)
