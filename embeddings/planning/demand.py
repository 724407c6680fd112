"""What capacity planning is asked to place: tables, lookups and the dense model, from a file.

    {"tables": [{"name": "item", "num_embeddings": 1000000000, "embedding_dim": 128, "ids_per_sample": 4096.0,
                 "zipf": 1.05},
                {"name": "tag", "num_embeddings": 100000, "embedding_dim": 32, "ids_per_sample": 40960.0,
                 "pooled": "event", "bags_per_sample": 4096.0},
                {"name": "city", "num_embeddings": 10000, "embedding_dim": 16, "dtype": "float16",
                 "optimizer": {"kind": "sgd", "learning_rate": 0.1}}],
     "samples_per_rank": 32, "dense_gib": 1.5, "activation_gib": 20.0, "dense_ms": 40.0,
     "compute_kernels": ["fused", "fused_uvm_caching"], "cached_part": 0.2, "reserved_fraction": 0.15}

All but `tables` may be left out.  `zipf` is the exponent of the law by which a table's rows are looked up (all alike
without it), on which it depends what a cache on the device answers.  `dense_gib` is the dense model's memory for
parameters, gradients and Adam; `dense_ms` its time a step, as a run measured it, which is added to the tables' time.
Where no run did, `dense_tflop` states instead what a rank computes a step, forward and backward, and `dense_mfu` which
part of a GPU's bfloat16 peak that reaches: 0.3 is usual.
"""

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from embeddings.config import (
    CACHED_PART,
    ComputeKernel,
    PlacementConfig,
    RowType,
    SparseOptimizerConfig,
    TableConfig,
    UnboundedConfig,
)
from embeddings.hardware import LEAST, MOST, NodeType, read_object
from embeddings.planning.frequencies import zipf
from embeddings.planning.problem import GIB, BatchLoad
from embeddings.records import from_dict


@dataclass(frozen=True, kw_only=True, slots=True)
class Demand:
    """What is to be trained."""

    tables: tuple[TableConfig, ...]
    """What is to be placed."""
    load: BatchLoad
    """The lookups of a step, the same a rank on any cluster."""
    placement: PlacementConfig
    """What the planner may choose."""
    optimizer: SparseOptimizerConfig
    """The optimizer of the tables that have none of their own."""
    dense_bytes: int
    """Memory a rank for the dense model."""
    dense_ms: float
    """Measured time of the dense model a step; 0 where `dense_tflop` tells it."""
    dense_tflop: float
    """What a rank computes for it a step, in 10^12 operations."""
    dense_mfu: float
    """Part of the peak at which it does."""

    def dense_ms_on(self, name: str, node: NodeType) -> float:
        """The dense model's time a step on a type of node.

        Raises:
            ValueError: the type does not say what its GPUs compute.
        """
        if not self.dense_tflop:
            return self.dense_ms
        if node.bf16_tflops is None:
            raise ValueError(f"{name} needs bf16_tflops, a GPU's peak, for dense_tflop: add it, or state dense_ms")
        return self.dense_tflop / (node.bf16_tflops * self.dense_mfu) * 1000


@dataclass(frozen=True, kw_only=True, slots=True)
class StatedTable:
    """A table and its lookups, as the file states them."""

    name: str
    num_embeddings: int
    embedding_dim: int
    features: tuple[str, ...] | None = None
    ids_per_sample: float | None = None
    bags_per_sample: float | None = None
    zipf: float | None = None
    dtype: RowType = "float32"
    optimizer: SparseOptimizerConfig | None = None
    frozen: bool = False
    unbounded: UnboundedConfig | None = None
    pooled: str | None = None

    @property
    def feature_names(self) -> tuple[str, ...]:
        return (self.name,) if self.features is None else self.features

    def config(self) -> TableConfig:
        return TableConfig(
            name=self.name,
            num_embeddings=self.num_embeddings,
            embedding_dim=self.embedding_dim,
            features=self.feature_names,
            dtype=self.dtype,
            optimizer=self.optimizer,
            frozen=self.frozen,
            unbounded=self.unbounded,
            pooled=self.pooled,
        )

    def a_feature(self, number: float | None) -> dict[str, float]:
        """`number` divided evenly among the features; one for each if it is not stated."""
        return dict.fromkeys(self.feature_names, 1.0 if number is None else number / len(self.feature_names))


