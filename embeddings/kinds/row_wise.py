"""A table's rows cut over all ranks in equal blocks."""

from collections.abc import Sequence
from dataclasses import replace

from embeddings.config import TableConfig
from embeddings.kinds.kind import (
    FLOAT_BYTES,
    ID_BYTES,
    Blocks,
    Shard,
    ShardCost,
    ShardingKind,
    Work,
    buffer_bytes,
    lookup_ms,
    stored,
    written_out_bytes,
    written_out_ms,
)
from embeddings.kinds.table_wise import gathered_cost
from embeddings.machine import Machine

COPY = 2.455
"""Bytes that a rank moves for each byte of gradients that it sends, as TorchRec measured."""


class RowWise(ShardingKind):
    """Hot tables, whose lookups one rank could not do, and tables that fit no rank."""

    name = "row_wise"
    everywhere = True

    def cuts(self, table: TableConfig, machine: Machine) -> list[tuple[Blocks, ...]]:
        """One way: as many blocks as there are ranks."""
        return [equal_blocks(table, machine.world_size)]

    def shards(self, table: TableConfig, machine: Machine, ranks: Sequence[int]) -> tuple[Shard, ...]:
        """Block i on rank i."""
        blocks = row_blocks(table.num_embeddings, len(ranks))
        return tuple(Shard(rank, rows, range(table.embedding_dim)) for rank, rows in zip(ranks, blocks, strict=True))

    def cost(self, work: Work, block: Blocks) -> ShardCost:
        """A block takes part in the lookups in proportion to its rows: a table of few rows spreads them less.

        Of a pooled table all ranks, even those without a row, send each other parts of every bag's sum.  On one rank it
        is a whole table whose ids and rows TorchRec puts in order, and back, for nothing.
        """
        columns = block.num_columns
        share = block.num_rows * work.machine.world_size / work.table.num_embeddings
        ids = work.exchanged_ids * share
        vectors = ids if work.bags is None else work.bags * work.machine.world_size
        copied_ms = vectors * columns * FLOAT_BYTES * COPY / work.device_bytes_per_ms
        if work.machine.world_size == 1:
            whole = gathered_cost(work, block)
            return replace(whole, ms=whole.ms + copied_ms)
        ms = lookup_ms(work, ids, vectors, columns) + vectors * work.exchanged_row_bytes / work.link_bytes_per_ms
        io_bytes = buffer_bytes(work, ids, vectors, columns) + written_out_bytes(work, columns)
        return stored(work, block, io_bytes, ms + copied_ms + written_out_ms(work, columns))

    def sent_bytes(self, work: Work, num_blocks: int) -> float:
        """Bytes that a rank sends a step; for a pooled table, a part of each bag's sum, whose gradient comes back."""
        parts = 1 if work.bags is None else work.machine.world_size
        return work.exchanged_ids * ID_BYTES + parts * work.vectors * work.exchanged_row_bytes


def equal_blocks(table: TableConfig, num_blocks: int) -> tuple[Blocks, ...]:
    """Full blocks, perhaps a smaller one, and empty ones where a table has fewer rows than there are to be blocks."""
    rows = block_rows(table.num_embeddings, num_blocks)
    full, rest = divmod(table.num_embeddings, rows)
    counts = ((full, rows), (int(rest > 0), rest), (num_blocks - full - int(rest > 0), 0))
    return tuple(Blocks(count, size, table.embedding_dim) for count, size in counts if count)


def block_rows(num_embeddings: int, num_blocks: int) -> int:
    """Rows of a full block, as TorchRec's exchange of ids fixes them."""
    return -(-num_embeddings // num_blocks)


def row_blocks(num_embeddings: int, num_blocks: int) -> list[range]:
    """The rows of each block.

    >>> row_blocks(10, 4)
    [range(0, 3), range(3, 6), range(6, 9), range(9, 10)]
    >>> row_blocks(2, 4)
    [range(0, 1), range(1, 2), range(2, 2), range(2, 2)]
    """
    block = block_rows(num_embeddings, num_blocks)
    starts = [min(index * block, num_embeddings) for index in range(num_blocks)]
    return [range(start, min(start + block, num_embeddings)) for start in starts]
