"""TorchRec's train pipeline finds every collection of `Tables` and computes what plain steps do."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torchrec.distributed.train_pipeline import TrainPipelineSparseDist
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor
from torchrec.streamable import Pipelineable

from embeddings.optimizers import TableOptimizers
from embeddings.planning.solver import solve
from embeddings.sharding import shard_tables
from embeddings.tables import Rows, rows_by_feature
from tests.embeddings import sharded
from tests.support.distributed import run_ranks

LAYOUTS = {"row_wise": 4, "mixed": 4, "replicated": 1, "column_wise": 4}
"""Collections that are sharded under each; the others are ordinary modules."""


class Batch(Pipelineable):
    """Features as a model's batch holds them."""

    def __init__(self, features: KeyedJaggedTensor) -> None:
        self.features = features
        self.bags = {sharded.POOLED: features}

    def to(self, device: torch.device, non_blocking: bool = False) -> "Batch":
        return Batch(self.features.to(device, non_blocking=non_blocking))

    def record_stream(self, stream: torch.Stream) -> None:
        self.features.record_stream(stream)


class Tower(nn.Module):
    """Some dense model: a line a feature."""

    def __init__(self) -> None:
        super().__init__()
        dims = {feature: table.embedding_dim for table in sharded.TABLES for feature in table.features}
        torch.manual_seed(0)
        self.lines = nn.ModuleDict({feature: nn.Linear(dim, 1) for feature, dim in dims.items()})

    def forward(self, looked_up: list[Rows]) -> tuple[Tensor, Tensor]:
        rows = rows_by_feature(looked_up)
        loss = torch.stack([line(rows[feature].values()).square().sum() for feature, line in self.lines.items()]).sum()
        return loss, loss.detach()


class Model(sharded.Model):
    """Tables and tower, as the trainer's models are made."""

    def __init__(self) -> None:
        super().__init__()
        self.tower = Tower()

    def forward(self, batch: Batch) -> Any:
        return self.tower(self.tables(batch.features, batch.bags))


class Both:
    """The optimizers of tower and tables as a pipeline takes them."""

    def __init__(self, dense: torch.optim.Optimizer, tables: TableOptimizers, average: Callable[[], None]) -> None:
        self.dense, self.tables, self.average = dense, tables, average

    def zero_grad(self) -> None:
        self.dense.zero_grad()
        self.tables.zero_grad()

    def step(self) -> None:
        self.average()
        self.dense.step()
        self.tables.step()


def losses(layout: str, pipelined: bool) -> tuple[list[float], dict[str, Any], int]:
    """(loss of each step, this rank's state after them, collections that the pipeline found) under a layout."""
    model = Model()
    plan = solve(sharded.make_problem(layout, dist.get_world_size()))
    device, seed = torch.device("cpu"), sharded.SEED
    module, tables = shard_tables(model, plan, optimizer=sharded.OPTIMIZER, device=device, seed=seed)
    both = Both(torch.optim.SGD(model.tower.parameters(), lr=0.01), tables, sharded.averaged(module))
    rank, size = dist.get_rank(), dist.get_world_size()
    batches = iter(
        Batch(sharded.jagged({name: samples[rank::size] for name, samples in sharded.global_batch(step).items()}))
        for step in range(sharded.STEPS)
    )
    pipeline = TrainPipelineSparseDist(module, both, torch.device("cpu"), execute_all_batches=True)
    values = []
    for _ in range(sharded.STEPS):
        if pipelined:
            values.append(float(pipeline.progress(batches)))
            continue
        both.zero_grad()
        loss, output = module(next(batches))
        loss.backward()
        both.step()
        values.append(float(output))
    return values, sharded.local_parts(model.tables, tables), len(pipeline._pipelined_modules)


def run_rank(folder: Path) -> dict[str, Any]:
    """Both ways under two layouts."""
    return {layout: [losses(layout, pipelined) for pipelined in (False, True)] for layout in LAYOUTS}


@pytest.mark.filterwarnings("ignore")  # TorchRec and FBGEMM warn about types of their own
def test_pipeline_finds_every_collection_and_computes_what_plain_steps_do(tmp_path: Path) -> None:
    for results in run_ranks(2, run_rank, tmp_path):
        for layout, (plain, pipelined) in results.items():
            assert pipelined[2] == LAYOUTS[layout]
            assert pipelined[0] == plain[0]
            for name, parts in plain[1].items():
                for (first, rows), (other_first, other) in zip(parts, pipelined[1][name], strict=True):
                    assert first == other_first and torch.equal(rows, other)
