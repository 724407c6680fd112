"""Applies a plan: each rank gets its shards of the tables, and replicated tables become ordinary parameters."""

import torch
from torch import nn
from torch.distributed._shard.metadata import ShardMetadata
from torch.distributed._shard.sharding_spec.api import EnumerableShardingSpec
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.sharding_plan import placement
from torchrec.distributed.types import CacheParams, EmbeddingModuleShardingPlan, ParameterSharding, ShardingPlan

from embeddings.config import SparseOptimizerConfig, TableConfig
from embeddings.kinds.registry import KINDS
from embeddings.lookups.exchange import table_sharders
from embeddings.optimizers import TableOptimizers, attach_optimizers
from embeddings.plan import Plan
from embeddings.tables import (
    Collection,
    Group,
    Tables,
    build_embedding_collection,
    group_of,
    init_tables,
    modules_by_table,
)


def shard_tables(
    model: nn.Module,
    plan: Plan,
    *,
    optimizer: SparseOptimizerConfig,
    device: torch.device,
    seed: int,
    prefetch: bool = False,
) -> tuple[DistributedModelParallel, TableOptimizers]:
    """`model` with its `Tables`, which are on the meta device, divided among the ranks as the plan says, with initial
    values; and the optimizers of the tables.  Called by every rank, with the same plan.

    Nothing averages gradients over ranks: those of the dense model and of tables that the plan replicates are the
    caller's to average before each update.  `prefetch`: a pipeline fills caches a batch ahead, so a row that a coming
    batch brought into its cache must be updated there.

    Raises:
        ValueError: the plan has other tables than the model.
    """
    (tables,) = (each for each in model.modules() if isinstance(each, Tables))
    sharding_plan = apply_plan(model, plan, device=device, prefetch=prefetch)
    attach_optimizers(tables, optimizer)
    module = DistributedModelParallel(
        model,
        device=device,
        plan=sharding_plan,
        sharders=table_sharders(plan.exchange),
        # Otherwise it wraps what it does not shard in DistributedDataParallel.
        init_data_parallel=False,
    )
    init_tables(tables, seed)
    return module, TableOptimizers(tables, optimizer, module.fused_optimizer)


def apply_plan(model: nn.Module, plan: Plan, *, device: torch.device, prefetch: bool = False) -> ShardingPlan:
    """Divide the tables of `model` into collections as the plan says: replicated ones get storage on `device`, and for
    the others this returns TorchRec's plan.

    Raises:
        ValueError: the plan has other tables than the model.
    """
    modules = {}
    for path, tables in list(model.named_modules()):
        if isinstance(tables, Tables):
            _check_tables(plan, tables)
            _divide(tables, plan, device)
            for index, collection in enumerate(tables.collections):
                if collection.device.type == "meta":
                    modules[f"{path}.collections.{index}"] = _collection_plan(collection, plan, prefetch)
    return ShardingPlan(modules)


def _divide(tables: Tables, plan: Plan, device: torch.device) -> None:
    """One collection for each group of tables that are sharded, and one for those that are not."""
    groups: dict[tuple[bool, Group], list[TableConfig]] = {}
    for config in tables.configs:
        sharded = KINDS[plan.tables[config.name].sharding_type].sharded
        groups.setdefault((sharded, group_of(config)), []).append(config)
    tables.hold(
        build_embedding_collection(configs, device=torch.device("meta") if sharded else device)
        for (sharded, _), configs in groups.items()
    )


def _collection_plan(collection: Collection, plan: Plan, prefetch: bool) -> EmbeddingModuleShardingPlan:
    parameters = EmbeddingModuleShardingPlan()
    for name in modules_by_table(collection):
        parameters[name] = _parameter_sharding(plan, name, prefetch)
    return parameters


def _check_tables(plan: Plan, tables: Tables) -> None:
    for config in tables.configs:
        table = plan.tables.get(config.name)
        if table is None:
            raise ValueError(f"the plan has no table {config.name!r}, which the model has: plan again")
        there = (table.num_embeddings, table.embedding_dim, table.dtype)
        here = (config.num_embeddings, config.embedding_dim, config.dtype)
        if there != here:
            raise ValueError(
                f"table {config.name!r} is {there[0]} x {there[1]} {there[2]} in the plan, "
                f"{here[0]} x {here[1]} {here[2]} in the model: plan again"
            )


def _parameter_sharding(plan: Plan, name: str, prefetch: bool) -> ParameterSharding:
    table, machine = plan.tables[name], plan.machine
    cached = table.kernel == "fused_uvm_caching"
    device = torch.device(machine.compute_device).type
    shards = plan.shards(name)
    return ParameterSharding(
        sharding_type=table.sharding_type,
        compute_kernel=table.kernel,
        ranks=[shard.rank for shard in shards],
        cache_params=CacheParams(load_factor=plan.cached_part, prefetch_pipeline=prefetch) if cached else None,
        sharding_spec=EnumerableShardingSpec(
            [
                ShardMetadata(
                    shard_offsets=[shard.rows.start, shard.columns.start],
                    shard_sizes=[len(shard.rows), len(shard.columns)],
                    placement=placement(device, shard.rank, machine.local_world_size),
                )
                for shard in shards
            ]
        ),
    )
