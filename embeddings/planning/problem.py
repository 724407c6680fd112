"""What a planner is asked: tables, machines, settings and the lookups of a step.  Needs no torch."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from embeddings.config import (
    ComputeKernel,
    ExchangeConfig,
    PlacementConfig,
    SparseOptimizerConfig,
    TableConfig,
    optimizer_of,
)
from embeddings.kinds.kind import Work
from embeddings.machine import Machine
from embeddings.planning.frequencies import Frequencies

GIB = 2**30
SLOT_BYTES = 16
"""Bytes of a row in a map of unbounded ids: a key, a count and a time."""

MOST_IDS = 2**63
"""More ids of a step than can be counted."""


class DoesNotFit(ValueError):
    """The machine cannot hold the tables; the message says in one line what is missing and what would help."""


@dataclass(frozen=True, kw_only=True, slots=True)
class BatchLoad:
    """The lookups of one step, from which times and buffers are estimated."""

    samples_per_rank: int = 64
    """Samples that a rank reads a step."""
    ids_per_sample: Mapping[str, float] = field(default_factory=dict)
    """Mean number of ids a sample, by feature; a feature that is not named has one."""
    bags_per_sample: Mapping[str, float] = field(default_factory=dict)
    """Bags of a sample that the ids of a pooled table's feature are summed in; a feature that is not named has one."""
    distinct: Mapping[str, float] = field(default_factory=dict)
    """Part of a rank's ids of a step that are distinct, by table; of a table that is not named, all."""
    frequencies: Mapping[str, Frequencies] = field(default_factory=dict)
    """How often rows are looked up, by table; of a table that is not named, all alike."""

    def __post_init__(self) -> None:
        if not 1 <= self.samples_per_rank < MOST_IDS:
            raise ValueError(f"samples_per_rank must be at least 1 and less than 2^63, got {self.samples_per_rank}")
        for name in ("ids_per_sample", "bags_per_sample"):
            for feature, count in getattr(self, name).items():
                if not 0 < count * self.samples_per_rank < MOST_IDS:
                    raise ValueError(
                        f"{name} of feature {feature!r} must be above 0 and less than 2^63 a rank, got {count}"
                    )
        for table, part in self.distinct.items():
            if not 0 < part <= 1:
                raise ValueError(f"the distinct part of table {table!r}'s ids must lie in (0, 1], got {part}")

    def hit_rate(self, table: str, rows: int, cached_part: float) -> float:
        """Part of a table's lookups that find their row in a cache of such a part of its rows."""
        known = self.frequencies.get(table)
        return cached_part if known is None else known.hit_rate(cached_part * rows)

    def ids(self, table: TableConfig) -> float:
        """Ids that a rank's samples look up in a table."""
        return self.samples_per_rank * sum(float(self.ids_per_sample.get(feature, 1.0)) for feature in table.features)

    def bags(self, table: TableConfig) -> float | None:
        """Bags that a rank's samples have of a pooled table; None of another."""
        if table.pooled is None:
            return None
        return self.samples_per_rank * sum(float(self.bags_per_sample.get(feature, 1.0)) for feature in table.features)


@dataclass(frozen=True, kw_only=True, slots=True)
class Reservation:
    """Bytes a rank that the tables may not use."""

    fraction: float
    """`placement.reserved_fraction`."""
    fraction_bytes: int
    """The part of all memory that this is."""
    dense_bytes: int
    """The dense model's parameters, gradients, their communication buckets and Adam's moments."""
    activation_bytes: int
    """What the dense model holds in its backward pass, and the pipeline's batches."""
    maps_bytes: int = 0
    """Host memory of the maps of unbounded ids; no memory of a GPU."""

    def __post_init__(self) -> None:
        if not 0 <= self.fraction < 1:
            raise ValueError(f"the fraction of memory that is reserved must lie in [0, 1), got {self.fraction}")
        if min(self.fraction_bytes, self.dense_bytes, self.activation_bytes, self.maps_bytes) < 0:
            raise ValueError(f"bytes that are reserved must be at least 0, got {self}")

    @property
    def total_bytes(self) -> int:
        """The sum of what takes memory of the device, if that is a GPU."""
        return self.fraction_bytes + self.dense_bytes + self.activation_bytes


def reserve(
    machine: Machine,
    placement: PlacementConfig,
    *,
    dense_bytes: int,
    activation_bytes: int = 0,
    tables: Sequence[TableConfig] = (),
) -> Reservation:
    """What the settings, a dense model of so many bytes and the maps of unbounded ids keep from the tables.

    `activation_bytes` are those that were counted from the model; a setting takes their place.
    """
    stated = placement.activation_gib
    return Reservation(
        fraction=placement.reserved_fraction,
        fraction_bytes=_fraction_bytes(machine, placement.reserved_fraction),
        dense_bytes=dense_bytes,
        activation_bytes=activation_bytes if stated is None else int(stated * GIB),
        maps_bytes=_maps_bytes(machine, tables),
    )


