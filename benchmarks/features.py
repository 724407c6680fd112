"""What breadth costs: a ranker with 40 columns of ids and 10 of numbers beside one with the item's id alone.

Run: python -m benchmarks.features [--samples 400] [--length 2048] [--small] [--json FILE]

From Parquet to batches: rows with these columns (20 of items, 5 of them of many ids; 15 of events; 4 of samples;
numbers of events, items and candidates) are written and read back by one process without threads, events a second of
processor time.  Training steps: the same tower on both inputs, in turns, on the device at hand; `--small` for a CPU.
"""

import argparse
import json
import statistics
import time
from itertools import repeat
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.cost import made_up_batch
from benchmarks.feed import synchronize
from benchmarks.loader import cpu_seconds
from benchmarks.measured_on import measured_on
from pipelines.config import DataConfig
from pipelines.overlap import StepPipeline
from pipelines.reading.loader import build_loader
from pipelines.selection import select
from pipelines.storage.dataset_json import read_dataset_info
from trainer.build import build_parallel, machine_of, make_plan
from trainer.config import TableSettings, TrainConfig
from trainer.models.config import InputConfig, ModelConfig, StageConfig
from trainer.models.layer_config import LayerConfig
from trainer.parallel.mesh import Mesh, discover_mesh, joined
from trainer.resolve import resolve

ITEMS, ROWS = 100_000, 10_000
"""Ids of the items' space and of every other one."""
WIDTHS = (8, 16, 32, 64, 128)
"""Widths that tables have in turn."""
CANDIDATES, STEPS, TURNS = 8, 10, 5
NARROW = InputConfig(event=("item_id",), candidate=("item_id",), context=())


def main() -> None:
    parser = argparse.ArgumentParser(description="What many columns cost.")
    parser.add_argument("--samples", type=int, default=400, help="samples in the files")
    parser.add_argument("--length", type=int, default=2048, help="events of every history")
    parser.add_argument("--small", action="store_true", help="a tower and tables for a CPU")
    parser.add_argument("--json", type=Path, default=None)
    arguments = parser.parse_args()
    mesh = discover_mesh()
    with TemporaryDirectory() as folder, joined(mesh):
        write_data(Path(folder), arguments.samples, arguments.length)
        rates = {
            name: read_rate(folder, arguments.length, inputs)
            for name, inputs in (("item id alone", NARROW), ("40 + 10 columns", InputConfig()))
        }
        configs = [
            configuration(folder, arguments.length, each, small=arguments.small) for each in (NARROW, InputConfig())
        ]
        narrow, wide = step_ms(configs, mesh, samples=2 if arguments.small else 32, length=arguments.length)
    for name, rate in rates.items():
        print(f"{name:16} {rate:12,.0f} events a second of processor time, from Parquet")
    print(f"a step takes {narrow:.1f} ms with the item id alone, {wide:.1f} with all: {narrow / wide:.0%} of its rate")
    if arguments.json is not None:
        where = measured_on()
        sizes = {"samples": arguments.samples, "length": arguments.length, "small": arguments.small}
        steps = {"narrow_step_ms": narrow, "wide_step_ms": wide, "rate": narrow / wide}
        arguments.json.write_text(
            json.dumps({"hardware": where, **sizes, "events_per_cpu_s": rates, **steps}, indent=1) + "\n"
        )


