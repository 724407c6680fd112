"""What defines a way of sharding: how it cuts a table, what a block costs its rank, which tables cannot have it.

Times follow TorchRec's estimator (a test holds them equal), in closed form, because TorchRec's own enumerator asks for
every shard of every table and takes minutes for a hundred tables.  Nothing here needs torch.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

from embeddings.config import CACHED_PART, ComputeKernel, ExchangeConfig, TableConfig, state_bytes_per_row
from embeddings.machine import Machine

ID_BYTES = 8
"""Bytes of an id on its way to the rank that holds its row."""
FLOAT_BYTES = 4
"""Bytes of a value of a looked-up row and of its gradient, whatever the type of the table's rows."""
_BACKWARD_OVER_FORWARD = 2.0
_SORTED_BYTES = 52
"""Bytes of an id while a GPU's update sorts the ids of a step, as measured (`benchmarks/placements.py`)."""
_CACHED_ROW_BYTES = 8
"""Bookkeeping of each row of a cached table, in the cache or not, as measured."""
_GB_PER_S_IN_BYTES_PER_MS = 1e6


@dataclass(frozen=True, slots=True)
class Shard:
    """A rectangle of a table on one rank."""

    rank: int
    """The rank that holds it."""
    rows: range
    """Global rows; empty where a table has fewer rows than there are ranks."""
    columns: range
    """Columns of the whole table."""


@dataclass(frozen=True, slots=True)
class Blocks:
    """Some blocks of a table that are alike."""

    count: int
    """How many of such blocks there are."""
    num_rows: int
    """Rows of each block."""
    num_columns: int
    """Columns of each block."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ShardCost:
    """What one block costs the rank that holds it."""

    ms: float
    """Estimated time a step: lookup, exchange of rows, backward and update.  Ids are exchanged while another step runs.
    """
    weight_bytes: int
    """Rows in device memory; of a cached table, the cache and its optimizer state."""
    optimizer_bytes: int
    """Optimizer state in device memory."""
    io_bytes: int
    """Buffers of ids, rows and gradients."""
    host_bytes: int
    """Rows and optimizer state in host memory."""

    @property
    def memory_bytes(self) -> int:
        """Device memory of the block with its buffers."""
        return self.weight_bytes + self.optimizer_bytes + self.io_bytes


@dataclass(frozen=True, kw_only=True, slots=True)
class Work:
    """The lookups of one table in a step, and where they happen."""

    table: TableConfig
    """The table whose rows are looked up."""
    optimizer: str
    """Kind of its optimizer."""
    kernel: ComputeKernel
    """Which memory holds its rows, in the words of TorchRec's kernels."""
    machine: Machine
    """The machine whose ranks do the work."""
    ids: float
    """Ids that one rank's samples look up."""
    exchanged_ids: float
    """Ids that it sends to other ranks: the distinct ones, or all."""
    exchange: ExchangeConfig
    """How their rows travel."""
    bags: float | None = None
    """Bags that the rows of a pooled table are summed in, whose sums travel in the rows' place; None of other
    tables."""
    cached_part: float = CACHED_PART
    """Part of its rows that the device caches, where the kernel has a cache."""
    hit_rate: float = CACHED_PART
    """Part of the ids whose row a cache on the device holds, where the kernel has one."""

    @property
    def vectors(self) -> float:
        """Rows, or sums, that come back to the rank."""
        return self.exchanged_ids if self.bags is None else self.bags

    @property
    def deduplicates(self) -> bool:
        """Whether the rank sends its distinct ids alone."""
        return self.exchange.deduplicate

    @property
    def exchanged_row_bytes(self) -> float:
        """Bytes of a row and its gradient on their ways between ranks, together."""
        return self.table.embedding_dim * self.exchange.value_bytes

    @property
    def device_bytes_per_ms(self) -> float:
        """Rate at which a lookup reads rows; where it is not measured, as TorchRec takes it for the kernel."""
        rates = self.machine.effective_rates
        cached = rates.cached_rows(self.hit_rate)
        rate = {"fused": rates.device, "fused_uvm_caching": cached, "fused_uvm": rates.uncached_rows}
        return rate[self.kernel] * _GB_PER_S_IN_BYTES_PER_MS

    @property
    def id_ms(self) -> float:
        """Time of an id besides that of its row: to sort it for the update and, where there is a cache, to ask for
        it."""
        rates = self.machine.effective_rates
        return (rates.id_ns + (rates.cache_id_ns if self.kernel == "fused_uvm_caching" else 0.0)) * 1e-6

    @property
    def link_bytes_per_ms(self) -> float:
        """Rate of an exchange among all ranks."""
        return self.machine.exchange_rate * _GB_PER_S_IN_BYTES_PER_MS


