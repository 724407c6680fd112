"""Samples a second of whole towers: from HSTU on interleaved tokens, one change at a time, to ULTRA-HSTU.

Run on a GPU: python -m benchmarks.tower [--json FILE]

Every tower has 18 layers of width 512 (4 heads x 128) and reads 16,384 events and 16 candidates a sample, bfloat16,
random tokens of equal length.  A training step is forward and backward; scoring is the forward without gradients.  The
encoder, the tables, the heads and the optimizer are not in it.
"""

import argparse
import json
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.layer import PEAK_TFLOPS
from trainer.models.config import InputConfig, ModelConfig, StageConfig
from trainer.models.flops import TRAINING_FACTOR, InputWidths, ranker_flops
from trainer.models.hstu import HstuTower, build_tower
from trainer.models.layout import make_layout

EVENTS, CANDIDATES, DIM, DEPTH = 16384, 16, 512, 18
TOKENS = {"train": 262144, "score": 524288}
"""History tokens of a step, the same for all towers."""
RUNS = 3
WINDOW = {"local": 256, "global_rows": 256}


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """One tower of the comparison."""

    stages: tuple[StageConfig, ...]
    interleave: bool = False

    @property
    def history_len(self) -> int:
        """Tokens of the history."""
        return (2 if self.interleave else 1) * EVENTS


CASES = {
    "HSTU: interleaved, full causal": Case(stages=(StageConfig(num_layers=DEPTH),), interleave=True),
    "merged tokens": Case(stages=(StageConfig(num_layers=DEPTH),)),
    "merged, semi-local 256 + 256": Case(stages=(StageConfig(num_layers=DEPTH, **WINDOW),)),
    "ULTRA: merged, semi-local, 1,024 events after layer 6": Case(
        stages=(StageConfig(num_layers=6, **WINDOW), StageConfig(num_layers=12, keep_newest=1024, **WINDOW))
    ),
}

NO_ENDS = InputWidths(event=0, candidate=0, context=0)
"""The tower alone: no encoder, no heads."""


def measure(case: Case) -> dict[str, float]:
    """Samples a second, training and scoring, with MFU and peak memory."""
    config = ModelConfig(
        dim=DIM,
        max_len=2**16,
        stages=case.stages,
        input=InputConfig(merge="interleave" if case.interleave else "add"),
    )
    tower = build_tower(dim=DIM, layer=config.layer, stages=case.stages, num_context=0, max_len=config.max_len).cuda()
    flops = ranker_flops(config, EVENTS, CANDIDATES, inputs=NO_ENDS, num_context=0, num_outputs=0)
    gflops = float(flops.forward - flops.ends) / 1e9
    result: dict[str, float] = {"gflop_a_sample": gflops}
    for kind, factor in (("train", TRAINING_FACTOR), ("score", 1)):
        samples = TOKENS[kind] // case.history_len
        step = make_step(tower, samples, case.history_len, train=kind == "train")
        step()
        torch.cuda.reset_peak_memory_stats()
        ms = statistics.median(milliseconds(step) for _ in range(RUNS))
        result |= {
            f"{kind}_ms": ms,
            f"{kind}_samples_per_s": samples / ms * 1e3,
            f"{kind}_mfu": factor * gflops * samples / ms / PEAK_TFLOPS,
            f"{kind}_peak_gib": torch.cuda.max_memory_allocated() / 2**30,
        }
    return result


def make_step(tower: HstuTower, samples: int, history_len: int, *, train: bool) -> Callable[[], None]:
    """A function that runs the tower once on random tokens."""
    history, candidates = torch.full((samples,), history_len), torch.full((samples,), CANDIDATES)
    layout = make_layout(history.cuda(), candidates.cuda(), history, candidates)
    leaf = torch.randn(layout.num_tokens, DIM, device="cuda", dtype=torch.bfloat16, requires_grad=train)

    def training() -> None:
        leaf.grad = None
        tower(leaf, layout)[0].sum().backward()

    @torch.no_grad()
    def scoring() -> None:
        tower(leaf, layout)

    return training if train else scoring


def milliseconds(function: Callable[[], None]) -> float:
    """Time of one run between device events; a run is long, so one is enough."""
    start = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]  # torch
    end = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]  # torch
    start.record()
    function()
    end.record()
    torch.cuda.synchronize()
    return float(start.elapsed_time(end))


def main() -> None:
    """Prints the table and writes JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, default=Path("benchmarks/results/tower.json"))
    json_path: Path = parser.parse_args().json
    rows: dict[str, Any] = {}
    for name, case in CASES.items():
        torch.manual_seed(0)
        rows[name] = measure(case)
        first = next(iter(rows.values()))
        for kind in ("train", "score"):
            rows[name][f"{kind}_ratio"] = rows[name][f"{kind}_samples_per_s"] / first[f"{kind}_samples_per_s"]
        print(name, json.dumps({key: round(value, 4) for key, value in rows[name].items()}), flush=True)
        torch.cuda.empty_cache()
    json_path.write_text(json.dumps({"gpu": torch.cuda.get_device_name(), "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
