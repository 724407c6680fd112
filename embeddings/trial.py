"""Tables on the ranks of a job, looked up and updated step by step: what the probe and the benchmarks time."""

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torchrec.distributed.embedding import EmbeddingCollectionSharder
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from embeddings.config import PlacementConfig, SparseOptimizerConfig, TableConfig
from embeddings.machine import Machine
from embeddings.optimizers import TableOptimizers, attach_optimizers
from embeddings.planner import plan_tables
from embeddings.problem import BatchLoad
from embeddings.sharding import apply_plan
from embeddings.tables import build_tables, init_tables, rows_by_feature

BAG_IDS = 32
"""Ids of a bag, as the trainer packs them."""
OPTIMIZER = SparseOptimizerConfig()
BATCHES = 8
"""Batches that take turns, so that a cache of rows is not measured on the ids that it has just read."""


class _Model(nn.Module):
    def __init__(self, tables: Sequence[TableConfig]) -> None:
        super().__init__()
        self.tables = build_tables(tables, device=torch.device("meta"))

    def forward(self, features: KeyedJaggedTensor) -> Any:
        return self.tables(features)


class Trial:
    """Tables with one feature each, placed by the planner on the ranks of the process group, and a step of them.

    Tables are sharded, not replicated: allow a kind that is.
    """

    def __init__(
        self, tables: Sequence[TableConfig], ids: int, *, machine: Machine, placement: PlacementConfig, rank: int
    ) -> None:
        """`ids` is how many ids this rank looks up in each table, a multiple of `BAG_IDS`.

        Raises:
            ValueError: the tables do not fit.
        """
        device = torch.device(machine.compute_device)
        load = BatchLoad(samples_per_rank=1, ids_per_sample={table.features[0]: float(ids) for table in tables})
        model = _Model(tables)
        self.plan = plan_tables(model, tables, machine=machine, placement=placement, optimizer=OPTIMIZER, load=load)
        sharding_plan = apply_plan(model, self.plan, device=device)
        attach_optimizers(model.tables, OPTIMIZER)
        self._model = DistributedModelParallel(
            model, device=device, plan=sharding_plan, sharders=[EmbeddingCollectionSharder()], init_data_parallel=False
        )
        init_tables(model.tables, seed=0)
        self._optimizers = TableOptimizers(model.tables, OPTIMIZER, self._model.fused_optimizer)
        generator = torch.Generator().manual_seed(rank)
        self.batches = [random_ids(tables, ids, generator).to(device) for _ in range(BATCHES)]
        self._gradients = [torch.randn(ids, table.embedding_dim, device=device) for table in tables]
        self._features = [table.features[0] for table in tables]
        self._number = 0

    def step(self) -> None:
        """Lookup, backward pass and update of the next batch, by all ranks."""
        self._optimizers.zero_grad()
        rows = rows_by_feature(self._model(self.batches[self._number % BATCHES]))
        torch.autograd.backward([rows[feature].values() for feature in self._features], self._gradients)
        self._optimizers.step()
        self._number += 1


def random_ids(tables: Sequence[TableConfig], ids: int, generator: torch.Generator) -> KeyedJaggedTensor:
    """Uniform ids of each table's first feature, in bags."""
    values = [torch.randint(0, table.num_embeddings, (ids,), generator=generator) for table in tables]
    lengths = torch.full((len(tables) * ids // BAG_IDS,), BAG_IDS, dtype=torch.int64)
    return KeyedJaggedTensor([table.features[0] for table in tables], torch.cat(values), lengths=lengths)


def median_ms(step: Callable[[], object], device: torch.device, *, rounds: int = 16) -> float:
    """Median time of a step, of the slowest rank; the first rounds (compilation, a cold cache) are left out."""
    times = []
    for _ in range(BATCHES + rounds):
        _wait(device)
        start = time.perf_counter()
        step()
        _wait(device)
        times.append((time.perf_counter() - start) * 1000)
    slowest: Tensor = torch.tensor(statistics.median(times[BATCHES:]), device=device)
    dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
    return slowest.item()


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()
