"""SiLU in Triton: over the columns of a product whose kernel has none of its own, and as a part of other kernels."""

import triton
import triton.language as tl
from torch import Tensor

from attention_kernels.launcher import INTERPRETED, launch
from attention_kernels.rows import cdiv

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
    p_x,
    num_rows,
    stride,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    APPROXIMATE: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = tl.program_id(1) * COLS + tl.arange(0, COLS)
    mask = (rows < num_rows)[:, None] & (columns < WIDTH)[None, :]
    addresses = p_x + rows[:, None] * stride + columns[None, :]
    x = tl.load(addresses, mask=mask, other=0.0).to(tl.float32)
    tl.store(addresses, (x * sigmoid(x, APPROXIMATE)).to(p_x.dtype.element_ty), mask=mask)


def forward_(x: Tensor) -> None:
    """Writes SiLU of `x` [T, width] over it; its rows may lie apart."""
    num_rows, width = x.shape
    if num_rows:
        launch(
            _forward_kernel,
            (cdiv(num_rows, _ROWS), cdiv(width, _COLUMNS)),
            x,
            num_rows,
            x.stride(0),
            WIDTH=width,
            ROWS=_ROWS,
            COLS=_COLUMNS,
            APPROXIMATE=approximate(x),
        )
