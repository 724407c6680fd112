"""What a user states about tables: sizes, optimizer, and what the planner may do.  Standard library only."""

from dataclasses import dataclass, field
from typing import Literal, get_args

ComputeKernel = Literal["fused", "fused_uvm_caching", "fused_uvm"]
"""fused: rows in device memory.  fused_uvm_caching: rows in host memory, with a cache of hot rows on the device.
fused_uvm: rows in host memory.  All three apply the optimizer inside the backward pass; a CPU has only fused."""

KERNELS: tuple[ComputeKernel, ...] = get_args(ComputeKernel)

CACHED_PART = 0.2
"""Part of a fused_uvm_caching table's rows that the device caches, unless told."""

RowType = Literal["float32", "float16"]
"""Type of a table's rows.  Sums of gradients and optimizer state are float32 with either; bfloat16 rows have no CPU
kernel in FBGEMM."""

VALUE_BYTES: dict[RowType, int] = {"float32": 4, "float16": 2}
"""Bytes of a value of a row."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SparseOptimizerConfig:
    """An optimizer of tables; it changes the rows of a batch only, as part of the backward pass."""

    kind: Literal["rowwise_adagrad", "adagrad", "adam", "sgd"] = "rowwise_adagrad"
    """rowwise_adagrad keeps one number a row, adagrad one an element, adam two an element and the number of its steps,
    sgd none.  FBGEMM has no adam for a CPU."""
    learning_rate: float = 0.02
    """Base learning rate, scaled by the schedule."""
    eps: float | None = None
    """Added to the denominator; null takes 1e-8.  sgd has none."""
    betas: tuple[float, float] | None = None
    """Decay of adam's first and second moment; null takes (0.9, 0.999).  The others have none."""

    def __post_init__(self) -> None:
        if not self.learning_rate > 0:
            raise ValueError(f"sparse_optimizer.learning_rate must be above 0, got {self.learning_rate}")
        if self.eps is not None and (self.kind == "sgd" or not self.eps > 0):
            raise ValueError(f"sparse_optimizer.eps must be above 0, and null for sgd, got {self.eps} for {self.kind}")
        if self.betas is not None and (self.kind != "adam" or not all(0 <= beta < 1 for beta in self.betas)):
            raise ValueError(
                f"sparse_optimizer.betas must lie in [0, 1), and be null for all but adam, "
                f"got {self.betas} for {self.kind}"
            )


ExchangedType = Literal["float32", "float16", "bfloat16"]
"""Type of a value on its way from one rank to another."""

EXCHANGED_BYTES: dict[ExchangedType, int] = {"float32": 4, "float16": 2, "bfloat16": 2}
"""Bytes of such a value."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ExchangeConfig:
    """What ranks send each other for lookups in sharded tables.

    If rows and gradients are both bfloat16 and ids are not deduplicated, values stay in 16 bits all the way: kernels on
    GPUs write rows and read gradients in bfloat16, and models get them so, on one rank as on many.  A model that
    computes in bfloat16 trains as before, because it rounds the rows of single ids and their gradients likewise.
    """

    deduplicate: bool = False
    """Send each of a rank's distinct ids once, and its row and the sum of its gradients once.  Only the order in which
    gradients are added up changes.  It costs a sort a step, and pays where ids repeat and links are slow.  Pooled
    tables are not deduplicated."""
    rows: ExchangedType = "float32"
    """Rounding of rows on their way: float16 by at most 2^-11 of a value between 6e-5 and 65,504 (above that it becomes
    infinite), bfloat16 by at most 2^-8 of any."""
    gradients: Literal["float32", "bfloat16"] = "float32"
    """Rounding of their gradients, bfloat16 by at most 2^-8.  float16 would lose those below 3e-8 altogether."""

    def __post_init__(self) -> None:
        for what, value, known in (
            ("rows", self.rows, get_args(ExchangedType)),
            ("gradients", self.gradients, ("float32", "bfloat16")),
        ):
            if value not in known:
                raise ValueError(f"placement.exchange.{what} must be one of {', '.join(known)}, got {value!r}")

    @property
    def given_as(self) -> ExchangedType:
        """Type of the rows that models are given, and of the gradients that they give back."""
        # Gradients of an id that is sent once are added up by the rank that asked, which 16 bits are too few for.
        narrow = self.rows == self.gradients == "bfloat16" and not self.deduplicate
        return "bfloat16" if narrow else "float32"

    @property
    def value_bytes(self) -> int:
        """Bytes that a value of a row and its gradient take on their ways, together."""
        return EXCHANGED_BYTES[self.rows] + EXCHANGED_BYTES[self.gradients]


def state_bytes_per_row(optimizer: str, columns: int) -> int:
    """Bytes of an optimizer's float32 state for a row of so many columns."""
    return {"rowwise_adagrad": 4, "adagrad": 4 * columns, "adam": 8 * columns, "sgd": 0}[optimizer]


