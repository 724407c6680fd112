"""SiLU in Triton over the columns of a product whose kernel has none of its own."""

import triton
import triton.language as tl
from torch import Tensor

from attention_kernels.launcher import launch
from attention_kernels.rows import cdiv
from attention_kernels.sigmoid import approximate, sigmoid

_COLUMNS = 512
_ROWS = 8


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
