"""What each way of placing a table costs a rank: TorchRec's estimators, asked once for each different shard.

TorchRec's own enumerator asks for every shard of every table, though a row-wise table over 1,024 ranks has at most
three different ones (a full block, the last one, an empty one); with it planning takes minutes to hours.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torchrec.distributed.embedding import EmbeddingCollectionSharder
from torchrec.distributed.planner.constants import DEFAULT_PERF_ESTIMATOR
from torchrec.distributed.planner.enumerators import EmbeddingEnumerator, get_partition_by_type
from torchrec.distributed.planner.estimator.estimator import EmbeddingPerfEstimatorFactory
from torchrec.distributed.planner.shard_estimators import EmbeddingStorageEstimator
from torchrec.distributed.planner.types import (
    HardwareConfig,
    KernelConfig,
    ParameterConstraints,
    ShardingOption,
    Topology,
    TopologyFactory,
    TrainerConfig,
)
from torchrec.distributed.planner.types import Shard as TorchRecShard
from torchrec.distributed.types import PipelineType
from torchrec.modules.embedding_modules import EmbeddingCollection

from embeddings.config import ComputeKernel, PlacementConfig, ShardingType, SparseOptimizerConfig, TableConfig
from embeddings.machine import Machine
from embeddings.optimizers import attach_optimizers, check_optimizers, optimizer_of, state_bytes_per_row
from embeddings.plan import GIB, BatchLoad, row_blocks
from embeddings.tables import build_tables

BYTES_PER_MS = 1e6
"""One GB/s in TorchRec's unit of bandwidth."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ShardCost:
    """What one shard costs the rank that holds it."""

    ms: float
    """Estimated time a step: input dist, lookup, output dist, backward and update."""
    weight_bytes: int
    """Rows in device memory; of a cached table, the cache."""
    optimizer_bytes: int
    """Optimizer state in device memory."""
    io_bytes: int
    """Buffers of input dist and output dist."""
    host_bytes: int
    """Rows and optimizer state in host memory."""

    @property
    def memory_bytes(self) -> int:
        """Device memory."""
        return self.weight_bytes + self.optimizer_bytes + self.io_bytes


@dataclass(frozen=True, kw_only=True, slots=True)
class Option:
    """One way to place one table."""

    embedding_dim: int
    """Its width: tables of another one are looked up by themselves."""
    sharding_type: ShardingType
    """How it is cut."""
    kernel: ComputeKernel
    """Where its rows are."""
    blocks: tuple[tuple[int, ShardCost], ...]
    """(number of ranks, cost of each) for consecutive ranks from rank 0; table_wise has one block, on any one rank."""

    @property
    def largest(self) -> ShardCost:
        """The cost of the fullest shard."""
        return self.blocks[0][1]


def table_options(
    tables: Sequence[TableConfig],
    *,
    machine: Machine,
    placement: PlacementConfig,
    optimizer: SparseOptimizerConfig,
    load: BatchLoad,
) -> list[list[Option]]:
    """Every allowed way to place each table, with its costs, in the order of `tables`.

    Raises:
        ValueError: a constraint names an unknown table, or leaves a table no kernel that the machine has.
    """
    unknown = sorted(set(placement.tables) - {table.name for table in tables})
    if unknown:
        names = sorted(table.name for table in tables)
        raise ValueError(f"placement.tables names {unknown[0]!r}, which is no table: known are {names}")
    check_optimizers(tables, optimizer, machine.compute_device)
    built = build_tables(tables, device=torch.device("meta"))
    attach_optimizers(built, optimizer)
    estimators = {
        collection.embedding_dim(): _Estimator(collection, machine, optimizer, load) for collection in built.collections
    }
    return [
        [
            estimators[table.embedding_dim].option(table, sharding_type, kernel)
            for sharding_type in _allowed_types(table, placement)
            for kernel in _allowed_kernels(table, placement, machine)
        ]
        for table in tables
    ]


def _allowed_types(table: TableConfig, placement: PlacementConfig) -> Sequence[ShardingType]:
    constraint = placement.tables.get(table.name)
    return (constraint and constraint.sharding_types) or placement.sharding_types


def _allowed_kernels(table: TableConfig, placement: PlacementConfig, machine: Machine) -> Sequence[ComputeKernel]:
    constraint = placement.tables.get(table.name)
    kernels = (constraint and constraint.compute_kernels) or placement.compute_kernels
    if machine.compute_device == "cuda":
        return kernels
    if "fused" not in kernels:
        raise ValueError(f"table {table.name!r} allows the kernels {kernels}, a cpu has only fused: add it")
    return ("fused",)


