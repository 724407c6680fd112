"""A table's columns cut into equal blocks, each on a rank of its own."""

from collections.abc import Sequence

from embeddings.config import TableConfig
from embeddings.kinds.kind import ID_BYTES, Blocks, Shard, ShardCost, ShardingKind, Work
from embeddings.kinds.table_wise import gathered_cost
from embeddings.machine import Machine

MIN_COLUMNS = 32
"""The fewest columns of a block.  With fewer most of a warp would be idle."""
BLOCK_COUNTS = (2, 4, 8)
"""The numbers of blocks that a table's columns may be cut into."""


class ColumnWise(ShardingKind):
    """A wide table that one rank cannot hold or serve; each block's rank does all ranks' lookups in its columns."""

    name = "column_wise"
    everywhere = False

    def refusal(self, work: Work) -> str | None:
        """Whatever keeps columns from being cut, on as many ranks."""
        return columns_refusal(work, work.machine.world_size)

    def cuts(self, table: TableConfig, machine: Machine) -> list[tuple[Blocks, ...]]:
        """One cut for each number of column blocks that divides the table and gives each block a rank of its own."""
        counts = column_blocks(table, machine.world_size)
        return [(Blocks(count, table.num_embeddings, table.embedding_dim // count),) for count in counts]

    def shards(self, table: TableConfig, machine: Machine, ranks: Sequence[int]) -> tuple[Shard, ...]:
        """Block i on the i-th of the ranks."""
        columns = table.embedding_dim // len(ranks)
        return tuple(
            Shard(rank, range(table.num_embeddings), range(index * columns, (index + 1) * columns))
            for index, rank in enumerate(ranks)
        )

    def cost(self, work: Work, block: Blocks) -> ShardCost:
        """The cost of a table of so many columns on one rank."""
        return gathered_cost(work, block)

    def sent_bytes(self, work: Work, num_blocks: int) -> float:
        """Every block's rank gets all ids."""
        return work.exchanged_ids * num_blocks * ID_BYTES + work.vectors * work.exchanged_row_bytes


def columns_refusal(work: Work, places: int) -> str | None:
    """Why a table's columns cannot be cut into a block for each of some of so many places: row-wise Adagrad averages
    over a row, and there must be two wide enough blocks."""
    if work.optimizer == "rowwise_adagrad":
        return (
            "row-wise Adagrad's number of a row averages over all its columns, and a block of columns would keep "
            "one of its own: take the optimizer adagrad or sgd for it"
        )
    if work.optimizer == "adam":
        return "Adam has not been held against an unsharded table so: take the optimizer adagrad or sgd for it"
    if work.kernel != "fused":
        return f"the kernel {work.kernel} is planned for whole rows only: take fused"
    if not column_blocks(work.table, places):
        return f"two blocks of at least {MIN_COLUMNS} columns need {2 * MIN_COLUMNS} columns and two ranks"
    return None


def column_blocks(table: TableConfig, places: int) -> list[int]:
    """The numbers of blocks that a table's columns may be cut into, one block for each of some of so many places.

    FBGEMM reads four columns at a time.
    """
    columns = table.embedding_dim
    return [n for n in BLOCK_COUNTS if n <= places and columns % (4 * n) == 0 and columns // n >= MIN_COLUMNS]