def available_bytes(machine: Machine, reservation: Reservation) -> int:
    """Memory a rank that tables may use."""
    maps = reservation.maps_bytes if machine.compute_device == "cpu" else 0
    return int(machine.memory_gib * GIB) - reservation.total_bytes - maps


def _fraction_bytes(machine: Machine, fraction: float) -> int:
    return int(machine.memory_gib * fraction * GIB)


def _maps_bytes(machine: Machine, tables: Sequence[TableConfig]) -> int:
    """A rank's part of each map, as it is and as it was where the trained rows are, with the keys that wait."""
    return sum(
        2 * -(-table.num_embeddings // machine.world_size) * SLOT_BYTES * (1 + (table.unbounded.min_count > 1))
        for table in tables
        if table.unbounded is not None
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class Problem:
    """Everything that a plan depends on."""

    tables: tuple[TableConfig, ...]
    """The tables to be placed."""
    machine: Machine
    """The ranks that they are placed on."""
    placement: PlacementConfig
    """What may be chosen, and the memory to be left alone."""
    optimizer: SparseOptimizerConfig
    """The optimizer of the tables that have none of their own."""
    load: BatchLoad
    """The lookups of a step."""
    reservation: Reservation
    """Memory a rank that the tables may not use."""

    def __post_init__(self) -> None:
        names = [table.name for table in self.tables]
        unknown = sorted(set(self.placement.tables) - set(names))
        if unknown:
            raise ValueError(f"placement.tables names {unknown[0]!r}, which is no table: known are {sorted(names)}")
        if self.reservation.fraction_bytes != _fraction_bytes(self.machine, self.reservation.fraction):
            raise ValueError(
                f"reserves {self.reservation.fraction_bytes} bytes for a fraction of {self.reservation.fraction} of "
                f"{self.machine.memory_gib:g} GiB, which is {_fraction_bytes(self.machine, self.reservation.fraction)}"
            )
        if self.reservation.maps_bytes != _maps_bytes(self.machine, self.tables):
            raise ValueError(
                f"reserves {self.reservation.maps_bytes} bytes of host memory for maps of unbounded ids, which take "
                f"{_maps_bytes(self.machine, self.tables)}"
            )
        for table in self.tables:
            if self.machine.compute_device == "cpu" and self.optimizer_of(table) == "adam":
                raise ValueError(
                    f"table {table.name!r} has the optimizer adam, of which FBGEMM has no CPU kernel: "
                    "take rowwise_adagrad, adagrad or sgd, or train on a GPU"
                )

    def optimizer_of(self, table: TableConfig) -> str:
        """Kind of a table's optimizer."""
        return optimizer_of(table, self.optimizer).kind

    @property
    def available_bytes(self) -> int:
        """Memory a rank that tables may use."""
        return available_bytes(self.machine, self.reservation)

    def work(self, table: TableConfig, kernel: ComputeKernel) -> Work:
        """The lookups of one of the tables in a step, with its rows where `kernel` has them."""
        ids, bags = self.load.ids(table), self.load.bags(table)
        # Pooled tables send all ids, and sums in full.
        exchange = self.placement.exchange if bags is None else ExchangeConfig()
        sent = self.load.distinct.get(table.name, 1.0) if exchange.deduplicate else 1.0
        return Work(
            table=table,
            optimizer=self.optimizer_of(table),
            kernel=kernel,
            machine=self.machine,
            ids=ids,
            exchanged_ids=ids * sent,
            exchange=exchange,
            bags=bags,
            cached_part=self.placement.cached_part,
            hit_rate=self.load.hit_rate(table.name, table.num_embeddings, self.placement.cached_part),
        )

    def on(self, machine: Machine) -> "Problem":
        """The same problem on another machine, with the same part of its memory reserved."""
        reservation = replace(
            self.reservation,
            fraction_bytes=_fraction_bytes(machine, self.reservation.fraction),
            maps_bytes=_maps_bytes(machine, self.tables),
        )
        return replace(self, machine=machine, reservation=reservation)

    def with_placement(self, placement: PlacementConfig) -> "Problem":
        """The same problem under other settings of placement."""
        reservation = reserve(
            self.machine,
            placement,
            dense_bytes=self.reservation.dense_bytes,
            activation_bytes=self.reservation.activation_bytes,
            tables=self.tables,
        )
        return replace(self, placement=placement, reservation=reservation)

    @property
    def host_bytes(self) -> int:
        """Host memory a rank that the fused_uvm kernels may use."""
        if self.machine.compute_device == "cpu":
            return 0
        return int(self.machine.ddr_gib * GIB) - self.reservation.maps_bytes
