"""A pooled table's columns cut over nodes, the rows of each block of columns over the ranks of its node."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import product

from embeddings.config import TableConfig
from embeddings.kinds.column_wise import column_blocks, columns_refusal
from embeddings.kinds.kind import Blocks, Shard, Work
from embeddings.kinds.row_wise import row_blocks
from embeddings.kinds.table_row_wise import TableRowWise
from embeddings.machine import Machine


class GridShard(TableRowWise):
    """Wide heavy pooled tables that one node cannot hold or serve: each node with a block of columns does with it what
    table_row_wise does with a table."""

    name = "grid_shard"
    of_one_rank = "column_wise"

    def refusal(self, work: Work) -> str | None:
        """Whatever keeps rows from a node, or columns from being cut over nodes."""
        return super().refusal(work) or columns_refusal(work, work.machine.num_nodes)

    def cuts(self, table: TableConfig, machine: Machine) -> list[tuple[Blocks, ...]]:
        """As the columns can be cut, for as many nodes as there are; node after node the blocks of its rows."""
        (rows,) = super().cuts(table, machine)
        return [
            tuple(replace(blocks, num_columns=table.embedding_dim // count) for blocks in rows) * count
            for count in column_blocks(table, machine.num_nodes)
        ]

    def shards(self, table: TableConfig, machine: Machine, ranks: Sequence[int]) -> tuple[Shard, ...]:
        """Block i on the i-th of the ranks."""
        rows = row_blocks(table.num_embeddings, machine.local_world_size)
        width = table.embedding_dim * len(rows) // len(ranks)
        columns = [range(first, first + width) for first in range(0, table.embedding_dim, width)]
        return tuple(Shard(rank, r, c) for rank, (c, r) in zip(ranks, product(columns, rows), strict=True))