def write_data(folder: Path, samples: int, length: int) -> None:
    """Write random rows in the prepared format."""
    draw = np.random.default_rng(0)
    columns: dict[str, dict[str, Any]] = {
        "sample": {f"user_{n}": f"space_{n}" for n in range(4)},
        "event": {"item_id": "item", **{f"event_{n}": f"space_{4 + n}" for n in range(15)}, **_numbers("dwell", 5)},
        "candidate": {"item_id": "item", **_numbers("price", 2)},
        "item": {
            **{f"single_{n}": f"space_{19 + n}" for n in range(15)},
            **{f"many_{n}": [f"space_{34 + n}"] for n in range(5)},
            **_numbers("score", 3),
        },
    }
    spaces = {"item": {"rows": ITEMS}, **{f"space_{n}": {"rows": ROWS} for n in range(39)}}
    (folder / "items").mkdir()
    item = {"item_id": pa.array(np.arange(ITEMS))} | {
        name: _values(draw, word, ITEMS) for name, word in columns["item"].items()
    }
    pq.write_table(pa.table(item), folder / "items" / "part-0.parquet")
    for split, rows in (("train", samples), ("eval", 8)):
        (folder / split).mkdir()
        table: dict[str, Any] = {"user_id": pa.array(np.arange(rows))}
        table |= {name: _values(draw, word, rows) for name, word in columns["sample"].items()}
        for part, prefix, size, first in (
            ("event", "history_", length, 0),
            ("candidate", "candidate_", CANDIDATES, length),
        ):
            offsets = pa.array(np.arange(rows + 1, dtype=np.int32) * size)
            values = {name: _values(draw, word, rows * size) for name, word in columns[part].items()}
            values["action"] = pa.array(draw.integers(0, 2, rows * size, dtype=np.int32))
            values["timestamp"] = pa.array(np.tile(1_700_000_000 + first + np.arange(size), rows))
            table |= {prefix + name: pa.ListArray.from_arrays(offsets, each) for name, each in values.items()}
        group = max(1, 100_000 // length)
        pq.write_table(pa.table(table), folder / split / "part-0.parquet", row_group_size=group, compression="zstd")
    described = {"format_version": 2, "name": "wide", "spaces": spaces, **columns, "actions": ["click"]}
    sizes = {"history_events": samples * length, "candidates": samples * CANDIDATES}
    described |= {"splits": {"train": {"samples": samples, **sizes}}, "source": "made up", "licence": "none"}
    (folder / "dataset.json").write_text(json.dumps(described))


def _numbers(name: str, count: int) -> dict[str, str]:
    return {f"{name}_{n}": "number" for n in range(count)}


def _values(draw: np.random.Generator, word: Any, count: int) -> pa.Array:
    """Random values of a column."""
    if word == "number":
        return pa.array(draw.random(count, dtype=np.float32))
    if isinstance(word, list):
        offsets = np.concatenate(([0], np.cumsum(draw.integers(0, 4, count)))).astype(np.int32)
        return pa.ListArray.from_arrays(pa.array(offsets), pa.array(draw.integers(0, ROWS, int(offsets[-1]))))
    return pa.array(draw.integers(0, ITEMS if word == "item" else ROWS, count))


def read_rate(folder: str, length: int, inputs: InputConfig) -> float:
    """Events a second of processor time, in one process without threads, after a first batch."""
    config = DataConfig(path=folder, global_batch_size=32, max_history_len=length, reader_threads=0)
    info = read_dataset_info(folder)
    selection = select(info, event=inputs.event, candidate=inputs.candidate, context=inputs.context)
    batches = iter(build_loader(config, split="train", rank=0, world_size=1, selection=selection))
    next(batches)
    start = cpu_seconds()
    events = sum(batch.global_tokens for batch in batches)
    return events / (cpu_seconds() - start)


def configuration(folder: str, length: int, inputs: InputConfig, *, small: bool) -> TrainConfig:
    """The tower over these inputs."""
    dim, head = (32, 16) if small else (512, 128)
    model = ModelConfig(
        dim=dim,
        max_len=length + 64,
        layer=LayerConfig(num_heads=dim // head, qk_dim=head, value_dim=head),
        stages=(StageConfig(num_layers=2 if small else 8, local=256, global_rows=256),),
        input=inputs,
    )
    names = [f"space_{n}" for n in range(39)] if inputs.event is None else []
    widths = {name: TableSettings(embedding_dim=WIDTHS[n % len(WIDTHS)]) for n, name in enumerate(names)}
    data = DataConfig(path=folder, global_batch_size=32, max_history_len=length)
    return TrainConfig(name="features", data=data, model=model, embedding_dim=128, tables=widths)


def step_ms(configs: list[TrainConfig], mesh: Mesh, *, samples: int, length: int) -> list[float]:
    """Median milliseconds of a training step of each, measured in turns."""
    steps = []
    for config in configs:
        resolved = resolve(config, read_dataset_info(config.data.path))
        model = build_parallel(resolved, make_plan(resolved, machine_of(mesh)), mesh)
        model.module.train()
        pipeline = StepPipeline(config.overlap, model.module, model.optimizers, mesh.device, model.loss)
        batch = made_up_batch(resolved, np.full(samples, length)).to(mesh.device)
        steps.append((pipeline, repeat(batch), model.optimizers))
    times: list[list[float]] = [[] for _ in steps]
    for turn in range(1 + TURNS):
        for measured, (pipeline, batches, optimizers) in zip(times, steps, strict=True):
            start = time.perf_counter()
            for step in range(STEPS):
                optimizers.set_step(turn * STEPS + step + 1)
                pipeline.step(batches)
            synchronize(mesh)
            measured.append(1e3 * (time.perf_counter() - start) / STEPS)
    return [statistics.median(measured[1:]) for measured in times]


if __name__ == "__main__":
    main()
