"""Initial values of tables: uniform within a bound, a pure function of (seed, table, row, column).

Value = (2 x - 1) bound, where x is the upper 24 bits of the splitmix64 generator at position
row * embedding_dim + column of the table's stream, as a fraction.  Every step is exact in float32 but the last product,
so that every device writes the same bits.
"""

import hashlib

import torch
from torch import Tensor

from embeddings.config import TableConfig
from embeddings.rows.initial_kernel import FACTORS, WEYL, launch_fill

CHUNK_VALUES = 1 << 17
"""Values that a CPU makes at a time: their bits stay in its cache."""


def fill(block: Tensor, table: TableConfig, first_row: int, first_column: int, *, seed: int) -> None:
    """Write the initial values of a block of the table, whose first row and column these are.

    On a GPU one kernel writes all of it.
    """
    key, bound, where = _stream(table, seed), _bound(table), (first_row, first_column)
    if block.is_cuda:
        launch_fill(block, key, table.embedding_dim, where, bound)
    else:
        fill_on_cpu(block, key, table.embedding_dim, where, bound)


def refill(block: Tensor, rows: Tensor, table: TableConfig, first_row: int, first_column: int, *, seed: int) -> None:
    """Write the initial values of some rows of a block; `rows` int64 count from the block's first."""
    column = torch.arange(first_column, first_column + block.shape[1], device=block.device)
    for some in torch.split(rows, max(1, CHUNK_VALUES // table.embedding_dim)):
        values = _values(some + first_row, column, _stream(table, seed), table.embedding_dim, _bound(table))
        block.index_copy_(0, some, values.to(block.dtype))


def fill_on_cpu(block: Tensor, key: int, embedding_dim: int, where: tuple[int, int], bound: float) -> None:
    """The definition, in plain PyTorch, chunk by chunk; `where` is the block's first row and column."""
    first_row, first_column = where
    chunk_rows = max(1, CHUNK_VALUES // embedding_dim)
    column = torch.arange(first_column, first_column + block.shape[1], device=block.device)
    for start in range(0, len(block), chunk_rows):
        chunk = block[start : start + chunk_rows]
        row = torch.arange(first_row + start, first_row + start + len(chunk), device=block.device)
        chunk.copy_(_values(row, column, key, embedding_dim, bound))


def _stream(table: TableConfig, seed: int) -> int:
    digest = hashlib.blake2b(f"{seed}/{table.name}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


def _bound(table: TableConfig) -> float:
    return table.embedding_dim**-0.5 if table.initial_bound is None else table.initial_bound


def _values(row: Tensor, column: Tensor, key: int, embedding_dim: int, bound: float) -> Tensor:
    counter = row[:, None] * embedding_dim + column
    unit = random_bits(counter, key).bitwise_right_shift_(40).bitwise_and_(0xFFFFFF).to(torch.float32)
    return unit.mul_(2.0**-23).sub_(1.0).mul_(bound)


def random_bits(counter: Tensor, key: int) -> Tensor:
    """The splitmix64 generator at positions `counter` of stream `key`, in int64 that wraps; overwrites `counter`."""
    bits = counter.mul_(_signed(WEYL)).add_(key)
    for shift, factor in zip((30, 27), FACTORS, strict=True):
        bits.bitwise_xor_(_logical_right_shift(bits, shift)).mul_(_signed(factor))
    return bits.bitwise_xor_(_logical_right_shift(bits, 31))


def _logical_right_shift(bits: Tensor, shift: int) -> Tensor:
    """Zeros enter at the top; torch's shift of a signed integer repeats the sign bit."""
    return (bits >> shift).bitwise_and_((1 << (64 - shift)) - 1)


def _signed(value: int) -> int:
    return value - (1 << 64) if value >> 63 else value
