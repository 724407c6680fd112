"""What each rank of the sharded tests does: shard from a plan file, train, checkpoint, reshard.  Also the oracle.

The oracle is plain PyTorch: whole tables, autograd's dense gradients and row-wise Adagrad written out.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed._shard.sharded_tensor.api import ShardedTensor
from torchrec.distributed.embedding import EmbeddingCollectionSharder
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from embeddings.config import PlacementConfig, ShardingType, SparseOptimizerConfig, TableConfig, TableConstraint
from embeddings.machine import Machine
from embeddings.optimizers import TableOptimizers, attach_optimizers
from embeddings.plan import BatchLoad, Plan
from embeddings.plan_file import read_plan, write_plan
from embeddings.planner import plan_tables
from embeddings.sharding import to_sharding_plan
from embeddings.tables import Tables, build_tables, init_tables, rows_by_feature, table_weights

TABLES = (
    TableConfig(name="item", num_embeddings=53, embedding_dim=8, features=("item", "candidate")),
    TableConfig(name="user", num_embeddings=7, embedding_dim=8, features=("user",)),
    # Fewer rows than ranks: with three ranks, row-wise leaves one of them an empty shard.
    TableConfig(name="gender", num_embeddings=2, embedding_dim=8, features=("gender",)),
    # Of other widths and types, with optimizers of their own.
    TableConfig(
        name="tag",
        num_embeddings=11,
        embedding_dim=16,
        features=("tag",),
        optimizer=SparseOptimizerConfig(kind="adagrad", learning_rate=0.3),
    ),
    TableConfig(
        name="city",
        num_embeddings=5,
        embedding_dim=16,
        features=("city",),
        optimizer=SparseOptimizerConfig(kind="sgd", learning_rate=0.2),
    ),
    TableConfig(name="brand", num_embeddings=13, embedding_dim=4, features=("brand",), dtype="float16"),
)
OPTIMIZER = SparseOptimizerConfig(learning_rate=0.1)
EPS = 1e-8
SEED = 5
STEPS = 4
GLOBAL_SAMPLES = 6
LAYOUTS = ("row_wise", "table_wise", "mixed")


class Model(nn.Module):
    """Tables under a name, as in a real model."""

    def __init__(self, configs: Sequence[TableConfig] = TABLES) -> None:
        super().__init__()
        self.tables = build_tables(configs, device=torch.device("meta"))

    def forward(self, features: KeyedJaggedTensor) -> Any:
        return self.tables(features)


def make_plan(layout: str, world_size: int) -> Plan:
    """Every table row-wise, every table table-wise, or the item table row-wise and the others whole."""
    types: dict[str, ShardingType] = {
        table.name: ("row_wise" if table.name == "item" else "table_wise") if layout == "mixed" else layout  # type: ignore[dict-item, misc]
        for table in TABLES
    }
    return plan_tables(
        Model(),
        TABLES,
        machine=Machine(world_size=world_size, local_world_size=world_size, compute_device="cpu"),
        placement=PlacementConfig(
            tables={name: TableConstraint(sharding_types=(kind,)) for name, kind in types.items()}
        ),
        optimizer=OPTIMIZER,
        load=BatchLoad(samples_per_rank=2),
    )


def global_batch(step: int) -> dict[str, list[list[int]]]:
    """Ids of each feature, a list a sample; some samples have none, and ids repeat within and across samples."""
    generator = torch.Generator().manual_seed(step)
    batch = {}
    for table in TABLES:
        for feature in table.features:
            lengths = torch.randint(0, 6, (GLOBAL_SAMPLES,), generator=generator).tolist()
            batch[feature] = [
                torch.randint(0, table.num_embeddings, (length,), generator=generator).tolist() for length in lengths
            ]
    # The last samples, which are one rank's, look up no item at all.
    batch["item"][-2:] = [[], []]
    # A key that no table looks up.
    batch["noise"] = [[10**9]] * GLOBAL_SAMPLES
    return batch


def weights(feature: str, ids: Tensor, step: int) -> Tensor:
    """What the loss multiplies the embeddings of `ids` with; differs by feature, id, column and step."""
    dim = next(table.embedding_dim for table in TABLES if feature in table.features)
    columns = torch.arange(dim, dtype=torch.float32)
    return torch.sin(ids[:, None] * 0.7 + columns * 0.3 + step + len(feature))


def oracle() -> tuple[dict[str, Tensor], list[dict[str, Tensor]]]:
    """(state under the checkpoint's names, embeddings a feature and step) of the unsharded model after `STEPS`."""
    unsharded = build_tables(TABLES, device=torch.device("cpu"))
    init_tables(unsharded, SEED)
    rows = {name: value.clone() for name, value in table_weights(unsharded).items()}
    sums: dict[str, Tensor] = {}
    outputs = []
    for step in range(STEPS):
        batch = global_batch(step)
        leaves = {name: value.float().requires_grad_() for name, value in rows.items()}
        embedded = {}
        loss = torch.zeros(())
        for table in TABLES:
            for feature in table.features:
                ids = flat(batch[feature])
                embedded[feature] = leaves[table.name][ids]
                loss = loss + (embedded[feature] * weights(feature, ids, step)).sum()
        loss.backward()
        outputs.append({feature: value.detach() for feature, value in embedded.items()})
        for table in TABLES:
            gradient = leaves[table.name].grad
            assert gradient is not None
            change = _update(table, gradient, sums)
            rows[table.name] = (leaves[table.name].detach() - change).to(rows[table.name].dtype)
    state = {f"tables/{name}": value for name, value in rows.items()}
    return state | {f"optimizer/{name}/momentum1": value for name, value in sums.items()}, outputs


def _update(table: TableConfig, gradient: Tensor, sums: dict[str, Tensor]) -> Tensor:
    """The change of the rows by the definition of the table's optimizer, whose sums are kept in `sums`."""
    optimizer = table.optimizer or OPTIMIZER
    if optimizer.kind == "sgd":
        return optimizer.learning_rate * gradient
    square = gradient.square()
    if optimizer.kind == "rowwise_adagrad":
        square = square.mean(dim=1)
    sums[table.name] = sums.get(table.name, torch.zeros(())) + square
    root = sums[table.name].sqrt() + EPS
    return optimizer.learning_rate * gradient / (root if root.dim() == 2 else root[:, None])


def run_rank(folder: str, save: bool) -> dict[str, Any]:
    """Train each layout and save it, or load every saved layout into every layout; returns this rank's parts."""
    results: dict[str, Any] = {}
    for layout in LAYOUTS:
        results[layout] = train(layout, Path(folder), save=save)
        if save:
            continue
        for saved in LAYOUTS:
            results[f"{saved}->{layout}"] = reload(saved, layout, Path(folder))
    return results


def train(layout: str, folder: Path, *, save: bool) -> dict[str, Any]:
    """Initial values, outputs of each step and final state of one layout, as this rank holds them."""
    plan, model, optimizers = shard(layout, folder)
    tables = model.module.tables
    result: dict[str, Any] = {"initial": local_parts(tables, optimizers), "outputs": []}
    rank, world_size = dist.get_rank(), dist.get_world_size()
    for step in range(STEPS):
        batch = global_batch(step)
        mine = {feature: samples[rank::world_size] for feature, samples in batch.items()}
        optimizers.zero_grad()
        embedded = {key: value.values() for key, value in rows_by_feature(model(jagged(mine))).items()}
        # Gradients of tables are averaged over ranks; the sum is wanted.
        loss = sum(
            (embedded[feature] * weights(feature, flat(mine[feature]), step)).sum() for feature in embedded
        ) * float(world_size)
        loss.backward()
        optimizers.step()
        lengths = {feature: [len(sample) for sample in samples] for feature, samples in mine.items()}
        result["outputs"].append(
            {feature: value.detach().split(lengths[feature]) for feature, value in embedded.items()}
        )
    result["final"] = local_parts(tables, optimizers)
    estimate = plan.ranks[rank]
    result["planned_bytes"] = (estimate.weight_bytes, estimate.optimizer_bytes)
    if save:
        dcp.save(state(tables, optimizers), checkpoint_id=folder / layout)
    return result


def reload(saved: str, layout: str, folder: Path) -> dict[str, Any]:
    """The state after loading what two ranks saved under another plan."""
    _, model, optimizers = shard(layout, folder)
    dcp.load(state(model.module.tables, optimizers), checkpoint_id=folder / saved)
    return local_parts(model.module.tables, optimizers)


def shard(layout: str, folder: Path) -> tuple[Plan, DistributedModelParallel, TableOptimizers]:
    """The model sharded from a plan file that this rank wrote and read back."""
    world_size = dist.get_world_size()
    path = folder / f"plan-{layout}-{world_size}-{dist.get_rank()}.json"
    plan = make_plan(layout, world_size)
    write_plan(path, plan)
    plan = read_plan(path, tables=TABLES, machine=plan.machine)
    model = Model()
    attach_optimizers(model.tables, OPTIMIZER)
    sharded = DistributedModelParallel(
        model,
        device=torch.device("cpu"),
        plan=to_sharding_plan(plan, model),
        sharders=[EmbeddingCollectionSharder()],
    )
    init_tables(model.tables, SEED)
    return plan, sharded, TableOptimizers(model.tables, OPTIMIZER, sharded.fused_optimizer)


def state(tables: Tables, optimizers: TableOptimizers) -> dict[str, Any]:
    """The flat state that a checkpoint stores."""
    return {
        **{f"tables/{name}": value for name, value in table_weights(tables).items()},
        **{f"optimizer/{name}": value for name, value in optimizers.state().items()},
    }


def local_parts(tables: Tables, optimizers: TableOptimizers) -> dict[str, list[tuple[int, Tensor]]]:
    """(first row, rows) of every tensor of the state that this rank holds, empty shards left out."""
    return {
        name: [
            (part.metadata.shard_offsets[0], part.tensor.detach().clone())
            for part in value.local_shards()
            if part.tensor.numel()
        ]
        for name, value in state(tables, optimizers).items()
        if isinstance(value, ShardedTensor)
    }


def jagged(batch: dict[str, list[list[int]]]) -> KeyedJaggedTensor:
    """TorchRec's form of a batch."""
    return KeyedJaggedTensor(
        keys=list(batch),
        values=torch.cat([flat(samples) for samples in batch.values()]),
        lengths=torch.tensor([len(sample) for samples in batch.values() for sample in samples], dtype=torch.int64),
    )


def flat(samples: list[list[int]]) -> Tensor:
    """All ids of a feature."""
    return torch.tensor([i for sample in samples for i in sample], dtype=torch.int64)