@dataclass(frozen=True, kw_only=True, slots=True)
class UnboundedConfig:
    """Which keys have rows in a table of unbounded ids (`embeddings/lookups/key_map.py`).  The others share row 0."""

    min_count: int = 1
    """Lookups in training after which a key gets a row of its own."""
    evict: Literal["lru", "lfu"] = "lru"
    """Whose row a new key takes once none is free.  lru: that of the key unused for longest.  lfu: that of the key with
    the fewest lookups since it came."""
    evict_after_steps: int = 1
    """Age: only keys that no batch has looked up for at least this many steps lose their row.  If there is none, the
    new key shares row 0 until it is looked up again."""

    def __post_init__(self) -> None:
        for name in ("min_count", "evict_after_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"unbounded.{name} must be at least 1, got {getattr(self, name)}")
        if self.evict not in ("lru", "lfu"):
            raise ValueError(f"unbounded.evict must be lru or lfu, got {self.evict!r}")


@dataclass(frozen=True, kw_only=True, slots=True)
class TableConfig:
    """One logical table, whatever ranks its rows end up on."""

    name: str
    """Unique name; part of checkpoint keys, so it holds no dot or slash."""
    num_embeddings: int
    """Rows; ids must lie in [0, num_embeddings), unless they are unbounded."""
    embedding_dim: int
    """Columns.  FBGEMM needs a multiple of 4."""
    features: tuple[str, ...]
    """Input features whose ids are looked up here."""
    dtype: RowType = "float32"
    """Type of the rows.  float16 halves their memory and traffic; a step smaller than half the distance to the next
    float16 is then lost, or on a GPU taken with a probability in proportion (FBGEMM's stochastic rounding)."""
    optimizer: SparseOptimizerConfig | None = None
    """An optimizer of its own; null takes the run's."""
    frozen: bool = False
    """Rows and their optimizer's state stay as they are."""
    initial_bound: float | None = None
    """Initial values are uniform within plus and minus this; null for 1 / sqrt(embedding_dim)."""
    unbounded: UnboundedConfig | None = None
    """Ids are any 64-bit keys, which a map gives rows; null: ids are rows."""
    pooled: str | None = None
    """Not null: the rows of a bag of ids are summed where they lie, and the sums travel.  The word says what a feature
    has one bag for, so tables with equal words have equally many bags.  Null: each id's row travels."""

    def __post_init__(self) -> None:
        if self.initial_bound is not None and self.initial_bound <= 0:
            raise ValueError(
                f"table {self.name!r}: initial_bound must be above 0, or null for 1 / sqrt(embedding_dim), "
                f"got {self.initial_bound}"
            )
        if not self.name or "." in self.name or "/" in self.name or not self.name.isprintable():
            raise ValueError(f"table name must be printable text without a dot or slash, got {self.name!r}")
        if self.num_embeddings < 1:
            raise ValueError(f"table {self.name!r}: num_embeddings must be at least 1, got {self.num_embeddings}")
        if self.embedding_dim < 4 or self.embedding_dim % 4:
            raise ValueError(
                f"table {self.name!r}: embedding_dim must be a positive multiple of 4 (FBGEMM's rows), "
                f"got {self.embedding_dim}"
            )
        if max(self.num_embeddings, self.weight_bytes) >= 2**63:
            raise ValueError(
                f"table {self.name!r}: {self.num_embeddings:,} rows of {self.embedding_dim:,} columns take 2^63 bytes "
                "or more, which no memory holds: take fewer rows or columns"
            )
        if self.unbounded is not None and self.frozen:
            raise ValueError(f"table {self.name!r} of unbounded ids gives rows to new keys, so it cannot be frozen")
        if self.unbounded is not None and self.num_embeddings < 2:
            raise ValueError(f"table {self.name!r} of unbounded ids needs 2 rows or more: one is shared by other keys")
        if not self.features:
            raise ValueError(f"table {self.name!r} has no features: name at least one, or drop the table")
        if "" in self.features or len(set(self.features)) < len(self.features):
            raise ValueError(f"table {self.name!r}: features must be different names, got {list(self.features)}")
        if self.pooled == "":
            raise ValueError(f"table {self.name!r}: pooled must be a word for what has a bag, or null, got ''")
        if self.dtype not in VALUE_BYTES:
            raise ValueError(f"table {self.name!r}: dtype must be one of {', '.join(VALUE_BYTES)}, got {self.dtype!r}")

    @property
    def row_bytes(self) -> int:
        """Bytes of a row."""
        return self.embedding_dim * VALUE_BYTES[self.dtype]

    @property
    def weight_bytes(self) -> int:
        """Bytes of all rows."""
        return self.num_embeddings * self.row_bytes


def optimizer_of(table: TableConfig, default: SparseOptimizerConfig) -> SparseOptimizerConfig:
    """The table's own optimizer, or else the run's."""
    return default if table.optimizer is None else table.optimizer


@dataclass(frozen=True, kw_only=True, slots=True)
class TableConstraint:
    """What the planner may do with one table; null: the rule for all tables applies."""

    sharding_types: tuple[str, ...] | None = None
    """Sharding types to choose from; one that the table cannot have is an error."""
    compute_kernels: tuple[ComputeKernel, ...] | None = None
    """Kernels to choose from."""
    pooled: bool = False
    """Rows of many ids are added up where they lie, and the sums travel.  It pays where bags are long and ranks are
    several; the columns that read the table must have many ids each, and belong to the same part of a sample."""

    def __post_init__(self) -> None:
        if self.sharding_types == () or self.compute_kernels == ():
            raise ValueError("a table constraint must allow at least one choice; null allows what `placement` allows")


@dataclass(frozen=True, kw_only=True, slots=True)
class PlacementConfig:
    """What the sharding planner may choose from, and the memory it must leave alone."""

    sharding_types: tuple[str, ...] | None = None
    """Sharding types to choose from, for every table without a constraint of its own, as far as a table can have them;
    null takes all that there are (`embeddings/kinds`).  Training is the same under each."""
    compute_kernels: tuple[ComputeKernel, ...] = ("fused",)
    """Kernels to choose from.  Add fused_uvm_caching to let tables that do not fit overflow into host memory."""
    cached_part: float = CACHED_PART
    """Part of the rows of a fused_uvm_caching table that the device caches."""
    machine: str | None = None
    """Machine type, or .json file of one, whose rates estimates are made from (`embeddings/hardware.py`;
    `python -m embeddings probe` measures a file); null takes the known GPU whose memory is nearest."""
    exchange: ExchangeConfig = field(default_factory=ExchangeConfig)
    """What ranks send each other."""
    tables: dict[str, TableConstraint] = field(default_factory=dict)
    """Constraints of single tables, by table name."""
    reserved_fraction: float = 0.15
    """Part of each rank's memory that tables do not get: CUDA context, communication buffers, fragmentation."""
    activation_gib: float | None = None
    """Further GiB of each rank that tables do not get, for the dense model's activations and waiting batches; null:
    they are counted from the model, as its parameters, gradients and Adam moments are."""

    def __post_init__(self) -> None:
        if self.sharding_types == () or not self.compute_kernels:
            raise ValueError(
                "placement.sharding_types and placement.compute_kernels must name at least one choice each"
            )
        if not 0 < self.cached_part <= 1:
            raise ValueError(f"placement.cached_part must lie in (0, 1], got {self.cached_part}")
        if not 0 <= self.reserved_fraction < 1:
            raise ValueError(f"placement.reserved_fraction must lie in [0, 1), got {self.reserved_fraction}")
        if self.activation_gib is not None and not 0 <= self.activation_gib < 2**33:
            raise ValueError(f"placement.activation_gib must be at least 0 and below 2^33, got {self.activation_gib}")
