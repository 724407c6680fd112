"""What does attention cost against the rest of a step?  Fits `data.attention_cost`, by which batches are balanced.

Run: python -m benchmarks.cost RECIPE [--set KEY=VALUE ...] [--tokens 65536] [--json FILE]

Times training steps of the recipe's model, in one process on this machine's device, on generated batches of about
the same number of tokens in few long or many short histories, and half as many.  The steps' times are fitted by

    milliseconds = fixed + per_sample * samples + per_dense * FLOPs of products + per_attention * FLOPs of attention

and per_attention / per_dense is printed as the setting to use.  It belongs to a model and a kind of device.  What a
sample costs whatever its length is left out of the balance, which gives the ranks about as many samples each.
"""

import argparse
import json
import statistics
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from benchmarks.feed import synchronize
from benchmarks.measured_on import measured_on
from pipelines.batches.batch import Batch
from pipelines.batches.packed import LENS_PREFIX, NUMBER_PREFIX, Contents, bag_lens, pack
from pipelines.reading.loader import dataset_info
from pipelines.stream.position import DataPosition
from trainer.build import build_parallel, machine_of, make_plan
from trainer.config import ScheduleConfig, TrainConfig
from trainer.parallel.mesh import Mesh, discover_mesh, joined
from trainer.parallelize import ParallelModel
from trainer.recipes import load_recipe
from trainer.resolve import Resolved, resolve
from trainer.typed_values import apply_overrides

WARM_UP, REPEATS = 3, 7


@dataclass(frozen=True, slots=True)
class Measurement:
    """One kind of batch."""

    history_len: int
    """Events of each history."""
    samples: int
    """Samples of the batch."""
    dense_flops: float
    """Training FLOPs of the batch outside attention."""
    attention_flops: float
    """Training FLOPs of the batch in attention."""
    step_ms: float
    """Median time of a step."""


def main() -> None:
    parser = argparse.ArgumentParser(description="Fit the cost of attention to measured step times.")
    parser.add_argument("recipe")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override a setting")
    parser.add_argument("--tokens", type=int, default=65536, help="tokens of the larger batches")
    parser.add_argument("--json", type=Path, default=None, help="write measurements and fit to this file")
    arguments = parser.parse_args()
    # A rate that decays to the end of a run has none here.
    config = replace(apply_overrides(load_recipe(arguments.recipe), arguments.set), schedule=ScheduleConfig())
    mesh = discover_mesh()
    with joined(mesh):
        measurements = measure(config, mesh, arguments.tokens)
    for each in measurements:
        print(f"{each.samples:6d} histories of {each.history_len:6d}: {each.step_ms:9.3f} ms")
    fixed_ms, per_sample, per_dense, per_attention = fit(measurements)
    rates = f"dense {1e-9 / per_dense:.3g} TFLOP/s, attention {1e-9 / per_attention:.3g} TFLOP/s"
    print(f"{fixed_ms:.3f} ms and {per_sample:.4f} ms a sample; {rates}")
    print(f"use: --set data.attention_cost={per_attention / per_dense:.2f}")
    if arguments.json is not None:
        rows = [{name: getattr(each, name) for name in Measurement.__dataclass_fields__} for each in measurements]
        result = {"hardware": measured_on(), "recipe": arguments.recipe, "rows": rows}
        arguments.json.write_text(json.dumps({**result, "attention_cost": per_attention / per_dense}, indent=1) + "\n")


def fit(measurements: list[Measurement]) -> tuple[float, float, float, float]:
    """Milliseconds (fixed, a sample, a dense FLOP, a FLOP of attention) by least squares of relative errors.

    Raises ValueError if the measurements do not tell the costs apart.
    """
    step_ms = np.array([each.step_ms for each in measurements])
    columns = np.array([[1.0, each.samples, each.dense_flops, each.attention_flops] for each in measurements])
    scale = columns.max(axis=0)
    solution, _, rank, _ = np.linalg.lstsq(columns / scale / step_ms[:, None], np.ones(len(step_ms)), rcond=None)
    fixed_ms, per_sample, per_dense, per_attention = (solution / scale).tolist()
    if rank < 4 or per_dense <= 0 or per_attention <= 0:
        raise ValueError(
            f"the step times {step_ms.round(3).tolist()} ms do not show what attention costs: raise --tokens or "
            "data.max_history_len until steps take much longer than their launch"
        )
    return fixed_ms, per_sample, per_dense, per_attention


