"""Rows in host memory behind a cache on the GPU: what hits are worth, whether 10,000 steps go as without a cache, and
whether tables of twice the free memory train.

Run on a GPU: python -m benchmarks.caches [--machine MACHINE.json] [--json FILE] [--parts long-device hits ...]

`hits`: a table looked up by Zipf's law, whose hottest rows lie anywhere; the part of ids whose row lies in the cache as
a step begins, and the step's time beside that of all rows on the device and beside the planner's, which knows the law.
`long-device`, `long-cached`, `long-prefetched`: a small model through the trainer's pipeline from one seed, with its
rows on the device, cached, and cached with the next batch's rows brought in meanwhile, and an evaluation every 500
steps: the digests of their losses must be equal.  `step-...`: likewise a whole step whose dense part takes some ms and
whose ids a cache answers to 95%.  `large`: most memory is taken away, and a table of twice the rest is trained.
"""

import gc
import hashlib
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor
from torchrec.streamable import Pipelineable

from benchmarks.on_one_gpu import DEVICE, Part, one_rank, run_parts
from embeddings.config import ComputeKernel, PlacementConfig, TableConfig
from embeddings.lookups.caches import Caches
from embeddings.machine import Machine
from embeddings.measuring.trial import BAG_IDS, OPTIMIZER, Trial, median_ms
from embeddings.optimizers import TableOptimizers
from embeddings.planner import plan_tables
from embeddings.planning.frequencies import zipf
from embeddings.planning.problem import BatchLoad, Problem, reserve
from embeddings.planning.solver import solve
from embeddings.sharding import shard_tables
from embeddings.tables import Rows, build_tables, fbgemm_kernels, rows_by_feature
from pipelines.overlap import Overlap, StepPipeline
from trainer.determinism import make_deterministic

EXPONENTS = (None, 0.8, 1.0, 1.1, 1.3)
"""None: all rows alike."""
HITS_TABLE = TableConfig(name="item", num_embeddings=20_000_000, embedding_dim=128, features=("item",))
HITS_IDS, FILLING_STEPS = 2**18, 60


@dataclass(frozen=True, kw_only=True)
class Training:
    """A small model and its data."""

    table: TableConfig
    ids: int
    exponent: float
    """Exponent of Zipf's law, by which ids are drawn."""
    blocks: int
    """Blocks of the dense model."""
    batches: int
    """Different ones."""
    steps: int
    evaluated_every: int | None


