"""Does the loader keep a device fed?  Step time from Parquet files against step time with one cached batch.

Run on a GPU: python -m benchmarks.feed [--length 16384] [--samples 16] [--steps 30] [--rounds 3] [--json FILE]
On a CPU: python -m benchmarks.feed --length 64 --samples 4 --steps 8 --rounds 2 --small

One single-process model trains through TorchRec's overlapped pipeline, as the trainer does it, without a break: some
steps on one cached batch, some on batches from the loader, in turns, because the machine's state drifts.  The first
steps of each turn are left out.  A round's turns with the loader are three times as long as those with the cached
batch, so that it cannot live on what it read ahead; they cross at least one shuffling window.
"""

import argparse
import json
import statistics
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from itertools import chain, repeat
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from benchmarks.loader import write_data
from benchmarks.measured_on import measured_on
from pipelines.batches.batch import Batch
from pipelines.config import DataConfig
from pipelines.overlap import StepPipeline
from pipelines.reading.loader import build_loader, dataset_info
from trainer.build import build_parallel, machine_of, make_plan
from trainer.config import ScheduleConfig, TrainConfig
from trainer.models.config import StageConfig
from trainer.models.layer_config import LayerConfig
from trainer.parallel.mesh import Mesh, discover_mesh, joined
from trainer.recipes import load_recipe
from trainer.resolve import resolve
from trainer.steps.feed import Feed

SETTLE = 6
"""Steps at the start of a turn that are not timed: more than the pipeline holds in flight."""
WARM_UP = 20


def main() -> None:
    parser = argparse.ArgumentParser(description="Step time with the loader and with one cached batch.")
    parser.add_argument("--length", type=int, default=16384, help="events of every history")
    parser.add_argument("--samples", type=int, default=16, help="samples of a batch")
    parser.add_argument("--steps", type=int, default=30, help="timed steps of a turn with the loader")
    parser.add_argument("--rounds", type=int, default=3, help="turns with the loader")
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--threads", type=int, default=4, help="threads of the reader process")
    parser.add_argument("--small", action="store_true", help="a model of width 16")
    parser.add_argument("--json", type=Path, default=Path("benchmarks/results/feed.json"))
    arguments = parser.parse_args()
    mesh = discover_mesh()
    with TemporaryDirectory() as folder, joined(mesh):
        write_data(Path(folder), arguments.length, 128 * arguments.samples)
        config = make_config(folder, arguments)
        loader = build_loader(config.data, split="train", rank=0, world_size=1, pin_memory=mesh.device.type == "cuda")
        with closing(iter(loader)) as batches:
            turns = time_turns(config, mesh, batches, arguments.steps, arguments.rounds)
    step_ms = {name: statistics.median(times) for name, times in turns.items()}
    for name, times in turns.items():
        print(f"{name:8s} {step_ms[name]:8.2f} ms a step, turns: {' '.join(f'{each:.2f}' for each in times)}")
    ratio = step_ms["loader"] / step_ms["cached"]
    print(f"the loader costs {100 * (ratio - 1):+.1f}% of a step")
    values = {name: value for name, value in vars(arguments).items() if name != "json"}
    result: dict[str, Any] = {
        "hardware": measured_on(),
        "arguments": values,
        "turns_ms": turns,
    }
    arguments.json.parent.mkdir(parents=True, exist_ok=True)
    arguments.json.write_text(json.dumps({**result, "step_ms": step_ms, "ratio": ratio}, indent=1) + "\n")


def make_config(folder: str, arguments: argparse.Namespace) -> TrainConfig:
    """The demo's recipe with the width and masks of the papers' models."""
    # A rate that decays to the end of a run has none here.
    recipe = replace(load_recipe("kuairand_sample"), schedule=ScheduleConfig())
    layer = LayerConfig(num_heads=2, qk_dim=8, value_dim=8) if arguments.small else LayerConfig()
    model = replace(
        recipe.model,
        dim=16 if arguments.small else 512,
        max_len=arguments.length + 64,
        layer=layer,
        stages=(StageConfig(num_layers=arguments.layers, local=256, global_rows=256),),
    )
    data = DataConfig(
        path=folder,
        global_batch_size=arguments.samples,
        max_history_len=arguments.length,
        window_samples=1024,
        reader_threads=arguments.threads,
        num_epochs=1000,
    )
    return replace(recipe, data=data, model=model, embedding_dim=16 if arguments.small else 256)


def time_turns(
    config: TrainConfig, mesh: Mesh, batches: Iterator[Batch], steps: int, rounds: int
) -> dict[str, list[float]]:
    """Mean milliseconds of a step, one number a turn; the cached batch has the first turn and the last."""
    resolved = resolve(config, dataset_info(config.data))
    model = build_parallel(resolved, make_plan(resolved, machine_of(mesh)), mesh)

    cached = next(batches)
    short = max(steps // 3, 1)
    plan = [("cached", short), *(("loader", steps), ("cached", short)) * rounds]
    # What the pipeline pulls ahead at the end of a turn belongs to the next one.
    sequence = chain.from_iterable(
        repeat(cached, SETTLE + count) if name == "cached" else (next(batches) for _ in range(SETTLE + count))
        for name, count in plan
    )
    feed = Feed(chain(repeat(cached, WARM_UP), sequence), resolved, mesh, model.unbounded)
    pipeline = StepPipeline(config.overlap, model.module, model.optimizers, mesh.device, model.loss)
    model.module.train()
    step = 0

    def advance(count: int) -> None:
        nonlocal step
        for _ in range(count):
            step += 1
            model.optimizers.set_step(step)
            pipeline.step(feed)
            feed.done()

    advance(WARM_UP)
    times: dict[str, list[float]] = {"cached": [], "loader": []}
    for name, count in plan:
        advance(SETTLE)
        synchronize(mesh)
        start = time.perf_counter()
        advance(count)
        synchronize(mesh)
        times[name].append((time.perf_counter() - start) / count * 1e3)
    return times


def synchronize(mesh: Mesh) -> None:
    """Wait for the device."""
    if mesh.device.type == "cuda":
        torch.cuda.synchronize(mesh.device)


if __name__ == "__main__":
    main()