def measure(config: TrainConfig, mesh: Mesh, tokens: int) -> list[Measurement]:
    """Step times of batches from short to long histories."""
    resolved = resolve(config, dataset_info(config.data))
    model = build_parallel(resolved, make_plan(resolved, machine_of(mesh)), mesh)
    model.module.train()
    longest = config.data.max_history_len
    measurements = []
    for history_len in sorted({max(longest // divisor, 1) for divisor in (1, 2, 4, 8, 16)}):
        for total in (tokens, tokens // 2):
            samples = max(total // history_len, 1)
            lens = np.full(samples, history_len)
            flops = resolved.task.flops(lens, np.ones(samples, dtype=np.int64))
            attention = float(flops.attention.sum())
            factor = float(flops.training.sum() / flops.forward.sum())
            measurements.append(
                Measurement(
                    history_len=history_len,
                    samples=samples,
                    dense_flops=factor * (float(flops.forward.sum()) - attention),
                    attention_flops=factor * attention,
                    step_ms=time_step(model, made_up_batch(resolved, lens).to(mesh.device), mesh),
                )
            )
    return measurements


def time_step(model: ParallelModel, batch: Batch, mesh: Mesh) -> float:
    """Median milliseconds of forward, backward and update on this batch."""
    times = []
    for number in range(WARM_UP + REPEATS):
        model.optimizers.set_step(number + 1)
        start = time.perf_counter()
        model.optimizers.zero_grad()
        loss, _ = model.loss(batch)
        loss.backward()  # type: ignore[no-untyped-call]  # torch's method
        model.optimizers.step()
        synchronize(mesh)
        times.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times[WARM_UP:])


def made_up_batch(resolved: Resolved, history_lens: npt.NDArray[np.int64]) -> Batch:
    """Random histories of these lengths with a candidate each, of the columns that the model reads."""
    info, generator = resolved.info, np.random.default_rng(0)
    samples, events = len(history_lens), int(history_lens.sum())
    sizes = {"event": events, "candidate": samples, "sample": samples}
    ids: dict[str, npt.NDArray[np.int64]] = {}
    arrays: dict[str, Any] = {}
    for feature in resolved.task.selection.features:
        rows = sum(sizes[part] for part in feature.parts)
        if feature.space is None:
            arrays[NUMBER_PREFIX + feature.name] = (np.float32, [generator.random(rows)])
        else:
            count = rows
            if feature.kind == "ids":
                lens = generator.integers(0, 4, rows)
                count = int(lens.sum())
                arrays[LENS_PREFIX + feature.name] = (np.int64, [lens])
            ids[feature.name] = generator.integers(0, info.spaces[feature.space].rows, count)
    ends = np.cumsum(history_lens)
    memory, places = pack(
        {
            "ids": (np.int64, list(ids.values())),
            "bag_lens": (np.int64, [bag_lens([len(each) for each in ids.values()])]),
            "user_id": (np.int64, [np.arange(samples)]),
            "history_lens": (np.int64, [history_lens]),
            "num_candidates": (np.int64, [np.ones(samples, np.int64)]),
            "action": (np.int32, [generator.integers(0, 1 << len(info.actions), events, dtype=np.int32)]),
            "timestamp": (np.int64, [np.arange(events) - np.repeat(ends - history_lens, history_lens), history_lens]),
            "candidate_action": (np.int32, [generator.integers(0, 1 << len(info.actions), samples, dtype=np.int32)]),
            "loss_denominator": (np.float32, [np.array([samples], np.float32)]),
            **arrays,
        }
    )
    contents = Contents(
        size_bytes=memory.numel(),
        places=places,
        lookups=tuple(ids),
        position=DataPosition(order=("made up",)),
        global_samples=samples,
        global_tokens=events + samples,
        imbalance=1.0,
    )
    return Batch(contents, memory)


if __name__ == "__main__":
    main()