class _Estimator:
    """TorchRec's performance and storage estimators, asked for single shards."""

    def __init__(
        self, collection: EmbeddingCollection, machine: Machine, optimizer: SparseOptimizerConfig, load: BatchLoad
    ) -> None:
        self._collection = collection
        self._machine = machine
        self._optimizer = optimizer
        self._load = load
        topology = torchrec_topology(machine)
        constraints = {
            config.name: ParameterConstraints(pooling_factors=_lookups(config.feature_names, load))
            for config in collection.embedding_configs()
        }
        self._enumerator = EmbeddingEnumerator(
            topology=topology,
            batch_size=load.samples_per_rank,
            constraints=constraints,
            estimator=[
                EmbeddingPerfEstimatorFactory.create(
                    DEFAULT_PERF_ESTIMATOR, topology=topology, constraints=constraints
                ),
                EmbeddingStorageEstimator(
                    topology=topology,
                    constraints=constraints,
                    # The pipeline holds the ids of two batches, and outputs live from the lookup to its backward.
                    pipeline_type=PipelineType.TRAIN_SPARSE_DIST,
                    run_embedding_at_peak_memory=True,
                ),
            ],
        )
        # Enumerating an empty module only tells the enumerator its sharders; `populate_estimates` needs them.
        self._enumerator.enumerate(torch.nn.Module(), [EmbeddingCollectionSharder()])

    def option(self, table: TableConfig, sharding_type: ShardingType, kernel: ComputeKernel) -> Option:
        """The costs of placing `table` so."""
        num_blocks = 1 if sharding_type == "table_wise" else self._machine.world_size
        counts: dict[int, int] = {}
        for _, rows in row_blocks(table.num_embeddings, num_blocks):
            counts[rows] = counts.get(rows, 0) + 1
        sizes = list(counts)
        costs = self._shard_costs(table, sharding_type, kernel, sizes)
        return Option(
            embedding_dim=table.embedding_dim,
            sharding_type=sharding_type,
            kernel=kernel,
            blocks=tuple((counts[rows], cost) for rows, cost in zip(sizes, costs, strict=True)),
        )

    def _shard_costs(
        self, table: TableConfig, sharding_type: ShardingType, kernel: ComputeKernel, sizes: Sequence[int]
    ) -> list[ShardCost]:
        shards = self._estimated(table, sharding_type, kernel, sizes)
        on_device = shards if kernel == "fused" else self._estimated(table, sharding_type, "fused", sizes)
        optimizer_per_row = state_bytes_per_row(optimizer_of(table, self._optimizer).kind, table.embedding_dim)
        num_blocks = 1 if sharding_type == "table_wise" else self._machine.world_size
        costs = []
        for shard, reference, rows in zip(shards, on_device, sizes, strict=True):
            weights, state = rows * table.row_bytes, rows * optimizer_per_row
            # TorchRec lets every rank take an equal part of the lookups; a table of few rows spreads them less.
            share = rows * num_blocks / table.num_embeddings
            # Buffers do not depend on the kernel: what the fused kernel needs beyond rows and optimizer state.
            buffers = self._memory(reference) - weights - state
            io_bytes = math.ceil(buffers * share)
            cost = ShardCost(
                ms=shard.perf.total * share,
                weight_bytes=weights if kernel == "fused" else self._memory(shard) - buffers,
                optimizer_bytes=state if kernel == "fused" else 0,
                io_bytes=io_bytes,
                host_bytes=0 if kernel == "fused" else shard.storage.ddr,
            )
            costs.append(cost)
        return costs

    def _estimated(
        self, table: TableConfig, sharding_type: ShardingType, kernel: ComputeKernel, sizes: Sequence[int]
    ) -> list[TorchRecShard]:
        option = ShardingOption(
            name=table.name,
            tensor=self._collection.embeddings[table.name].weight,
            module=("", self._collection),
            input_lengths=_lookups(table.features, self._load),
            batch_size=self._load.samples_per_rank,
            compute_kernel=kernel,
            sharding_type=sharding_type,
            partition_by=get_partition_by_type(sharding_type),
            shards=[TorchRecShard(size=[rows, table.embedding_dim], offset=[0, 0]) for rows in sizes],
            is_pooled=False,
        )
        self._enumerator.populate_estimates([option])
        shards: list[TorchRecShard] = option.shards
        return shards

    def _memory(self, shard: TorchRecShard) -> int:
        return int(shard.storage.hbm if self._machine.compute_device == "cuda" else shard.storage.ddr)


def torchrec_topology(machine: Machine) -> Topology:
    """`machine` in TorchRec's terms."""
    rates = machine.bandwidths
    return TopologyFactory.create_topology(
        TrainerConfig(world_size=machine.world_size, local_world_size=machine.local_world_size),
        HardwareConfig(
            hbm_cap_bytes=None if machine.hbm_gib is None else int(machine.hbm_gib * GIB),
            ddr_cap_bytes=int(machine.ddr_gib * GIB),
            hbm_mem_bw=rates.device * BYTES_PER_MS,
            ddr_mem_bw=rates.device * BYTES_PER_MS,
            hbm_to_ddr_mem_bw=rates.host_link * BYTES_PER_MS,
            intra_host_bw=rates.within_node * BYTES_PER_MS,
            inter_host_bw=rates.across_nodes * BYTES_PER_MS,
        ),
        KernelConfig(compute_device=machine.compute_device, use_hardware_based_bandwidth=True),
    )


def _lookups(features: Sequence[str], load: BatchLoad) -> list[float]:
    return [float(load.ids_per_sample.get(feature, 1.0)) for feature in features]
