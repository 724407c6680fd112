"""Rows in host memory behind a cache on the GPU: what hits are worth, whether 10,000 steps go as without a cache, and
whether tables of twice the free memory train.

Run on a GPU: python -m benchmarks.caches [--machine MACHINE.json] [--json FILE] [--parts long large hits]

`hits`: a table looked up by Zipf's law, whose hottest rows lie anywhere; the part of ids whose row lies in the cache as
a step begins, and the step's time beside that of all rows on the device and beside the planner's, which knows the law.
`long`: a small model through the trainer's pipeline, in three ways from one seed: rows on the device, cached, and
cached with the next batch's rows brought in meanwhile, with an evaluation every 500 steps.  `large`: most memory is
taken away, and a table of twice the rest is trained.
"""

import argparse
import gc
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._C._distributed_c10d import HashStore
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor
from torchrec.streamable import Pipelineable

from benchmarks.placements import DEVICE, one_rank
from embeddings.caches import Caches
from embeddings.config import ComputeKernel, PlacementConfig, TableConfig
from embeddings.exchange import table_sharders
from embeddings.frequencies import zipf
from embeddings.machine import Machine
from embeddings.optimizers import TableOptimizers, attach_optimizers
from embeddings.planner import plan_tables
from embeddings.planning import solve
from embeddings.problem import BatchLoad, Problem, reserve
from embeddings.sharding import apply_plan
from embeddings.tables import Rows, build_tables, fbgemm_kernels, init_tables, rows_by_feature
from embeddings.trial import BAG_IDS, OPTIMIZER, Trial, median_ms
from pipelines.overlap import Overlap, StepPipeline

EXPONENTS = (None, 0.8, 1.0, 1.1, 1.3)
"""None: all rows alike."""
HITS_TABLE = TableConfig(name="item", num_embeddings=20_000_000, embedding_dim=128, features=("item",))
HITS_IDS, FILLING_STEPS = 2**18, 60
LONG_TABLE = TableConfig(name="item", num_embeddings=2_000_000, embedding_dim=64, features=("item",))
LONG_IDS, LONG_BATCHES, LONG_STEPS, EVALUATED_EVERY = 16_384, 256, 10_000, 500
WAYS: dict[str, tuple[ComputeKernel, Overlap]] = {
    "on the device": ("fused", "sparse_dist"),
    "cached": ("fused_uvm_caching", "sparse_dist"),
    "cached, prefetched": ("fused_uvm_caching", "prefetch"),
}
FREE_GIB, LARGE_STEPS = 4.0, 200
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


def hits(machine_file: str | None) -> dict[str, Any]:
    """Times of a step by law, cached and not, measured and planned."""
    machine, rows = one_rank(machine_file), HITS_TABLE.num_embeddings
    results: dict[str, dict[str, float]] = {}
    kernels: tuple[ComputeKernel, ...] = ("fused", "fused_uvm_caching")
    for kernel in kernels:
        placed = PlacementConfig(compute_kernels=(kernel,), reserved_fraction=0.0)
        trial = ZipfTrial([HITS_TABLE], HITS_IDS, machine=machine, placement=placed, rank=0)
        for exponent in EXPONENTS:
            row = results.setdefault("all alike" if exponent is None else f"Zipf {exponent:g}", {})
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
                row["found"], row["planned_hits"] = trial.found(), load.hit_rate("item", rows)
        del trial
        gc.collect()
        torch.cuda.empty_cache()
    return results


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

    def __init__(self, dim: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(dim, 128), nn.SiLU(), nn.Linear(128, 1))

    def forward(self, looked_up: list[Rows]) -> Tensor:
        loss: Tensor = self.layers(rows_by_feature(looked_up)["item"].values()).square().mean()
        return loss


class Model(nn.Module):
    """A table and the tower."""

    def __init__(self, table: TableConfig) -> None:
        super().__init__()
        self.tables = build_tables([table], device=torch.device("meta"))
        self.tower = Tower(table.embedding_dim)

    def forward(self, batch: Batch) -> Tensor:
        loss: Tensor = self.tower(self.tables(batch.features))
        return loss


class Both:
    """The optimizers of tower and table."""

    def __init__(self, dense: torch.optim.Optimizer, tables: TableOptimizers) -> None:
        self.parts = (dense, tables)

    def zero_grad(self) -> None:
        """Of both."""
        for part in self.parts:
            part.zero_grad()

    def step(self) -> None:
        """Of both."""
        for part in self.parts:
            part.step()


