"""A table's columns cut into equal blocks, each on a rank of its own."""

from collections.abc import Sequence

from embeddings.config import TableConfig
from embeddings.kinds.kind import ID_BYTES, Blocks, Shard, ShardCost, ShardingKind, Work
from embeddings.kinds.table_wise import gathered_cost
from embeddings.machine import Machine

MIN_COLUMNS = 32
"""The fewest columns of a block.  With fewer most of a warp would be idle."""
MAX_BLOCKS = 8
"""The most blocks that a table is cut into."""


class ColumnWise(ShardingKind):
    """A wide table that one rank cannot hold or serve; each block's rank does all ranks' lookups in its columns."""

    name = "column_wise"
    in_words = "equal blocks of columns, each on a rank of its own"
    everywhere = False

    def refusal(self, work: Work) -> str | None:
        """Row-wise Adagrad averages over a row; a table without two wide enough blocks cannot be cut."""
        if work.optimizer == "rowwise_adagrad":
            return (
                "row-wise Adagrad's number of a row averages over all its columns, and a block of columns would keep "
                "one of its own: take the optimizer adagrad or sgd for it"
            )
        if work.optimizer == "adam":
            return "Adam has not been held against an unsharded table so: take the optimizer adagrad or sgd for it"
        if work.kernel != "fused":
            return f"the kernel {work.kernel} is planned for whole rows only: take fused"
        if not self.cuts(work.table, work.machine):
            return f"two blocks of at least {MIN_COLUMNS} columns need {2 * MIN_COLUMNS} columns and two ranks"
        return None

    def cuts(self, table: TableConfig, machine: Machine) -> list[tuple[Blocks, ...]]:
        """2, 4 and 8 blocks, as far as the columns go."""
        cuts: list[tuple[Blocks, ...]] = []
        count = 2
        while count <= min(MAX_BLOCKS, machine.world_size) and table.embedding_dim % (4 * count) == 0:
            columns = table.embedding_dim // count
            if columns < MIN_COLUMNS:
                break
            cuts.append((Blocks(count, table.num_embeddings, columns),))
            count *= 2
        return cuts

    def shards(self, table: TableConfig, ranks: Sequence[int]) -> tuple[Shard, ...]:
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