LONG_TABLE = TableConfig(name="item", num_embeddings=2_000_000, embedding_dim=64, features=("item",))
LONG = Training(table=LONG_TABLE, ids=16_384, exponent=0.9, blocks=0, batches=256, steps=10_000, evaluated_every=500)
STEP = Training(table=HITS_TABLE, ids=HITS_IDS, exponent=1.1, blocks=8, batches=64, steps=300, evaluated_every=None)
WAYS: dict[str, tuple[ComputeKernel, Overlap]] = {
    "device": ("fused", "sparse_dist"),
    "cached": ("fused_uvm_caching", "sparse_dist"),
    "prefetched": ("fused_uvm_caching", "prefetch"),
}
FREE_GIB = 4.0
LARGE = Training(
    table=replace(LONG_TABLE, num_embeddings=int(2 * FREE_GIB * 2**30) // 512, embedding_dim=128),
    ids=16_384,
    exponent=0.9,
    blocks=0,
    batches=64,
    steps=200,
    evaluated_every=None,
)
WARM_STEPS = 100
_SPREAD = 7_368_787
"""A prime: the n-th hottest row is row n times it."""


class Draw:
    """Ids of a table by Zipf's law, on the device."""

    def __init__(self, rows: int, exponent: float | None) -> None:
        self._rows, self._ends = rows, None
        if exponent is not None:
            weights = torch.arange(1, rows + 1, dtype=torch.float64, device=DEVICE) ** -exponent
            self._ends = (weights / weights.sum()).cumsum(0)

    def __call__(self, ids: int, generator: torch.Generator) -> Tensor:
        """[ids] int64."""
        if self._ends is None:
            return torch.randint(0, self._rows, (ids,), generator=generator, device=DEVICE)
        drawn = torch.rand(ids, generator=generator, device=DEVICE, dtype=torch.float64)
        place = torch.searchsorted(self._ends, drawn).clamp(max=self._rows - 1)
        return place * _SPREAD % self._rows


def bags(ids: Tensor) -> KeyedJaggedTensor:
    """The ids of the one feature, in bags."""
    return KeyedJaggedTensor(["item"], ids, lengths=torch.full((len(ids) // BAG_IDS,), BAG_IDS, device=ids.device))


class ZipfTrial(Trial):
    """A trial of one table that is looked up by a law."""

    law = Draw(1, None)

    def draw(self) -> KeyedJaggedTensor:
        """By the law."""
        return bags(self.law(self._ids, self._generator) % self._tables[0].num_embeddings)

    def found(self) -> float:
        """Part of the coming step's ids whose row lies in the cache."""
        (kernel,) = fbgemm_kernels(self._collections[0])
        ids, state, rows = self.batch.values(), kernel.lxu_cache_state, kernel.total_cache_hash_size
        return float((torch.ops.fbgemm.lxu_cache_lookup(ids, state, rows) >= 0).double().mean())


def hits(machine: Machine) -> Iterator[tuple[str, Any]]:
    """Times of a step by law, cached and not, measured and planned."""
    rows = HITS_TABLE.num_embeddings
    results: dict[str, dict[str, float]] = {}
    kernels: tuple[ComputeKernel, ...] = ("fused", "fused_uvm_caching")
    for kernel in kernels:
        placed = PlacementConfig(compute_kernels=(kernel,), reserved_fraction=0.0)
        trial = ZipfTrial([HITS_TABLE], HITS_IDS, machine=machine, placement=placed, rank=0)
        for exponent in EXPONENTS:
            name = "all alike" if exponent is None else f"Zipf {exponent:g}"
            row = results.setdefault(name, {})
            trial.law = Draw(rows, exponent)
            # Until the cache holds what the law says.
            for _ in range(0 if kernel == "fused" else FILLING_STEPS):
                trial.exchange()
                trial.step()
            row[f"{kernel}_ms"] = median_ms(trial.step, DEVICE, prepare=trial.exchange)
            frequencies = {} if exponent is None else {"item": zipf(rows, exponent)}
            load = replace(trial.plan.load, frequencies=frequencies)
            row[f"{kernel}_planned_ms"] = planned(machine, placed, load)
            if kernel == "fused_uvm_caching":
                trial.exchange()
                row["found"] = trial.found()
                row["planned_hits"] = load.hit_rate("item", rows, placed.cached_part)
            yield name, row
        del trial
        gc.collect()
        torch.cuda.empty_cache()


def planned(machine: Machine, placed: PlacementConfig, load: BatchLoad) -> float:
    """Milliseconds of a step by the planner."""
    problem = Problem(
        tables=(HITS_TABLE,),
        machine=machine,
        placement=placed,
        optimizer=OPTIMIZER,
        load=load,
        reservation=reserve(machine, placed, dense_bytes=0),
    )
    return solve(problem).step_ms


class Batch(Pipelineable):
    """Ids as a pipeline takes them."""

    def __init__(self, features: KeyedJaggedTensor) -> None:
        self.features = features

    def to(self, device: torch.device, non_blocking: bool = False) -> "Batch":
        """On the device."""
        return Batch(self.features.to(device, non_blocking=non_blocking))

    def record_stream(self, stream: torch.Stream) -> None:
        """As the features."""
        self.features.record_stream(stream)

    def pin_memory(self) -> "Batch":
        """In pinned memory."""
        return Batch(self.features.pin_memory())


class Tower(nn.Module):
    """Some dense work on the rows."""

    def __init__(self, dim: int, blocks: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(dim, 8 * dim), nn.SiLU(), nn.Linear(8 * dim, dim)) for _ in range(blocks)
        )
        self.layers = nn.Sequential(nn.Linear(dim, 128), nn.SiLU(), nn.Linear(128, 1))

    def forward(self, looked_up: list[Rows], batch: Batch) -> Tensor:
        """What it lacks of knowing a number of each row."""
        rows = rows_by_feature(looked_up)["item"].values()
        for block in self.blocks:
            with torch.autocast("cuda", torch.bfloat16):
                rows = rows + block(rows)
        wanted = torch.sin(batch.features.values().float())
        loss: Tensor = (self.layers(rows.float()).squeeze(-1) - wanted).square().mean()
        return loss


class Model(nn.Module):
    """A table and the tower."""

    def __init__(self, training: Training) -> None:
        super().__init__()
        self.tables = build_tables([training.table], device=torch.device("meta"))
        self.tower = Tower(training.table.embedding_dim, training.blocks)

    def forward(self, batch: Batch) -> Tensor:
        loss: Tensor = self.tower(self.tables(batch.features), batch)
        return loss


class Both:
    """The optimizers of tower and table."""

    def __init__(self, dense: torch.optim.Optimizer, tables: TableOptimizers) -> None:
        self.parts = (dense, tables)

    def zero_grad(self) -> None:
        """Forget the gradients of dense model and tables."""
        for part in self.parts:
            part.zero_grad()

    def step(self) -> None:
        """Update dense model and tables."""
        for part in self.parts:
            part.step()


class Run:
    """The model on this GPU, in the trainer's pipeline."""

    def __init__(self, training: Training, kernel: ComputeKernel, overlap: Overlap) -> None:
        self.training, table = training, training.table
        model = Model(training)
        plan = plan_tables(
            model,
            [table],
            machine=one_rank(),
            placement=PlacementConfig(compute_kernels=(kernel,), reserved_fraction=0.0),
            optimizer=OPTIMIZER,
            load=BatchLoad(samples_per_rank=1, ids_per_sample={"item": float(training.ids)}),
        )
        model.tower.to(DEVICE)
        self.module, optimizers = shard_tables(
            model, plan, optimizer=OPTIMIZER, device=DEVICE, seed=0, prefetch=overlap == "prefetch"
        )
        both = Both(torch.optim.SGD(model.tower.parameters(), lr=0.01), optimizers)
        self.pipeline = StepPipeline(overlap, self.module, both, DEVICE, self._forward)
        self.caches = Caches(model.tables)
        self.planned_gib = plan.ranks[0].memory_bytes / 2**30

    def _forward(self, batch: Batch) -> tuple[Tensor, Tensor]:
        loss: Tensor = self.module(batch)
        return loss, loss.detach()

    def evaluate(self) -> Tensor:
        """The loss of other ids."""
        other = Batch(bags(torch.arange(2**14, device=DEVICE) * 113 % self.training.table.num_embeddings))
        self.module.eval()
        with torch.no_grad(), self.caches.undisturbed():
            loss: Tensor = self.module(other)
        self.module.train()
        return loss

    def losses(self, drawn: list[Batch]) -> tuple[Tensor, float]:
        """(losses of every step and evaluation, ms of a step without those before it is warm)."""
        batches = in_turn(drawn, self.training.steps)
        every, losses, start = self.training.evaluated_every, [], 0.0
        evaluations: list[Tensor] = []
        while True:
            try:
                losses.append(self.pipeline.step(batches))
            except StopIteration:
                break
            if len(losses) == WARM_STEPS:
                torch.cuda.synchronize()
                start = time.perf_counter()
            if every is not None and len(losses) % every == 0:
                self.pipeline.outside(lambda: evaluations.append(self.evaluate()))
        torch.cuda.synchronize()
        ms = (time.perf_counter() - start) * 1000 / (len(losses) - WARM_STEPS)
        return torch.stack(losses + evaluations).cpu(), ms


def drawn_batches(training: Training) -> list[Batch]:
    """Some batches of ids by Zipf's law, in pinned host memory."""
    draw = Draw(training.table.num_embeddings, training.exponent)
    generator = torch.Generator(DEVICE).manual_seed(1)
    return [Batch(bags(draw(training.ids, generator).cpu())).pin_memory() for _ in range(training.batches)]


def in_turn(batches: list[Batch], steps: int) -> Iterator[Batch]:
    """Batches in turn, in another order each time."""
    return (batches[step * (1 + 2 * (step // len(batches))) % len(batches)] for step in range(steps))


def trained(machine: Machine, *, training: Training, way: str) -> Iterator[tuple[str, Any]]:
    """The losses of all steps in one way, as a digest, and the time of a step."""
    del machine
    # As the trainer does: else FBGEMM adds up the gradients of a row that a batch looks up 1,025 times in any order.
    make_deterministic()
    losses, ms = Run(training, *WAYS[way]).losses(drawn_batches(training))
    yield "steps", training.steps
    yield "step_ms", ms
    yield "finite", bool(losses.isfinite().all())
    yield "last_loss", losses[training.steps - 1].item()
    yield "losses", hashlib.sha256(losses.numpy().tobytes()).hexdigest()
    known = zipf(training.table.num_embeddings, training.exponent)
    yield "planned_hits", known.hit_rate(PlacementConfig().cached_part * training.table.num_embeddings)


def large(machine: Machine) -> Iterator[tuple[str, Any]]:
    """A table of twice the memory that is left, and what was planned and held of it."""
    del machine
    drawn = drawn_batches(LARGE)
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info()
    ballast = torch.empty(int(free - FREE_GIB * 2**30), dtype=torch.uint8, device=DEVICE)
    held = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run = Run(LARGE, *WAYS["prefetched"])
    losses, _ = run.losses(drawn)
    yield "free_gib", FREE_GIB
    yield "table_gib", LARGE.table.weight_bytes / 2**30
    yield "steps", LARGE.steps
    yield "finite", bool(losses.isfinite().all())
    yield "planned_gib", run.planned_gib
    yield "peak_gib", (torch.cuda.max_memory_allocated() - held) / 2**30
    del ballast


PARTS: dict[str, Part] = {
    **{f"long-{way}": partial(trained, training=LONG, way=way) for way in WAYS},
    "large": large,
    "hits": hits,
    **{f"step-{way}": partial(trained, training=STEP, way=way) for way in WAYS},
}


if __name__ == "__main__":
    run_parts(__doc__, PARTS, Path("benchmarks/results/caches.json"))
