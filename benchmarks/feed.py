"""Does the loader keep a device fed?  Step time from Parquet files against step time with one cached batch.

Run on a GPU: python -m benchmarks.feed [--length 4096] [--samples 16] [--steps 60] [--json FILE]
On a CPU: python -m benchmarks.feed --length 64 --samples 4 --steps 8 --small

Both train the same single-process model through TorchRec's overlapped pipeline.  The files hold generated histories of
one length in the prepared format; every step reads samples that no step before it read.
"""

import argparse
import json
import time
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice, repeat
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from benchmarks.loader import hardware, write_data
from pipelines.batch import Batch
from pipelines.config import DataConfig
from pipelines.loader import build_loader, dataset_info
from pipelines.overlap import StepPipeline
from trainer.config import TrainConfig
from trainer.job import build_parallel, machine_of, make_plan
from trainer.mesh import Mesh, discover_mesh, joined
from trainer.models.config import LayerConfig, StageConfig
from trainer.recipes import load_recipe

WARM_UP = 10


def main() -> None:
    parser = argparse.ArgumentParser(description="Step time with the loader and with one cached batch.")
    parser.add_argument("--length", type=int, default=4096, help="events of every history")
    parser.add_argument("--samples", type=int, default=16, help="samples of a batch")
    parser.add_argument("--steps", type=int, default=60, help="timed steps")
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--threads", type=int, default=2, help="reader threads")
    parser.add_argument("--small", action="store_true", help="a model of width 16")
    parser.add_argument("--json", type=Path, default=Path("benchmarks/results/feed.json"))
    arguments = parser.parse_args()
    mesh = discover_mesh()
    with TemporaryDirectory() as folder, joined(mesh):
        steps = arguments.steps + WARM_UP
        write_data(Path(folder), arguments.length, arguments.samples * steps)
        config = make_config(folder, arguments)
        loader = build_loader(config.data, split="train", rank=0, world_size=1, pin_memory=mesh.device.type == "cuda")
        cached = next(iter(loader))
        # Once more the cached batch last, because the machine's state drifts.
        feeds: dict[str, Iterator[Batch]] = {
            "cached": repeat(cached, steps),
            "loader": islice(loader, steps),
            "cached again": repeat(cached, steps),
        }
        times = {name: time_steps(config, mesh, feed) for name, feed in feeds.items()}
    for name, milliseconds in times.items():
        print(f"{name:14s} {milliseconds:8.2f} ms a step")
    ratio = 2 * times["loader"] / (times["cached"] + times["cached again"])
    print(f"the loader costs {100 * (ratio - 1):+.1f}% of a step")
    device = torch.cuda.get_device_name(mesh.device) if mesh.device.type == "cuda" else "cpu"
    values = {name: value for name, value in vars(arguments).items() if name != "json"}
    result: dict[str, Any] = {"hardware": {**hardware(), "device": device}, "arguments": values}
    arguments.json.parent.mkdir(parents=True, exist_ok=True)
    arguments.json.write_text(json.dumps({**result, "step_ms": times, "ratio": ratio}, indent=1) + "\n")


def make_config(folder: str, arguments: argparse.Namespace) -> TrainConfig:
    """The demo's recipe with the width and masks of the papers' models."""
    recipe = load_recipe("kuairand_sample")
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
    )
    return replace(recipe, data=data, model=model, embedding_dim=16 if arguments.small else 256)


def time_steps(config: TrainConfig, mesh: Mesh, feed: Iterator[Batch]) -> float:
    """Mean milliseconds of a training step, a fresh model's first steps left out."""
    info = dataset_info(config.data)
    torch.manual_seed(0)
    model = build_parallel(config, info, make_plan(config, info, machine_of(mesh), None), mesh)

    def forward(batch: Batch) -> tuple[Tensor, Tensor]:
        loss, _ = model.forward(batch)
        return loss, loss.detach()

    pipeline = StepPipeline(config.overlap, model.module, model.optimizers, mesh.device, forward)
    model.module.train()
    count, start = 0, 0.0
    while True:
        if count == WARM_UP:
            synchronize(mesh)
            start = time.perf_counter()
        model.optimizers.set_step(count + 1)
        try:
            pipeline.step(feed)
        except StopIteration:
            break
        count += 1
    synchronize(mesh)
    return (time.perf_counter() - start) / (count - WARM_UP) * 1e3


def synchronize(mesh: Mesh) -> None:
    """Wait for the device."""
    if mesh.device.type == "cuda":
        torch.cuda.synchronize(mesh.device)


if __name__ == "__main__":
    main()
