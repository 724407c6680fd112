"""Our plan as TorchRec's ShardingPlan, which DistributedModelParallel takes."""

import torch
from torch import nn
from torch.distributed._shard.metadata import ShardMetadata
from torch.distributed._shard.sharding_spec.api import EnumerableShardingSpec
from torchrec.distributed.sharding_plan import placement
from torchrec.distributed.types import EmbeddingModuleShardingPlan, ParameterSharding, ShardingPlan
from torchrec.modules.embedding_modules import EmbeddingCollection

from embeddings.machine import Machine
from embeddings.plan import Plan, TablePlacement


def to_sharding_plan(plan: Plan, model: nn.Module) -> ShardingPlan:
    """TorchRec's plan for the embedding collections of `model`, on the devices of `plan.machine`.

    Raises:
        ValueError: a table of `model` is not in the plan, or has another shape there.
    """
    modules = {}
    for path, module in model.named_modules():
        if not isinstance(module, EmbeddingCollection):
            continue
        parameters = EmbeddingModuleShardingPlan()
        for config in module.embedding_configs():
            table = plan.tables.get(config.name)
            if table is None:
                raise ValueError(f"the plan has no table {config.name!r}, which the model has: plan again")
            if (table.num_embeddings, table.embedding_dim) != (config.num_embeddings, config.embedding_dim):
                raise ValueError(
                    f"table {config.name!r} is {table.num_embeddings} x {table.embedding_dim} in the plan, "
                    f"{config.num_embeddings} x {config.embedding_dim} in the model: plan again"
                )
            parameters[config.name] = _parameter_sharding(table, plan.machine)
        modules[path] = parameters
    return ShardingPlan(modules)


def _parameter_sharding(table: TablePlacement, machine: Machine) -> ParameterSharding:
    device = torch.device(machine.compute_device).type
    return ParameterSharding(
        sharding_type=table.sharding_type,
        compute_kernel=table.kernel,
        ranks=[shard.rank for shard in table.shards],
        sharding_spec=EnumerableShardingSpec(
            [
                ShardMetadata(
                    shard_offsets=[shard.first_row, 0],
                    shard_sizes=[shard.num_rows, table.embedding_dim],
                    placement=placement(device, shard.rank, machine.local_world_size),
                )
                for shard in table.shards
            ]
        ),
    )