class ShardingKind(ABC):
    """One way to shard a table.

    How its state moves: checkpoints store a table and its optimizer state under names of their own, cut as they lie, so
    every kind's shards are rectangles of the same whole, and any kind reads what any other wrote.
    """

    name: str
    """The name in settings and plans; TorchRec's, but for `replicated`."""
    everywhere: bool
    """Whether block i always lies on rank i, so that there is nothing to choose."""
    on_nodes: bool = False
    """Whether each run of as many blocks as a node has ranks lies on all ranks of one node, in order, so that nodes are
    what there is to choose."""
    sharded: bool = True
    """Whether TorchRec shards the table; if not, each rank has all of it as an ordinary parameter."""

    def refusal(self, work: Work) -> str | None:
        """Why the table cannot be sharded so, None if it can."""
        del work
        return None

    @abstractmethod
    def cuts(self, table: TableConfig, machine: Machine) -> list[tuple[Blocks, ...]]:
        """Every way to cut the table for a machine, each as its blocks in order."""

    @abstractmethod
    def shards(self, table: TableConfig, machine: Machine, ranks: Sequence[int]) -> tuple[Shard, ...]:
        """The shards when the blocks of a cut are on `ranks` of a machine in order; for kinds that are everywhere, on
        all ranks."""

    def sent_bytes(self, work: Work, num_blocks: int) -> float:
        """Ids, rows and their gradients that a rank sends a step for the table's blocks, of the ranks' mean."""
        del num_blocks
        return work.exchanged_ids * ID_BYTES + work.vectors * work.exchanged_row_bytes

    @abstractmethod
    def cost(self, work: Work, block: Blocks) -> ShardCost:
        """What one of the blocks costs."""


def lookup_ms(
    work: Work, ids: float, vectors: float, columns: int, *, penalty: float = 1.0, least_columns: int = 0
) -> float:
    """Reading `ids` and their rows of `columns`, writing out `vectors`, the backward pass and the sorted update.

    float16 rows in device memory take as long as float32 ones (an H200: `benchmarks/placements.py`); TorchRec counts
    half.
    """
    value_bytes = FLOAT_BYTES if work.kernel == "fused" else work.table.row_bytes // work.table.embedding_dim
    read = ids * (ID_BYTES + max(columns, least_columns) * value_bytes) + vectors * columns * FLOAT_BYTES
    return read * penalty / work.device_bytes_per_ms * (1 + _BACKWARD_OVER_FORWARD) + ids * work.id_ms


def written_out_ms(work: Work, columns: int) -> float:
    """Rows of distinct ids brought to all their places, and the gradients of the places added up."""
    if not work.deduplicates:
        return 0.0
    values = (2 * work.ids + work.exchanged_ids) * columns
    return 2 * values * FLOAT_BYTES / (work.machine.effective_rates.device * _GB_PER_S_IN_BYTES_PER_MS)


def written_out_bytes(work: Work, columns: int) -> float:
    """Memory of the rows at all their places and of their gradients."""
    return 2 * work.ids * columns * FLOAT_BYTES if work.deduplicates else 0.0


def stored(work: Work, block: Blocks, io_bytes: float, ms: float) -> ShardCost:
    """The cost of a block whose optimizer is fused into its lookup, with its memory by kernel."""
    part = block.num_columns / work.table.embedding_dim
    weights = math.ceil(block.num_rows * work.table.row_bytes * part)
    state = block.num_rows * state_bytes_per_row(work.optimizer, block.num_columns)
    if work.kernel == "fused":
        return ShardCost(ms=ms, weight_bytes=weights, optimizer_bytes=state, io_bytes=math.ceil(io_bytes), host_bytes=0)
    cache = 0
    if work.kernel == "fused_uvm_caching":
        # Rows and state of the cached part, and FBGEMM's bookkeeping: some bytes a row and 16 a place in the cache.
        bookkeeping = block.num_rows * (_CACHED_ROW_BYTES + 16 * work.cached_part)
        cache = math.ceil((weights + state) * work.cached_part + bookkeeping)
    return ShardCost(
        ms=ms, weight_bytes=cache, optimizer_bytes=0, io_bytes=math.ceil(io_bytes), host_bytes=weights + state
    )


def buffer_bytes(work: Work, ids: float, vectors: float, columns: int) -> float:
    """Ids and `vectors` in flight on a rank that looks up `ids`; a GPU's pipeline holds the ids of two batches.

    The vectors lie there three times on a GPU, as measured on one (`benchmarks/placements.py`): as looked up, as their
    gradient, and once more in the order of the other side while either is put into it; a fourth time where they come
    from host memory.
    """
    row = columns * FLOAT_BYTES
    if work.machine.compute_device == "cpu":
        return math.ceil(ids * ID_BYTES) + math.ceil(vectors * row)
    copies = 4 if work.kernel == "fused_uvm" else 3
    return 2 * math.ceil(ids * ID_BYTES) + math.ceil(vectors * copies * row + ids * _SORTED_BYTES)
