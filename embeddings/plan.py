"""What a sharding plan says: where every row of every table lives, what that costs, and what else was considered.

Plain values only; `planning` makes plans, stores and explains them, `sharding` applies one.
"""

from dataclasses import dataclass

from embeddings.config import VALUE_BYTES, ComputeKernel, ExchangeConfig, RowType, TableConfig
from embeddings.kinds.kind import Shard
from embeddings.kinds.registry import KINDS
from embeddings.machine import Machine
from embeddings.planning.options import Group, cached_groups
from embeddings.planning.problem import BatchLoad, Reservation, available_bytes

MAX_COMPARED_TABLES = 128
"""Up to so many tables, a plan holds its time with each alternative for one table and all others in place."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Candidate:
    """One way to place a table, with everything else as in the plan."""

    sharding_type: str
    """How the table is cut."""
    kernel: ComputeKernel
    """Which memory holds its rows."""
    num_blocks: int
    """Blocks that it is cut into; with a sharding type that has one on every rank, the number of ranks."""
    table_ms: float
    """Estimated time of this table on the rank it loads most, a step."""
    table_bytes: int
    """Memory of this table, buffers included, on that rank."""
    plan_ms: float | None
    """Estimated time of all tables on the busiest rank, a step; null if they do not fit, or with more tables than
    `MAX_COMPARED_TABLES`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TablePlacement:
    """Where one table lives, and what it costs there."""

    num_embeddings: int
    """Rows of the whole table."""
    embedding_dim: int
    """Columns of the whole table."""
    dtype: RowType
    """Type of the rows."""
    optimizer: str
    """Kind of the optimizer, which decides the size of its state."""
    sharding_type: str
    """How it is cut: a kind of `embeddings/kinds`."""
    kernel: ComputeKernel
    """Which memory holds its rows."""
    pooled: str | None = None
    """What its rows are summed into, as the table says."""
    ranks: tuple[int, ...] = ()
    """The rank of each block, of a sharding type that leaves a choice; empty where every rank has its own."""
    candidates: tuple[Candidate, ...] = ()
    """What was considered, the choice first; empty in a plan written by hand."""

    def config(self, name: str) -> TableConfig:
        """Rows and columns, as the table of this name has them.

        Raises:
            ValueError: no table can have them.
        """
        return TableConfig(
            name=name,
            num_embeddings=self.num_embeddings,
            embedding_dim=self.embedding_dim,
            features=(name,),
            dtype=self.dtype,
        )

    @property
    def weight_bytes(self) -> int:
        """Bytes of all rows, once."""
        return self.num_embeddings * self.row_bytes

    @property
    def row_bytes(self) -> int:
        """Bytes of a row."""
        return self.embedding_dim * VALUE_BYTES[self.dtype]


@dataclass(frozen=True, kw_only=True, slots=True)
class RankEstimate:
    """What one rank holds and does."""

    weight_bytes: int
    """Rows of tables in device memory (a cpu's own memory); of cached tables, the cache."""
    optimizer_bytes: int
    """Optimizer state of these rows."""
    io_bytes: int
    """Buffers of ids, rows and gradients."""
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
    """The machine that the plan was made for."""
    load: BatchLoad
    """The lookups it was made for."""
    reservation: Reservation
    """Memory a rank kept from the tables."""
    exchange: ExchangeConfig
    """What ranks send each other."""
    cached_part: float
    """Part of the rows of cached tables that the device caches."""
    sent_bytes: int
    """Ids, rows and gradients of sharded tables that a rank sends a step, of the ranks' mean, its own part included."""
    tables: dict[str, TablePlacement]
    """The placement of each table, by its name."""
    ranks: tuple[RankEstimate, ...]
    """What each rank gets, in the order of ranks."""

    @property
    def available_bytes(self) -> int:
        """Memory a rank that tables may use."""
        return available_bytes(self.machine, self.reservation)

    @property
    def lookup_groups(self) -> set[Group]:
        """What is looked up together; each costs a fixed time."""
        return {
            (table.embedding_dim, table.pooled, table.sharding_type, table.kernel) for table in self.tables.values()
        }

    @property
    def fixed_ms(self) -> float:
        """Fixed time of the lookups and of each lookup group, a step."""
        groups = self.lookup_groups
        return self.machine.effective_rates.fixed_ms(len(groups), cached_groups(groups))

    @property
    def step_ms(self) -> float:
        """Estimated time of all tables on the busiest rank, a step."""
        return max(rank.step_ms for rank in self.ranks) + self.fixed_ms

    def shards(self, name: str) -> tuple[Shard, ...]:
        """Where each part of a table lies."""
        table = self.tables[name]
        kind, config = KINDS[table.sharding_type], table.config(name)
        return kind.shards(config, self.machine, range(self.machine.world_size) if kind.everywhere else table.ranks)


def size_text(num_bytes: int) -> str:
    """Bytes in the largest binary unit up to GiB of which there is at least one.

    >>> size_text(0), size_text(1536), size_text(15 * 2**30)
    ('0', '1.50 KiB', '15.00 GiB')
    """
    for power, unit in ((30, "GiB"), (20, "MiB"), (10, "KiB")):
        if abs(num_bytes) >= 2**power:
            return f"{num_bytes / 2**power:.2f} {unit}"
    return f"{num_bytes} B" if num_bytes else "0"
