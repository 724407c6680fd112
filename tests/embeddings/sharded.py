"""What each rank of the sharded tests does: shard from a plan file, train, checkpoint, reshard.  Also the oracle.

The oracle is plain PyTorch: whole tables, autograd's dense gradients and row-wise Adagrad written out.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed._shard.sharded_tensor.api import ShardedTensor
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from embeddings.config import ExchangeConfig, PlacementConfig, SparseOptimizerConfig, TableConfig, TableConstraint
from embeddings.machine import Machine
from embeddings.optimizers import TableOptimizers
from embeddings.plan import Plan
from embeddings.planner import problem_of
from embeddings.planning.plan_file import read_plan, write_plan
from embeddings.planning.problem import BatchLoad, Problem
from embeddings.planning.solver import solve
from embeddings.sharding import shard_tables
from embeddings.tables import Tables, build_tables, init_tables, is_sharded, rows_by_feature, table_weights
from trainer.parallel.averaging import GradientAverage

TABLES = (
    TableConfig(name="item", num_embeddings=53, embedding_dim=8, features=("item", "candidate")),
    TableConfig(name="user", num_embeddings=7, embedding_dim=8, features=("user",)),
    # Fewer rows than ranks: with three ranks, row-wise leaves one of them an empty shard.
    TableConfig(name="gender", num_embeddings=2, embedding_dim=8, features=("gender",)),
    # Of other widths and types, with optimizers of their own.
    TableConfig(
        name="tag",
        num_embeddings=11,
        embedding_dim=64,
        features=("tag",),
        optimizer=SparseOptimizerConfig(kind="adagrad", learning_rate=0.3),
    ),
    TableConfig(
        name="city",
        num_embeddings=7,
        embedding_dim=64,
        features=("city",),
        optimizer=SparseOptimizerConfig(kind="sgd", learning_rate=0.2),
    ),
    TableConfig(name="brand", num_embeddings=13, embedding_dim=4, features=("brand",), dtype="float16"),
    # Summed where its rows lie; as wide as the tags', which are not.  Row-wise, one of four ranks has no row of it.
    TableConfig(
        name="word",
        num_embeddings=5,
        embedding_dim=64,
        features=("title", "query"),
        optimizer=SparseOptimizerConfig(kind="adagrad", learning_rate=0.1),
        pooled="sample",
    ),
)
POOLED = tuple(feature for table in TABLES if table.pooled for feature in table.features)
OPTIMIZER = SparseOptimizerConfig(learning_rate=0.1)
EPS = 1e-8
SEED = 5
STEPS = 5
GLOBAL_SAMPLES = 11
"""One rank has more of them than another."""
IN_FULL = ExchangeConfig()
LAYOUTS = ("row_wise", "table_wise", "mixed", "replicated", "column_wise")
ON_NODES = ("table_row_wise", "grid_shard")
"""Kinds of pooled tables, layouts of two nodes of two ranks; tables that are not pooled are row-wise there."""
TRAINED_BY = {1: LAYOUTS, 2: LAYOUTS, 3: LAYOUTS, 4: (*LAYOUTS, *ON_NODES)}
"""By number of ranks."""
LOADED_BY = {1: LAYOUTS, 2: (), 3: LAYOUTS, 4: ON_NODES}
"""Into which layouts so many ranks load everything that was saved."""
SAVED_BY = dict.fromkeys(LAYOUTS, 2) | dict.fromkeys(ON_NODES, 4)
"""Ranks that save a layout, first two, then four."""


class Model(nn.Module):
    """Tables under a name, as in a real model."""

    def __init__(self, configs: Sequence[TableConfig] = TABLES) -> None:
        super().__init__()
        self.tables = build_tables(configs, device=torch.device("meta"))

    def forward(self, features: KeyedJaggedTensor) -> Any:
        return self.tables(features, {POOLED: features})


def make_problem(
    layout: str, world_size: int, tables: Sequence[TableConfig] = TABLES, exchange: ExchangeConfig = IN_FULL
) -> Problem:
    """Every table in the layout's kind, as far as it can be; mixed is row-wise for the item table, others whole; nodes
    has the last table in both, another on one."""
    kinds = {}
    for table in tables:
        kind = layout
        if layout == "mixed":
            kind = "row_wise" if table.name == "item" else "table_wise"
        elif layout == "nodes":
            kind = "grid_shard" if table is tables[-1] else "table_row_wise"
        elif layout in ON_NODES and not table.pooled:
            kind = "row_wise"
        elif layout == "replicated" and (world_size == 1 or table.dtype == "float16"):
            kind = "table_wise"
        elif layout == "column_wise" and (world_size == 1 or table.embedding_dim < 64):
            # Of each width one is left that is sharded otherwise.
            kind = "replicated" if world_size > 1 and table.name == "user" else "table_wise"
        kinds[table.name] = TableConstraint(sharding_types=(kind,))
    return problem_of(
        Model(tables),
        tables,
        machine=Machine(
            world_size=world_size,
            local_world_size=2 if layout in (*ON_NODES, "nodes") else world_size,
            compute_device="cpu",
        ),
        placement=PlacementConfig(tables=kinds, exchange=exchange),
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
    """What the loss multiplies the embeddings of `ids`, or the sums of samples, with; differs by all of them, column
    and step."""
    dim = next(table.embedding_dim for table in TABLES if feature in table.features)
    columns = torch.arange(dim, dtype=torch.float32)
    return torch.sin(ids[:, None] * 0.7 + columns * 0.3 + step + len(feature))


def oracle(tables: Sequence[TableConfig] = TABLES) -> tuple[dict[str, Tensor], list[dict[str, Tensor]]]:
    """(state under the checkpoint's names, embeddings a feature and step) of the unsharded model after `STEPS`."""
    unsharded = build_tables(tables, device=torch.device("cpu"))
    init_tables(unsharded, SEED)
    rows = {name: value.clone() for name, value in table_weights(unsharded).items()}
    sums: dict[str, Tensor] = {}
    outputs = []
    for step in range(STEPS):
        batch = global_batch(step)
        leaves = {name: value.float().requires_grad_() for name, value in rows.items()}
        embedded = {}
        loss = torch.zeros(())
        for table in tables:
            for feature in table.features:
                ids = flat(batch[feature])
                embedded[feature] = leaves[table.name][ids]
                if feature in POOLED:
                    ids = torch.arange(GLOBAL_SAMPLES)
                    bags = [leaves[table.name][sample].sum(0) for sample in batch[feature]]
                    embedded[feature] = torch.stack(bags)
                loss = loss + (embedded[feature] * weights(feature, ids, step)).sum()
        loss.backward()
        outputs.append({feature: value.detach() for feature, value in embedded.items()})
        for table in tables:
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


def run_rank(folder: str) -> dict[str, Any]:
    """Train each layout, save some, and load every saved one into some; returns this rank's parts."""
    ranks = dist.get_world_size()
    results: dict[str, Any] = {
        layout: train(layout, Path(folder), save=SAVED_BY[layout] == ranks) for layout in TRAINED_BY[ranks]
    }
    return results | {
        f"{saved}->{layout}": reload(saved, layout, Path(folder)) for layout in LOADED_BY[ranks] for saved in SAVED_BY
    }


def train(
    layout: str,
    folder: Path,
    *,
    save: bool = False,
    configs: Sequence[TableConfig] = TABLES,
    exchange: ExchangeConfig = IN_FULL,
) -> dict[str, Any]:
    """Initial values, outputs of each step and final state of one layout, as this rank holds them."""
    plan, model, optimizers = shard(layout, folder, configs, exchange)
    tables, average = tables_of(model), averaged(model)
    result: dict[str, Any] = {"initial": local_parts(tables, optimizers), "outputs": []}
    rank, world_size = dist.get_rank(), dist.get_world_size()
    for step in range(STEPS):
        batch = global_batch(step)
        mine = {feature: samples[rank::world_size] for feature, samples in batch.items()}
        told = {feature: flat(samples) for feature, samples in mine.items()}
        told |= dict.fromkeys(POOLED, torch.arange(GLOBAL_SAMPLES)[rank::world_size])
        optimizers.zero_grad()
        embedded = {key: value.values() for key, value in rows_by_feature(model(jagged(mine))).items()}
        # Gradients of tables are averaged over ranks; the sum is wanted.
        loss = sum((embedded[feature] * weights(feature, told[feature], step)).sum() for feature in embedded) * float(
            world_size
        )
        loss.backward()
        average()
        optimizers.step()
        lengths = {feature: [len(sample) for sample in samples] for feature, samples in mine.items()}
        lengths |= {feature: [1] * len(mine[feature]) for feature in POOLED}
        result["outputs"].append(
            {feature: value.detach().split(lengths[feature]) for feature, value in embedded.items()}
        )
    result["final"] = local_parts(tables, optimizers)
    estimate = plan.ranks[rank]
    result["planned_bytes"] = (estimate.weight_bytes, estimate.optimizer_bytes)
    if save:
        dcp.save(state(tables, optimizers), checkpoint_id=folder / layout)
    return result


def reload(saved: str, layout: str, folder: Path, configs: Sequence[TableConfig] = TABLES) -> dict[str, Any]:
    """The state after loading what was saved under another plan."""
    _, model, optimizers = shard(layout, folder, configs)
    dcp.load(state(tables_of(model), optimizers), checkpoint_id=folder / saved)
    return local_parts(tables_of(model), optimizers)


def shard(
    layout: str, folder: Path, configs: Sequence[TableConfig] = TABLES, exchange: ExchangeConfig = IN_FULL
) -> tuple[Plan, DistributedModelParallel, TableOptimizers]:
    """The model sharded from a plan file that this rank wrote and read back."""
    world_size = dist.get_world_size()
    path = folder / f"plan-{layout}-{world_size}-{dist.get_rank()}.json"
    problem = make_problem(layout, world_size, configs, exchange)
    write_plan(path, solve(problem))
    plan = read_plan(path, problem)
    model = Model(configs)
    module, optimizers = shard_tables(model, plan, optimizer=OPTIMIZER, device=torch.device("cpu"), seed=SEED)
    return plan, module, optimizers


def averaged(module: nn.Module) -> Callable[[], None]:
    """Averages gradients over ranks: those of replicated tables, and of a dense model."""
    parts = [each for each in tables_of(module).collections if is_sharded(each)]
    sharded = {id(parameter) for part in parts for parameter in part.parameters()}
    alike = [each for each in module.parameters() if id(each) not in sharded and each.requires_grad]
    return GradientAverage(alike, dist.get_world_size()) if alike else lambda: None


def tables_of(model: nn.Module) -> Tables:
    """The tables inside of what TorchRec wrapped."""
    (tables,) = (module for module in model.modules() if isinstance(module, Tables))
    return tables


def state(tables: Tables, optimizers: TableOptimizers) -> dict[str, Any]:
    """The flat state that a checkpoint stores."""
    return {
        **{f"tables/{name}": value for name, value in table_weights(tables).items()},
        **{f"optimizer/{name}": value for name, value in optimizers.state().items()},
    }


Part = tuple[list[int], Tensor]
"""(first row, and column where there are columns; values) of a part of a tensor."""


def local_parts(tables: Tables, optimizers: TableOptimizers) -> dict[str, list[Part]]:
    """Every part of the state's tensors that this rank holds, empty shards left out."""
    parts: dict[str, list[Part]] = {}
    for name, value in state(tables, optimizers).items():
        if isinstance(value, ShardedTensor):
            shards = [(shard.metadata.shard_offsets, shard.tensor) for shard in value.local_shards()]
        else:
            shards = [([0] * value.dim(), value)]
        parts[name] = [(offset, tensor.detach().clone()) for offset, tensor in shards if tensor.numel()]
    return parts


def whole(parts_of_ranks: Sequence[dict[str, list[Part]]]) -> dict[str, Tensor]:
    """Whole tensors from the parts of all ranks; every value must be there, and the same where it is twice."""
    parts: dict[str, list[Part]] = {}
    for rank in parts_of_ranks:
        for name, pieces in rank.items():
            parts.setdefault(name, []).extend(pieces)
    tensors = {}
    for name, pieces in parts.items():
        ends = [[first + size for first, size in zip(offset, values.shape, strict=True)] for offset, values in pieces]
        tensor = torch.zeros([max(sizes) for sizes in zip(*ends, strict=True)], dtype=pieces[0][1].dtype)
        there = torch.zeros(tensor.shape, dtype=torch.bool)
        for (offset, values), end in zip(pieces, ends, strict=True):
            place = tuple(slice(first, last) for first, last in zip(offset, end, strict=True))
            assert not there[place].any() or torch.equal(tensor[place], values.cpu()), name
            tensor[place], there[place] = values.cpu(), True
        assert there.all() and not tensor.isnan().any(), name
        tensors[name] = tensor
    return tensors


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