@dataclass(frozen=True, kw_only=True, slots=True)
class DemandFile:
    """The file."""

    tables: tuple[StatedTable, ...]
    samples_per_rank: int = 64
    dense_gib: float = 0.0
    activation_gib: float = 0.0
    dense_ms: float = 0.0
    dense_tflop: float = 0.0
    dense_mfu: float = 0.0
    compute_kernels: tuple[ComputeKernel, ...] = ("fused",)
    cached_part: float = CACHED_PART
    reserved_fraction: float = PlacementConfig().reserved_fraction
    optimizer: SparseOptimizerConfig = field(default_factory=SparseOptimizerConfig)

    def __post_init__(self) -> None:
        if not self.tables:
            raise ValueError("there must be at least one table")
        twice = [name for name, times in Counter(table.name for table in self.tables).items() if times > 1]
        if twice:
            raise ValueError(f"there are two tables {twice[0]!r}: names must be unique")
        looked_up = Counter(feature for table in self.tables for feature in table.feature_names)
        shared = [feature for feature, times in looked_up.items() if times > 1]
        if shared:
            raise ValueError(f"feature {shared[0]!r} is looked up twice: give each table features of its own")
        bags = [table.name for table in self.tables if table.pooled is None and table.bags_per_sample is not None]
        if bags:
            raise ValueError(f"bags_per_sample of table {bags[0]!r} has no effect, as it is not pooled: remove it")
        for name in ("dense_gib", "dense_ms", "dense_tflop"):
            if not 0 <= getattr(self, name) <= MOST:
                raise ValueError(f"{name} must be at least 0 and at most {MOST:g}, got {getattr(self, name)}")
        if self.dense_ms and self.dense_tflop:
            raise ValueError("dense_ms and dense_tflop both tell the dense model's time: leave one of them out")
        if bool(self.dense_tflop) != (LEAST <= self.dense_mfu <= 1):
            raise ValueError(f"dense_tflop goes with a dense_mfu in (0, 1], {LEAST} at least, got {self.dense_mfu}")


def read_demand(path: Path) -> Demand:
    """The tables of a file.

    Raises:
        ValueError: it cannot be read, or a key or value in it is wrong; one line.
    """
    values = read_object(path)
    try:
        return _demand(from_dict(DemandFile, values))
    except ValueError as error:
        # The file states the settings of a placement without that word.
        raise ValueError(f"{path}: {error}".replace("placement.", "")) from error


def _demand(file: DemandFile) -> Demand:
    tables = tuple(table.config() for table in file.tables)
    ids: dict[str, float] = {}
    bags: dict[str, float] = {}
    for table in file.tables:
        ids |= table.a_feature(table.ids_per_sample)
        bags |= table.a_feature(table.bags_per_sample)
    return Demand(
        tables=tables,
        load=BatchLoad(
            samples_per_rank=file.samples_per_rank,
            ids_per_sample=ids,
            bags_per_sample=bags,
            frequencies={t.name: zipf(t.num_embeddings, t.zipf) for t in file.tables if t.zipf is not None},
        ),
        placement=PlacementConfig(
            activation_gib=file.activation_gib,
            compute_kernels=file.compute_kernels,
            cached_part=file.cached_part,
            reserved_fraction=file.reserved_fraction,
        ),
        optimizer=file.optimizer,
        dense_bytes=int(file.dense_gib * GIB),
        dense_ms=file.dense_ms,
        dense_tflop=file.dense_tflop,
        dense_mfu=file.dense_mfu,
    )
