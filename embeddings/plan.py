"""What a sharding plan says: where every row of every table lives, what that costs, and what else was considered.

Plain values only; `planner` makes a plan, `plan_file` stores it, `sharding` hands it to TorchRec, `report` explains it.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from embeddings.config import VALUE_BYTES, ComputeKernel, RowType, ShardingType, TableConfig
from embeddings.machine import Machine

GIB = 2**30
MAX_COMPARED_TABLES = 128
"""Up to so many tables, a plan holds its time with each alternative for one table and all others in place."""


@dataclass(frozen=True, kw_only=True, slots=True)
class BatchLoad:
    """The lookups of one step, from which times and buffers are estimated."""

    samples_per_rank: int = 64
    """Samples that a rank reads a step."""
    ids_per_sample: dict[str, float] = field(default_factory=dict)
    """Mean number of ids a sample, by feature; a feature that is not named has one."""

    def __post_init__(self) -> None:
        if self.samples_per_rank < 1:
            raise ValueError(f"samples_per_rank must be at least 1, got {self.samples_per_rank}")
        for feature, ids in self.ids_per_sample.items():
            if ids <= 0:
                raise ValueError(f"ids_per_sample of feature {feature!r} must be above 0, got {ids}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Reservation:
    """Bytes a rank that the tables may not use."""

    fraction_bytes: int
    """The part of all memory that `placement.reserved_fraction` keeps."""
    dense_bytes: int
    """The dense model's parameters, gradients, their communication buckets and Adam's moments."""
    activation_bytes: int
    """`placement.activation_gib`."""

    @property
    def total_bytes(self) -> int:
        """Their sum."""
        return self.fraction_bytes + self.dense_bytes + self.activation_bytes


@dataclass(frozen=True, slots=True)
class Shard:
    """A block of a table's rows on one rank; a row is never cut."""

    rank: int
    """Where it lives."""
    first_row: int
    """First global row."""
    num_rows: int
    """Rows; may be 0 where a table has fewer rows than there are ranks."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Candidate:
    """One way to place a table, with everything else as in the plan."""

    sharding_type: ShardingType
    """How it is cut."""
    kernel: ComputeKernel
    """Where its rows are."""
    table_ms: float
    """Estimated time of this table on the rank it loads most, a step."""
    table_bytes: int
    """Memory of this table, buffers included, on that rank."""
    plan_ms: float | None
    """Estimated time of all tables on the busiest rank, a step; null if they do not fit, or with more tables than
    `MAX_COMPARED_TABLES`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TablePlacement:
    """Where one table lives."""

    num_embeddings: int
    """Rows of the whole table."""
    embedding_dim: int
    """Columns."""
    dtype: RowType
    """Type of the rows."""
    optimizer: str
    """Kind of the optimizer, which decides the size of its state."""
    sharding_type: ShardingType
    """How it is cut."""
    kernel: ComputeKernel
    """Where its rows are."""
    shards: tuple[Shard, ...]
    """Every row exactly once, in order."""
    candidates: tuple[Candidate, ...] = ()
    """What was considered, the choice first; empty in a plan written by hand."""

    @property
    def row_bytes(self) -> int:
        """Bytes of a row."""
        return self.embedding_dim * VALUE_BYTES[self.dtype]

    @property
    def weight_bytes(self) -> int:
        """Bytes of all rows."""
        return self.num_embeddings * self.row_bytes


@dataclass(frozen=True, kw_only=True, slots=True)
class RankEstimate:
    """What one rank holds and does."""

    weight_bytes: int
    """Rows of tables in device memory (a cpu's own memory); of cached tables, the cache."""
    optimizer_bytes: int
    """Their optimizer state."""
    io_bytes: int
    """Buffers of input dist and output dist."""
    host_bytes: int
    """Rows and optimizer state of the fused_uvm kernels, in host memory."""
    step_ms: float
    """Estimated time of lookups, updates and their communication, a step."""

    @property
    def memory_bytes(self) -> int:
        """Device memory in use by tables."""
        return self.weight_bytes + self.optimizer_bytes + self.io_bytes


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """A placement of every table, and its estimates."""

    machine: Machine
    """What it was made for."""
    load: BatchLoad
    """The lookups it was made for."""
    reservation: Reservation
    """Memory a rank kept from the tables."""
    tables: dict[str, TablePlacement]
    """By table name."""
    ranks: tuple[RankEstimate, ...]
    """By rank."""

    @property
    def lookup_groups(self) -> int:
        """Widths, sharding types and kernels in use together; each costs `machine.lookup_group_ms`."""
        return len({(table.embedding_dim, table.sharding_type, table.kernel) for table in self.tables.values()})

    @property
    def step_ms(self) -> float:
        """Estimated time of all tables on the busiest rank, a step."""
        return max(rank.step_ms for rank in self.ranks) + self.lookup_groups * self.machine.lookup_group_ms

    @property
    def available_bytes(self) -> int:
        """Memory a rank that tables may use."""
        return int(self.machine.memory_gib * GIB) - self.reservation.total_bytes


def row_blocks(num_embeddings: int, num_blocks: int) -> list[tuple[int, int]]:
    """(first row, rows) of each row-wise block: TorchRec's input dist fixes them to ceil(rows / blocks) rows each.

    >>> row_blocks(10, 4)
    [(0, 3), (3, 3), (6, 3), (9, 1)]
    >>> row_blocks(2, 4)
    [(0, 1), (1, 1), (2, 0), (2, 0)]
    """
    block = -(-num_embeddings // num_blocks)
    starts = [min(index * block, num_embeddings) for index in range(num_blocks)]
    return [(start, min(block, num_embeddings - start)) for start in starts]


def shards_of(table: TableConfig, sharding_type: ShardingType, ranks: Sequence[int]) -> tuple[Shard, ...]:
    """The shards of `table`: whole on `ranks[0]`, or in row blocks over all of `ranks`."""
    if sharding_type == "table_wise":
        return (Shard(ranks[0], 0, table.num_embeddings),)
    blocks = row_blocks(table.num_embeddings, len(ranks))
    return tuple(Shard(rank, first, rows) for rank, (first, rows) in zip(ranks, blocks, strict=True))


def size_text(num_bytes: int) -> str:
    """Bytes in the largest binary unit up to GiB of which there is at least one.

    >>> size_text(0), size_text(1536), size_text(15 * 2**30)
    ('0', '1.50 KiB', '15.00 GiB')
    """
    for power, unit in ((30, "GiB"), (20, "MiB"), (10, "KiB")):
        if abs(num_bytes) >= 2**power:
            return f"{num_bytes / 2**power:.2f} {unit}"
    return f"{num_bytes} B" if num_bytes else "0"
