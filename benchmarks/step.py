"""A whole training step on a device: its model FLOPs against the peak (MFU), and what recomputation is of it.

Run on a GPU: python -m benchmarks.step [--json FILE]; on several: torchrun --nproc-per-node N -m benchmarks.step
(each has a batch; figures are of one); anywhere: python -m benchmarks.step --small

The trainer's own step through TorchRec's overlapped pipeline (lookup, encoder, layers, heads, backward, both
optimizers) over and over on one batch of random ids; no data is read.  FLOPs are the model's, without recomputation
(`trainer.models.flops`).  HSTU has the shape of NVIDIA recsys-examples' published figures: 8 layers of width 1,024, 4
heads of 256, a table of 50M rows of 128, 32 histories of 4,096 events, or as many events in histories whose lengths
follow Zipf's law.  ULTRA is the model of the recipe yambda_ultra with a table of 10M rows and 16 histories of 16,384
events.  DLRMv4 has the shape of MLPerf Training v6.1's recommender: 3 layers of width 512, 8 columns of context, three
of events, 11 tables of 512 that are scaled to one GPU's memory, 256 samples of 2,663 tokens in the mean; "rows in 16
bits": tables' kernels write rows and read gradients so.
"""

import argparse
import gc
import json
import statistics
import time
from dataclasses import dataclass, replace
from itertools import repeat
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from benchmarks.cost import made_up_batch
from benchmarks.feed import synchronize
from benchmarks.measured_on import measured_on
from embeddings.config import ExchangeConfig, PlacementConfig
from pipelines.config import DataConfig, SyntheticConfig
from pipelines.overlap import StepPipeline
from pipelines.reading.loader import dataset_info
from trainer.build import build_parallel, machine_of, make_plan
from trainer.config import TrainConfig
from trainer.models.config import ModelConfig, StageConfig
from trainer.models.layer_config import LayerConfig
from trainer.parallel.mesh import Mesh, discover_mesh, joined
from trainer.recipes import load_recipe
from trainer.resolve import resolve
from trainer.steps.left_out import check_finite
from trainer.steps.step_log import peak_flops

WARM_UP, STEPS, TURNS = 8, 20, 3
KEPT = ", nothing recomputed"


@dataclass(frozen=True, slots=True)
class Case:
    """A model and the batch that it trains on."""

    config: TrainConfig
    history_lens: npt.NDArray[np.int64]


def main() -> None:
    parser = argparse.ArgumentParser(description="Time whole training steps.")
    parser.add_argument("--json", type=Path, default=None, help="write the figures to this file")
    parser.add_argument("--small", action="store_true", help="short histories, narrow models, small tables")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these rows")
    arguments = parser.parse_args()
    mesh = discover_mesh()
    rows: dict[str, dict[str, float]] = {}
    with TemporaryDirectory() as folder, joined(mesh):
        cases = make_cases(small=arguments.small) | dlrm_cases(Path(folder), small=arguments.small)
        for name in arguments.only or cases:
            case = cases[name]
            rows[name] = measure(case, mesh)
            if not mesh.is_first:
                continue
            print(name, json.dumps({key: round(value, 4) for key, value in rows[name].items()}), flush=True)
            if arguments.json is not None:
                where = measured_on()
                result = {"hardware": where, "small": arguments.small, "rows": rows}
                arguments.json.write_text(json.dumps(result, indent=1) + "\n")
    for name in ("HSTU", "ULTRA") if mesh.is_first and not arguments.only else ():
        rebuilt, kept = (rows[f"{name}{rest}"]["step_ms"] for rest in ("", KEPT))
        print(f"{name}: recomputation is {100 * (1 - kept / rebuilt):.1f}% of the step")


