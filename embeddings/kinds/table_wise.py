"""A table whole on one rank, which does all ranks' lookups in it."""

from collections.abc import Sequence

from embeddings.config import TableConfig
from embeddings.kinds.kind import (
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
from embeddings.machine import Machine

FULL_COLUMNS = 128
"""FBGEMM's kernel gives a row of so many columns to a warp; narrower rows leave threads idle."""


class TableWise(ShardingKind):
    """A small or rarely used table on one rank saves the others work."""

    name = "table_wise"
    everywhere = False

    def cuts(self, table: TableConfig, machine: Machine) -> list[tuple[Blocks, ...]]:
        """One way: the whole table."""
        return [(Blocks(1, table.num_embeddings, table.embedding_dim),)]

    def shards(self, table: TableConfig, machine: Machine, ranks: Sequence[int]) -> tuple[Shard, ...]:
        """All rows and columns on the one rank."""
        return tuple(Shard(rank, range(table.num_embeddings), range(table.embedding_dim)) for rank in ranks)

    def cost(self, work: Work, block: Blocks) -> ShardCost:
        """Ids of all ranks come to this one, rows go back."""
        return gathered_cost(work, block)


def gathered_cost(work: Work, block: Blocks) -> ShardCost:
    """The cost of a block in which one rank looks up the ids of all.

    What every rank does with its own distinct ids is counted there too, as if it did not wait for the others.
    """
    ids, columns = work.exchanged_ids * work.machine.world_size, block.num_columns
    vectors = work.vectors * work.machine.world_size
    exchanged = vectors * columns * work.exchange.value_bytes
    penalty = 1.0 if columns >= FULL_COLUMNS else 1.15 if columns >= FULL_COLUMNS // 2 else 1.75
    ms = lookup_ms(work, ids, vectors, columns, penalty=penalty, least_columns=32)
    ms += exchanged / work.link_bytes_per_ms
    ms += written_out_ms(work, columns)
    io_bytes = buffer_bytes(work, ids, vectors, columns) + written_out_bytes(work, columns)
    return stored(work, block, io_bytes, ms)
