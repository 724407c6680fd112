"""Tables on the ranks of a job, looked up and updated step by step: what the probe and the benchmarks time."""

import math
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from embeddings.config import PlacementConfig, SparseOptimizerConfig, TableConfig
from embeddings.machine import Machine
from embeddings.planner import plan_tables
from embeddings.planning.problem import BatchLoad
from embeddings.sharding import shard_tables
from embeddings.tables import Rows, build_tables, rows_by_feature

BAG_IDS = 32
"""Ids of a bag, as the trainer packs them."""
OPTIMIZER = SparseOptimizerConfig()
WARM_STEPS = 8
"""Steps before those that are timed: compilation, a cache that fills."""
TIMED_STEPS = 16
_HEAD_START_CYCLES = 20_000_000
"""Cycles of the GPU, some 10 ms, in which its host launches a whole step, so that the GPU then does not wait for its
host."""


class TablesAlone(nn.Module):
    """A model of nothing but tables, whose rows it returns."""

    def __init__(self, tables: Sequence[TableConfig]) -> None:
        super().__init__()
        self.tables = build_tables(tables, device=torch.device("meta"))

    def forward(self, features: KeyedJaggedTensor) -> list[Rows]:
        looked_up: list[Rows] = self.tables(features)
        return looked_up


class Trial:
    """Tables with one feature each, placed by the planner on the ranks of the process group, and a step of them.

    As in the trainer's pipeline, the ids of a step are drawn and exchanged before it.  Every step has new ids, so that
    a cache of rows is not measured on those that it has just read.  Tables are sharded, not replicated: allow a kind
    that is.
    """

    def __init__(
        self,
        tables: Sequence[TableConfig],
        ids: int,
        *,
        machine: Machine,
        placement: PlacementConfig,
        rank: int,
        hot_rows: int | None = None,
    ) -> None:
        """`ids` is how many ids this rank looks up in each table, a multiple of `BAG_IDS`, among its first `hot_rows`.

        Raises:
            ValueError: the tables do not fit.
        """
        device = torch.device(machine.compute_device)
        load = BatchLoad(
            samples_per_rank=1,
            ids_per_sample={table.features[0]: float(ids) for table in tables},
            distinct={table.name: distinct_part(ids, hot_rows or table.num_embeddings) for table in tables},
        )
        model = TablesAlone(tables)
        self.plan = plan_tables(model, tables, machine=machine, placement=placement, optimizer=OPTIMIZER, load=load)
        self._model, self._optimizers = shard_tables(model, self.plan, optimizer=OPTIMIZER, device=device, seed=0)
        self._collections = list(model.tables.collections)
        self._generator = torch.Generator(device).manual_seed(rank)
        self._gradients = [torch.randn(ids, table.embedding_dim, device=device) for table in tables]
        self._tables, self._ids, self._hot_rows = tuple(tables), ids, hot_rows
        self.exchange()

    def exchange(self) -> None:
        """Draw the ids of the next step and bring them to the ranks that hold their rows."""
        self.batch = self.draw()
        contexts = [collection.create_context() for collection in self._collections]
        self._inputs = [
            (context, collection.input_dist(context, self.batch).wait().wait())
            for collection, context in zip(self._collections, contexts, strict=True)
        ]

    def draw(self) -> KeyedJaggedTensor:
        """The ids of a step: uniform, in each table."""
        return random_ids(self._tables, self._ids, self._generator, hot_rows=self._hot_rows)

    def step(self) -> None:
        """Lookup, exchange of rows, backward pass and update, by all ranks."""
        self._optimizers.zero_grad()
        looked_up = [
            collection.compute_and_output_dist(context, ids)
            for collection, (context, ids) in zip(self._collections, self._inputs, strict=True)
        ]
        rows = rows_by_feature(looked_up)
        torch.autograd.backward([rows[table.features[0]].values() for table in self._tables], self._gradients)
        self._optimizers.step()


def distinct_part(ids: int, rows: int) -> float:
    """Part of so many uniform ids of `rows` that is expected to be distinct.

    >>> distinct_part(2, 1), distinct_part(1, 10), round(distinct_part(1000, 1000), 3)
    (0.5, 1.0, 0.632)
    """
    return min(1.0, -math.expm1(ids * math.log1p(-1 / rows)) * rows / ids) if rows > 1 else 1 / ids


def random_ids(
    tables: Sequence[TableConfig], ids: int, generator: torch.Generator, *, hot_rows: int | None = None
) -> KeyedJaggedTensor:
    """Uniform ids of each table's first feature, in bags, on the generator's device; of all rows or the first ones."""
    device = generator.device
    rows = [table.num_embeddings if hot_rows is None else hot_rows for table in tables]
    values = [torch.randint(0, count, (ids,), generator=generator, device=device) for count in rows]
    lengths = torch.full((len(tables) * ids // BAG_IDS,), BAG_IDS, dtype=torch.int64, device=device)
    return KeyedJaggedTensor([table.features[0] for table in tables], torch.cat(values), lengths=lengths)


def median_ms(
    step: Callable[[], object],
    device: torch.device,
    *,
    prepare: Callable[[], object] = lambda: None,
) -> float:
    """Median milliseconds of a step, of the slowest rank; `prepare` is called before each and not timed.

    On a GPU the time that the GPU takes for what the step asks of it: in training its host runs ahead.
    """
    times = []
    for number in range(WARM_STEPS + TIMED_STEPS):
        prepare()
        took = _gpu_ms(step) if device.type == "cuda" else _cpu_ms(step)
        if number >= WARM_STEPS:
            times.append(took)
    slowest: Tensor = torch.tensor(statistics.median(times), device=device)
    dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
    return slowest.item()


def _gpu_ms(step: Callable[[], object]) -> float:
    # Any: these of torch's functions have no types.
    cuda: Any = torch.cuda
    start, end = cuda.Event(enable_timing=True), cuda.Event(enable_timing=True)
    cuda.synchronize()
    cuda._sleep(_HEAD_START_CYCLES)
    start.record()
    step()
    end.record()
    cuda.synchronize()
    return float(start.elapsed_time(end))


def _cpu_ms(step: Callable[[], object]) -> float:
    start = time.perf_counter()
    step()
    return (time.perf_counter() - start) * 1000