def make_cases(*, small: bool) -> dict[str, Case]:
    """The cases by name."""
    longest, users, rows = (64, 4, 1000) if small else (4096, 32, 50_000_000)
    width, head = (16, 8) if small else (1024, 256)
    model = ModelConfig(
        dim=width,
        max_len=longest + 64,
        layer=LayerConfig(num_heads=width // head, qk_dim=head, value_dim=head),
        stages=(StageConfig(num_layers=8),),
    )
    ultra = load_recipe("yambda_ultra").model
    events, samples = 16384, 16
    if small:
        events, samples = 96, 2
        layer = replace(ultra.layer, num_heads=2, qk_dim=8, value_dim=8)
        ultra = replace(ultra, dim=16, layer=layer, stages=tuple(replace(each, num_layers=1) for each in ultra.stages))
    hstu = Case(_config("hstu", model, rows, 16 if small else 128), np.full(users, longest))
    ultra_case = Case(_config("ultra", ultra, rows // 5, ultra.dim), np.full(samples, events))
    return {
        "HSTU": hstu,
        f"HSTU{KEPT}": keep_everything(hstu),
        "HSTU, Zipf lengths": replace(hstu, history_lens=zipf_lens(longest, users * longest)),
        "HSTU, forward in FP8": with_layer(hstu, fp8=True),
        "ULTRA": ultra_case,
        f"ULTRA{KEPT}": keep_everything(ultra_case),
    }


def _config(name: str, model: ModelConfig, num_items: int, embedding_dim: int) -> TrainConfig:
    synthetic = SyntheticConfig(num_items=num_items)
    data = DataConfig(path="synthetic", global_batch_size=1, max_history_len=model.max_len - 64, synthetic=synthetic)
    return TrainConfig(name=name, data=data, model=model, embedding_dim=embedding_dim)


def zipf_lens(longest: int, total: int) -> npt.NDArray[np.int64]:
    """Lengths from longest / 16 to longest, as likely as they are short, that add up to `total`."""
    lens = (longest * 16 ** -np.random.default_rng(0).random(total)).astype(np.int64)
    count = int(np.searchsorted(np.cumsum(lens), total)) + 1
    lens = lens[:count]
    lens[-1] -= lens.sum() - total
    return lens


def dlrm_cases(folder: Path, *, small: bool) -> dict[str, Case]:
    """Those of MLPerf's shape, by name."""
    case = dlrm_v4(folder, small=small)
    placement = replace(case.config.placement, exchange=ExchangeConfig(rows="bfloat16", gradients="bfloat16"))
    narrow = replace(case, config=replace(case.config, placement=placement))
    return {"DLRMv4": case, f"DLRMv4{KEPT}": keep_everything(case), "DLRMv4, rows in 16 bits": narrow}


def keep_everything(case: Case) -> Case:
    """The same without recomputation."""
    return with_layer(case, recompute_normed=False, recompute_uvqk=False, recompute_gated=False)


def with_layer(case: Case, **changes: Any) -> Case:
    """The same with other settings of its layers."""
    model = case.config.model
    return replace(case, config=replace(case.config, model=replace(model, layer=replace(model.layer, **changes))))


def dlrm_v4(folder: Path, *, small: bool) -> Case:
    """MLPerf's shape; a description of its columns is written to `folder`."""
    spaces = {
        "item": 9_400_000,
        "artist": 1_300_000,
        "album": 3_400_000,
        **{f"context_{n}": 3_000_000 for n in range(8)},
    }
    longest, samples, width, head = (96, 4, 16, 8) if small else (4096, 256, 512, 128)
    description = {
        "format_version": 2,
        "name": "dlrm_v4",
        "spaces": {name: {"rows": 100 if small else rows} for name, rows in spaces.items()},
        "sample": {f"context_{n}": f"context_{n}" for n in range(8)},
        "event": {"item_id": "item"},
        "candidate": {"item_id": "item"},
        "item": {"artist": "artist", "album": "album"},
        "actions": ["listen", "like", "skip"],
        "splits": {"train": {"samples": 1, "history_events": longest, "candidates": 1}},
        "source": "made up",
        "licence": "none",
    }
    (folder / "dataset.json").write_text(json.dumps(description))
    layer = LayerConfig(num_heads=width // head, qk_dim=head, value_dim=head)
    model = ModelConfig(dim=width, max_len=longest + 64, layer=layer, stages=(StageConfig(num_layers=3),))
    data = DataConfig(path=str(folder), global_batch_size=samples, max_history_len=longest)
    # Memory is planned for samples that are all of the longest: what is held back for the rest can be less.
    placement = PlacementConfig(reserved_fraction=0.05)
    config = TrainConfig(name="dlrm_v4", data=data, model=model, embedding_dim=width, placement=placement)
    # With 8 tokens of context and a candidate 2,663 tokens in the mean.
    shortest = longest * 1212 // 4096
    return Case(config, np.random.default_rng(0).integers(shortest, longest + 1, samples))


def measure(case: Case, mesh: Mesh, steps: int = STEPS) -> dict[str, float]:
    """Milliseconds of a step (median of turns), tokens a second, MFU and peak memory.

    Raises:
        FloatingPointError: the loss or the gradients are not finite: what took that time was no training.
    """
    config, lens, samples = case.config, case.history_lens, len(case.history_lens)
    resolved = resolve(config, dataset_info(config.data))
    is_cuda = mesh.device.type == "cuda"
    if is_cuda:
        # The model before hangs in reference cycles.
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(mesh.device)
    model = build_parallel(resolved, make_plan(resolved, machine_of(mesh)), mesh)

    pipeline = StepPipeline(config.overlap, model.module, model.optimizers, mesh.device, model.loss)
    model.module.train()
    batches = repeat(made_up_batch(resolved, lens).to(mesh.device))
    times = []
    for turn in range(1 + TURNS):
        start, count = time.perf_counter(), steps if turn else min(steps, WARM_UP)
        for step in range(count):
            model.optimizers.set_step(turn * steps + step + 1)
            loss = pipeline.step(batches)
        synchronize(mesh)
        times.append(1e3 * (time.perf_counter() - start) / count)
        # What is not finite in one step is not in those behind it.
        norms = model.optimizers.gradient_norms
        check_finite([float(loss)], [float(norms.total)], [(turn * steps + count, 0, samples - 1)], [norms])
    ms = statistics.median(times[1:])
    row = {"samples": samples, "events": int(lens.sum()), "step_ms": ms, "events_per_s": lens.sum() / ms * 1e3}
    row["samples_per_s"] = samples / ms * 1e3
    peak = peak_flops(mesh.device)
    if peak is not None:
        flops = resolved.training_flops(lens, np.ones_like(lens)).sum()
        row["mfu"] = flops / ms * 1e3 / peak / mesh.sharing
    if is_cuda:
        row["peak_gib"] = torch.cuda.max_memory_allocated(mesh.device) / 2**30
    return row


if __name__ == "__main__":
    main()
