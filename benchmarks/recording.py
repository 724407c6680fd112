"""Training steps whose dense part is launched beside the same steps replayed (`trainer.steps.recording`).

Run on a GPU: python -m benchmarks.recording [--json FILE]; on several: torchrun --nproc-per-node N -m
benchmarks.recording (each has such batches); anywhere, but launched alone: python -m benchmarks.recording --small

Batches of random ids and changing lengths, several of which have one size with padding; each is seen twice before the
clock starts, so that sizes are recorded.  A row tells the median step of the passes, launches a step and memory.  ULTRA
is the recipe yambda_ultra with a table of 2M rows and histories of 2,048 to 6,830 events, the retriever the recipe
movielens_retrieval.
"""

import argparse
import gc
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import cycle
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from benchmarks.cost import made_up_batch
from benchmarks.feed import synchronize
from benchmarks.measured_on import measured_on
from pipelines.config import SyntheticConfig
from pipelines.overlap import StepPipeline
from pipelines.reading.loader import dataset_info
from trainer.build import build_parallel, machine_of, make_plan
from trainer.config import ScheduleConfig, TrainConfig
from trainer.parallel.mesh import Mesh, discover_mesh, joined
from trainer.recipes import load_recipe
from trainer.resolve import Resolved, resolve

BATCHES, PASSES = 6, 4


@dataclass(frozen=True, slots=True)
class Case:
    """A recipe, and its batches' histories."""

    config: TrainConfig
    samples: int
    shortest: int
    longest: int


def main() -> None:
    parser = argparse.ArgumentParser(description="Time launched and replayed steps.")
    parser.add_argument("--json", type=Path, default=None, help="write the figures to this file")
    parser.add_argument("--small", action="store_true", help="short histories")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these cases")
    arguments = parser.parse_args()
    mesh, rows = discover_mesh(), {}
    with joined(mesh):
        cases = make_cases(small=arguments.small)
        for name in arguments.only or cases:
            case = cases[name]
            settings: tuple[Literal["off", "on"], ...] = ("off", "on") if mesh.device.type == "cuda" else ("off",)
            for recorded in settings:
                row = measure(replace(case, config=replace(case.config, recorded=recorded)), mesh)
                rows[f"{name}, {'replayed' if recorded == 'on' else 'launched'}"] = row
                if not mesh.is_first:
                    continue
                print(name, recorded, json.dumps({key: round(value, 3) for key, value in row.items()}), flush=True)
                if arguments.json is not None:
                    where = {**measured_on(), "ranks": mesh.world_size}
                    arguments.json.write_text(json.dumps({"hardware": where, "rows": rows}, indent=1) + "\n")


def make_cases(*, small: bool) -> dict[str, Case]:
    """The cases by name."""
    ultra, retriever = (_synthetic(load_recipe(name), rows) for name, rows in _ROWS.items())
    if small:
        return {"retriever": Case(retriever, 4, 3, 20)}
    return {
        "retriever, 128 samples": Case(retriever, 128, 20, 200),
        "ULTRA, 16 samples": Case(ultra, 16, 2048, 6830),
        "ULTRA, 48 samples": Case(ultra, 48, 2048, 6830),
    }


_ROWS = {"yambda_ultra": 2_000_000, "movielens_retrieval": 3_416}


def _synthetic(config: TrainConfig, rows: int) -> TrainConfig:
    synthetic = SyntheticConfig(num_items=rows)
    data = replace(config.data, path="synthetic", synthetic=synthetic, max_candidates=1)
    return replace(config, data=data, schedule=ScheduleConfig())


def measure(case: Case, mesh: Mesh) -> dict[str, float]:
    """Milliseconds of a step and what it is made of."""
    resolved = resolve(case.config, dataset_info(case.config.data))
    gc.collect()
    model = build_parallel(resolved, make_plan(resolved, machine_of(mesh)), mesh)
    pipeline = StepPipeline(case.config.overlap, model.module, model.optimizers, mesh.device, model.loss)
    model.module.train()
    batches = cycle(_batches(case, resolved, mesh))

    def one_pass() -> float:
        start = time.perf_counter()
        for _ in range(BATCHES):
            model.optimizers.set_step(1)
            pipeline.step(batches)
        synchronize(mesh)
        return 1e3 * (time.perf_counter() - start) / BATCHES

    for _ in range(3):
        one_pass()
    row = {"step_ms": statistics.median(one_pass() for _ in range(PASSES))}
    if mesh.device.type == "cuda":
        row["launches"] = _launches(one_pass)
        row["reserved_gib"] = torch.cuda.memory_reserved(mesh.device) / 2**30
    return row


def _launches(one_pass: Callable[[], float]) -> float:
    """What the host launches a step; a replayed graph is one."""
    with torch.profiler.profile() as profile:
        one_pass()
    names = ("cudaLaunch", "cuLaunch", "cudaGraphLaunch")
    launches: int = sum(event.count for event in profile.key_averages() if event.key.startswith(names))
    return launches / BATCHES


def _batches(case: Case, resolved: Resolved, mesh: Mesh) -> list[Any]:
    generator = np.random.default_rng(0)
    lens = [generator.integers(case.shortest, case.longest, case.samples) for _ in range(BATCHES)]
    made = [resolved.task.prepare(made_up_batch(resolved, each), mesh) for each in lens]
    return [batch.to(mesh.device) for batch in made]


if __name__ == "__main__":
    main()
