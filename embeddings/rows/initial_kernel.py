"""Initial values of tables on a GPU: one kernel that only writes, at the speed of memory."""

import triton
import triton.language as tl
from torch import Tensor

WEYL = 0x9E3779B97F4A7C15
"""Step of splitmix64 from one position to the next."""
FACTORS = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
"""Factors of splitmix64's two mixing products."""
_BLOCK = 2048
"""Values that one program computes."""


@triton.jit
def _fill_kernel(
    p_block,
    num_values,
    row_stride,
    first_row,
    first_column,
    key,
    bound,
    COLUMNS: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    WEYL: tl.constexpr,
    FACTOR_1: tl.constexpr,
    FACTOR_2: tl.constexpr,
):
    places = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    rows, columns = places // COLUMNS, places % COLUMNS
    bits = ((rows + first_row) * DIM + (columns + first_column)).to(tl.uint64)
    bits = bits * WEYL + key.to(tl.uint64)
    bits = (bits ^ (bits >> 30)) * FACTOR_1
    bits = (bits ^ (bits >> 27)) * FACTOR_2
    bits = bits ^ (bits >> 31)
    unit = (bits >> 40).to(tl.int32).to(tl.float32)
    values = (unit * (2.0**-23) - 1.0) * bound
    tl.store(p_block + rows * row_stride + columns, values.to(p_block.dtype.element_ty), mask=places < num_values)


def launch_fill(block: Tensor, key: int, embedding_dim: int, where: tuple[int, int], bound: float) -> None:
    """`embeddings.rows.initial.fill_on_cpu` for a block [rows, columns] on a GPU; its rows may lie apart."""
    if not block.numel():
        return
    _fill_kernel[(triton.cdiv(block.numel(), _BLOCK),)](
        block,
        block.numel(),
        block.stride(0),
        *where,
        key,
        bound,
        COLUMNS=block.shape[1],
        DIM=embedding_dim,
        BLOCK=_BLOCK,
        WEYL=WEYL,
        FACTOR_1=FACTORS[0],
        FACTOR_2=FACTORS[1],
    )