def train(
    table: TableConfig, kernel: ComputeKernel, overlap: Overlap, batches: Iterator[Batch], *, evaluate: bool
) -> tuple[Tensor, float]:
    """(the loss of every step, planned GiB of the table)."""
    model = Model(table)
    plan = plan_tables(
        model,
        [table],
        machine=one_rank(None),
        placement=PlacementConfig(compute_kernels=(kernel,), reserved_fraction=0.0),
        optimizer=OPTIMIZER,
        load=BatchLoad(samples_per_rank=1, ids_per_sample={"item": float(LONG_IDS)}),
    )
    model.tower.to(DEVICE)
    sharding_plan = apply_plan(model, plan, device=DEVICE, prefetch=overlap == "prefetch")
    attach_optimizers(model.tables, OPTIMIZER)
    module = DistributedModelParallel(
        model,
        device=DEVICE,
        plan=sharding_plan,
        sharders=table_sharders(plan.exchange),
        init_data_parallel=False,
    )
    init_tables(model.tables, seed=0)
    optimizers = TableOptimizers(model.tables, OPTIMIZER, module.fused_optimizer)
    both = Both(torch.optim.SGD(model.tower.parameters(), lr=0.01), optimizers)
    caches = Caches(model.tables)

    def forward(batch: Batch) -> tuple[Tensor, Tensor]:
        loss: Tensor = module(batch)
        return loss, loss.detach()

    pipeline = StepPipeline(overlap, module, both, DEVICE, forward)
    other = Batch(bags(torch.arange(2**14, device=DEVICE) * 113 % table.num_embeddings))
    losses, evaluations = [], []

    def look() -> None:
        module.eval()
        with torch.no_grad(), caches.undisturbed():
            evaluations.append(module(other))
        module.train()

    while True:
        try:
            losses.append(pipeline.step(batches))
        except StopIteration:
            break
        if evaluate and len(losses) % EVALUATED_EVERY == 0:
            pipeline.outside(look)
    return torch.stack(losses + evaluations).cpu(), plan.ranks[0].memory_bytes / 2**30


def drawn_batches(table: TableConfig) -> list[Batch]:
    """Some batches of ids by Zipf's law, in pinned host memory."""
    draw, generator = Draw(table.num_embeddings, 0.9), torch.Generator(DEVICE).manual_seed(1)
    return [Batch(bags(draw(LONG_IDS, generator).cpu())).pin_memory() for _ in range(LONG_BATCHES)]


def in_turn(batches: list[Batch], steps: int) -> Iterator[Batch]:
    """Batches in turn, in another order each time."""
    return (batches[step * (1 + 2 * (step // len(batches))) % len(batches)] for step in range(steps))


def long(machine_file: str | None) -> dict[str, Any]:
    """Whether the losses of all steps are the same bits in every way, and the time of a step in each."""
    del machine_file
    batches, losses, ms = drawn_batches(LONG_TABLE), {}, {}
    for name, (kernel, overlap) in WAYS.items():
        start = time.perf_counter()
        losses[name], _ = train(LONG_TABLE, kernel, overlap, in_turn(batches, LONG_STEPS), evaluate=True)
        ms[name] = (time.perf_counter() - start) * 1000 / LONG_STEPS
        differ = (losses[name] != losses["on the device"]).nonzero().flatten().tolist()
        print(name, f"{ms[name]:.3g} ms", "steps that differ:", len(differ), differ[:3], flush=True)
    reference = losses["on the device"]
    return {
        "steps": LONG_STEPS,
        "finite": all(bool(values.isfinite().all()) for values in losses.values()),
        "steps_that_differ": {name: int((values != reference).sum()) for name, values in losses.items()},
        "step_ms": ms,
    }


def large(machine_file: str | None) -> dict[str, Any]:
    """A table of twice the memory that is left, and what was planned and held of it."""
    del machine_file
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info()
    ballast = torch.empty(int(free - FREE_GIB * 2**30), dtype=torch.uint8, device=DEVICE)
    table = replace(LONG_TABLE, num_embeddings=int(2 * FREE_GIB * 2**30) // 512, embedding_dim=128)
    held = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    losses, planned_gib = train(
        table,
        "fused_uvm_caching",
        "prefetch",
        in_turn(drawn_batches(table), LARGE_STEPS),
        evaluate=False,
    )
    peak = (torch.cuda.max_memory_allocated() - held) / 2**30
    del ballast
    return {
        "free_gib": FREE_GIB,
        "table_gib": table.weight_bytes / 2**30,
        "steps": LARGE_STEPS,
        "finite": bool(losses.isfinite().all()),
        "planned_gib": planned_gib,
        "peak_gib": peak,
    }


PARTS: dict[str, Callable[[str | None], dict[str, Any]]] = {"long": long, "large": large, "hits": hits}


def main() -> None:
    """Runs the parts, prints each as it is done, and writes JSON after each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--machine", help="a machine's file, for its rates")
    parser.add_argument("--json", type=Path, default=Path("benchmarks/results/caches.json"))
    parser.add_argument("--parts", nargs="*", choices=list(PARTS), default=list(PARTS))
    arguments = parser.parse_args()
    torch.cuda.set_device(0)
    dist.init_process_group("nccl", store=HashStore(), rank=0, world_size=1)
    results: dict[str, Any] = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__}
    for part in arguments.parts:
        results[part] = PARTS[part](arguments.machine)
        print(part, json.dumps(results[part], indent=1), flush=True)
        arguments.json.write_text(json.dumps(results, indent=1) + "\n")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
