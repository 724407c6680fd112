"""What each rank of the sharded tests does: shard from a plan file, train, checkpoint, reshard.  Also the oracle.

The oracle is plain PyTorch: whole tables, autograd's dense gradients and row-wise Adagrad written out.
"""

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torchrec.distributed.embedding import EmbeddingCollectionSharder
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from embeddings.config import PlacementConfig, ShardingType, SparseOptimizerConfig, TableConfig, TableConstraint
from embeddings.machine import Machine
from embeddings.plan import BatchLoad, Plan
from embeddings.plan_file import read_plan, write_plan
from embeddings.planner import plan_tables
from embeddings.sharding import to_sharding_plan
from embeddings.state import optimizer_state, tables_state
from embeddings.tables import apply_sparse_optimizer, build_embedding_collection, init_tables

DIM = 8
TABLES = (
    TableConfig(name="item", num_embeddings=53, embedding_dim=DIM, features=("item", "candidate")),
    TableConfig(name="user", num_embeddings=7, embedding_dim=DIM, features=("user",)),
    # Fewer rows than ranks: with three ranks, row-wise leaves one of them an empty shard.
    TableConfig(name="gender", num_embeddings=2, embedding_dim=DIM, features=("gender",)),
)
OPTIMIZER = SparseOptimizerConfig(learning_rate=0.1)
EPS = 1e-8
SEED = 5
STEPS = 4
GLOBAL_SAMPLES = 6
LAYOUTS = ("row_wise", "table_wise", "mixed")


class Model(nn.Module):
    """A collection under a name, as in a real model."""

    def __init__(self) -> None:
        super().__init__()
        self.embeddings = build_embedding_collection(TABLES, device=torch.device("meta"))

    def forward(self, features: KeyedJaggedTensor) -> Any:
        return self.embeddings(features)


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
    return batch


def weights(feature: str, ids: Tensor, step: int) -> Tensor:
    """What the loss multiplies the embeddings of `ids` with; differs by feature, id, column and step."""
    columns = torch.arange(DIM, dtype=torch.float32)
    return torch.sin(ids[:, None] * 0.7 + columns * 0.3 + step + len(feature))


def oracle() -> tuple[dict[str, Tensor], dict[str, Tensor], list[dict[str, Tensor]]]:
    """(tables, row sums, embeddings a feature and step) of the unsharded model after `STEPS`."""
    collection = build_embedding_collection(TABLES, device=torch.device("cpu"))
    init_tables(collection, TABLES, SEED)
    tables = {name: module.weight.detach().clone() for name, module in collection.embeddings.items()}
    sums = {table.name: torch.zeros(table.num_embeddings) for table in TABLES}
    outputs = []
    for step in range(STEPS):
        batch = global_batch(step)
        leaves = {name: value.clone().requires_grad_() for name, value in tables.items()}
        embedded = {}
        loss = torch.zeros(())
        for table in TABLES:
            for feature in table.features:
                ids = torch.tensor([i for sample in batch[feature] for i in sample], dtype=torch.int64)
                embedded[feature] = leaves[table.name][ids]
                loss = loss + (embedded[feature] * weights(feature, ids, step)).sum()
        loss.backward()
        outputs.append({feature: value.detach() for feature, value in embedded.items()})
        for name, leaf in leaves.items():
            gradient = leaf.grad
            assert gradient is not None
            sums[name] += gradient.square().mean(dim=1)
            tables[name] -= OPTIMIZER.learning_rate * gradient / (sums[name].sqrt() + EPS)[:, None]
    return tables, sums, outputs


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
    plan, model = shard(layout, folder)
    result: dict[str, Any] = {"initial": local_parts(model), "outputs": []}
    rank, world_size = dist.get_rank(), dist.get_world_size()
    for step in range(STEPS):
        batch = global_batch(step)
        mine = {feature: samples[rank::world_size] for feature, samples in batch.items()}
        embedded = {key: value.values() for key, value in model(jagged(mine)).items()}
        # TorchRec averages table gradients over ranks; the sum is wanted.
        loss = sum(
            (embedded[feature] * weights(feature, flat(mine[feature]), step)).sum() for feature in embedded
        ) * float(world_size)
        loss.backward()
        lengths = {feature: [len(sample) for sample in samples] for feature, samples in mine.items()}
        result["outputs"].append(
            {feature: value.detach().split(lengths[feature]) for feature, value in embedded.items()}
        )
    result["final"] = local_parts(model)
    estimate = plan.ranks[rank]
    result["planned_bytes"] = (estimate.weight_bytes, estimate.optimizer_bytes)
    if save:
        dcp.save(state(model), checkpoint_id=folder / layout)
    return result


def reload(saved: str, layout: str, folder: Path) -> dict[str, Any]:
    """The state after loading what two ranks saved under another plan."""
    _, model = shard(layout, folder)
    dcp.load(state(model), checkpoint_id=folder / saved)
    return local_parts(model)


def shard(layout: str, folder: Path) -> tuple[Plan, DistributedModelParallel]:
    """The model sharded from a plan file that this rank wrote and read back."""
    world_size = dist.get_world_size()
    path = folder / f"plan-{layout}-{world_size}-{dist.get_rank()}.json"
    plan = make_plan(layout, world_size)
    write_plan(path, plan)
    plan = read_plan(path, tables=TABLES, machine=plan.machine)
    model = Model()
    apply_sparse_optimizer(model.embeddings, OPTIMIZER)
    sharded = DistributedModelParallel(
        model,
        device=torch.device("cpu"),
        plan=to_sharding_plan(plan, model),
        sharders=[EmbeddingCollectionSharder()],
    )
    init_tables(sharded, TABLES, SEED)
    return plan, sharded


def state(model: nn.Module) -> dict[str, Any]:
    """The flat state that a checkpoint stores."""
    return {
        **{f"tables/{name}": value for name, value in tables_state(model).items()},
        **{f"optimizer/{name}": value for name, value in optimizer_state(model).items()},
    }


def local_parts(model: nn.Module) -> dict[str, list[tuple[int, Tensor]]]:
    """(first row, rows) of every tensor of the state that this rank holds, empty shards left out."""
    return {
        name: [
            (part.metadata.shard_offsets[0], part.tensor.detach().clone())
            for part in value.local_shards()
            if part.tensor.numel()
        ]
        for name, value in state(model).items()
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
