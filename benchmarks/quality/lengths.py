"""What longer histories are worth: quality against a GPU's time, HSTU beside ULTRA-HSTU, on a made-up stream.

Which items a user will take shows in one stretch of liked events (`pipelines.synthetic`, `lag_until`), which begins
from 256 to 32,768 events back, as likely in every doubling: twice the history shows it of about as many users more.
Every row is trained on as many samples, in as many batches; what is not seen costs NE whatever the model.

Cost is the device's, with nothing else on it, before the trainings, which then run side by side: steps of training as
the trainer takes them, and the scores of one candidate a history.  A slope is the paper's measure (ULTRA-HSTU,
section 5.1.3) with seconds in the place of FLOPs: the gain of a straight line through a model's lengths for each unit
of cost, over the lengths that all models have.
"""

import datetime
import json
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np
import torch

from benchmarks.cost import made_up_batch
from benchmarks.feed import synchronize
from benchmarks.measured_on import device
from benchmarks.quality.trainings import (
    Asked,
    Trained,
    Training,
    commit,
    folder_of,
    seeded,
    train_all,
    with_known_seeds,
)
from benchmarks.step import Case, measure
from pipelines.config import SYNTHETIC_PATH
from pipelines.reading.loader import dataset_info
from trainer.build import build_parallel, machine_of, make_plan
from trainer.config import ScheduleConfig, TrainConfig
from trainer.parallel.mesh import Mesh, discover_mesh, joined
from trainer.recipes import load_recipe
from trainer.resolve import resolve
from trainer.typed_values import apply_overrides

RECIPE, LABEL = "own_log", "match"
TURNS = 5


@dataclass(frozen=True, kw_only=True, slots=True)
class Tower:
    """A model of the table, at several lengths."""

    stages: tuple[Mapping[str, int], ...]
    """Its layers, as `model.stages` says it."""
    lengths: tuple[int, ...]
    """Events of a history."""
    tokens: int = 1
    """Tokens of an event: two read its item and its action apart."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Lengths:
    """Models at growing lengths."""

    towers: Mapping[str, Tower]
    """By name; what the others are compared with stands first."""
    lags: tuple[int, int]
    """Events back to the stretch: of the nearest and of the farthest user."""
    samples: int
    """Samples that every row is trained on."""
    settings: tuple[str, ...]
    """Settings of all rows."""
    trained: bool = True
    """False measures the costs alone."""

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the models."""
        return tuple(self.towers)

    def measure(self, asked: Asked, report: dict[str, Any]) -> None:
        """Measure what was asked for and put it into the report; what that says of the rest stays."""
        start = time.monotonic()
        cells = [(name, length) for name in self.names if name in asked.rows for length in self.towers[name].lengths]
        costs = self._costs(cells, asked)
        left = None if asked.limit_s is None else asked.limit_s - (time.monotonic() - start)
        places = [(seed, *cell) for seed in asked.of_seeds for cell in cells] if self.trained else []
        runs = [self.training(name, length, seed, asked) for seed, name, length in places]
        trained = train_all(runs, asked.jobs, left)
        rows = report.setdefault("rows", {})
        for name, length in cells:
            own = [
                (seed, run.settings, found)
                for (seed, *cell), run, found in zip(places, runs, trained, strict=True)
                if cell == [name, length] and found.seconds is not None
            ]
            of_lengths = rows.setdefault(name, {})
            known = of_lengths.get(str(length))
            if own or known is None:
                known = with_known_seeds(_result(own, asked.jobs), known, ("ne", "auc", "seconds"))
            # A slope compares costs of one session.
            of_lengths[str(length)] = {**known, **costs[name, length]}
        report["samples"] = self.samples
        report["rows"] = {name: rows[name] for name in self.names if name in rows}

    def training(self, name: str, length: int, seed: int, asked: Asked) -> Training:
        """A model's run of a seed at a length."""
        tower, (nearest, farthest) = self.towers[name], self.lags
        stream = {"num_users": self.samples, "min_len": length, "max_len": length, "lag": nearest}
        own = (
            *(f"data.synthetic.{key}={value}" for key, value in {**stream, "lag_until": farthest}.items()),
            f"data.max_history_len={length}",
            # A history with its candidates and its context.
            f"model.max_len={tower.tokens * length + 32}",
            "model.stages=" + json.dumps(tower.stages),
            *(("model.input.merge=interleave",) if tower.tokens == 2 else ()),
        )
        return Training(
            recipe=RECIPE,
            run=asked.work / "runs" / f"{folder_of(name)}-{length}-{seed}",
            settings=(*self.settings, *own, *seeded(seed), *asked.settings),
        )

    def table(self, report: Mapping[str, Any]) -> str:
        """The report in Markdown: each row, then each model's slopes over the first one's."""
        samples, quality = report["samples"], ["seeds", "NE", "AUC"] if self.trained else []
        head = [
            *("model", "events", *quality),
            *(f"training, s of a GPU for {samples:,} samples", "scoring, ms a history"),
        ]
        lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
        for name, rows in report["rows"].items():
            for length, row in rows.items():
                found = [str(len(row["seeds"])), _mean(row["ne"]), _mean(row["auc"])] if self.trained else []
                cells = [name, f"{int(length):,}", *found, f"{row['train_ms'] * samples / 1e3:.2f}"]
                lines.append("| " + " | ".join([*cells, f"{row['score_ms']:.3f}"]) + " |")
        slopes = self._slopes(report["rows"]) if self.trained else self._further(report["rows"])
        return "\n".join(lines) + "".join(f"\n\n{line}" for line in slopes)

    def _further(self, rows: Mapping[str, Any]) -> list[str]:
        """What further events cost the first model against each other one, from a length that both have to the next."""
        lines = []
        for name in list(rows)[1:]:
            lengths = [length for length in rows[self.names[0]] if length in rows[name]]
            for shorter, longer in pairwise(lengths):
                costs = [
                    [of[longer][cost] - of[shorter][cost] for of in (rows[self.names[0]], rows[name])]
                    for cost in ("train_ms", "score_ms")
                ]
                lines.append(
                    f"An event more from {int(shorter):,} to {int(longer):,} costs {self.names[0]} "
                    + " and ".join(
                        f"{first / other:.1f} times as much in {what}"
                        for what, (first, other) in zip(("training", "scoring"), costs, strict=True)
                        if min(first, other) > 0
                    )
                    + f" as {name}."
                )
        return lines

    def _slopes(self, rows: Mapping[str, Any]) -> list[str]:
        """What each model gains for its cost against the first, over the lengths that both have."""
        if self.names[0] not in rows:
            return []
        first, lines = rows[self.names[0]], []
        for name, own in list(rows.items())[1:]:
            lengths = [length for length, row in first.items() if row["ne"] and own.get(length, {}).get("ne")]
            ratios = []
            for what, cost in (("training", "train_ms"), ("scoring", "score_ms")):
                pair = slope(own, lengths, cost), slope(first, lengths, cost)
                # No ratio where longer histories teach nothing, or cost no more.
                if min(pair) > 0:
                    ratios.append(f"{pair[0] / pair[1]:.1f} times in {what}")
            if ratios:
                lines.append(
                    f"NE gained for the same cost from {int(lengths[0]):,} to {int(lengths[-1]):,} events, {name} over "
                    f"{self.names[0]}: {', '.join(ratios)}."
                )
        return lines

    def _costs(self, cells: Sequence[tuple[str, int]], asked: Asked) -> dict[tuple[str, int], dict[str, Any]]:
        """Milliseconds of a sample in training and in scoring; what was measured under --work is used again."""
        found = {}
        mesh = discover_mesh()
        with joined(mesh):
            for name, length in cells:
                training = self.training(name, length, asked.first_seed, asked)
                file = training.run.with_name(f"{training.run.name}.cost.json")
                if not file.is_file():
                    file.parent.mkdir(parents=True, exist_ok=True)
                    config = apply_overrides(load_recipe(RECIPE), list(training.settings))
                    # A rate that decays to the end of a run has none here.
                    measured = asdict(cost(replace(config, schedule=ScheduleConfig()), mesh))
                    about = {"cost_hardware": device(), "cost_commit": commit()}
                    file.write_text(json.dumps({**measured, **about}))
                found[name, length] = json.loads(file.read_text())
        return found


@dataclass(frozen=True, kw_only=True, slots=True)
class Cost:
    """Milliseconds of one sample on an otherwise idle device."""

    train_ms: float
    """A step of training, divided by its samples."""
    score_ms: float
    """Scoring one candidate after a history, divided by the samples of the batch."""


def cost(config: TrainConfig, mesh: Mesh) -> Cost:
    """What a sample of the run's full length costs, in batches of the run's size."""
    data = config.data
    lens = np.full(data.global_batch_size, data.max_history_len)
    step_ms = measure(Case(config, lens), mesh, steps=TURNS)["step_ms"]
    resolved = resolve(config, dataset_info(data))
    model = build_parallel(resolved, make_plan(resolved, machine_of(mesh)), mesh)
    model.module.eval()
    inputs = made_up_batch(resolved, lens).to(mesh.device).inputs
    times = []
    for _ in range(1 + TURNS):
        start = time.perf_counter()
        with torch.no_grad():
            model.score(inputs)
        synchronize(mesh)
        times.append(1e3 * (time.perf_counter() - start))
    return Cost(train_ms=step_ms / len(lens), score_ms=statistics.median(times[1:]) / len(lens))


def slope(rows: Mapping[str, Mapping[str, Any]], lengths: Sequence[str], cost: str) -> float:
    """What NE falls for each unit of cost, by least squares; NaN for fewer than two lengths."""
    if len(lengths) < 2:
        return float("nan")
    costs = np.array([rows[length][cost] for length in lengths])
    gains = -np.array([statistics.mean(rows[length]["ne"]) for length in lengths])
    return float(np.polyfit(costs, gains, 1)[0])


def _result(own: Sequence[tuple[int, tuple[str, ...], Trained]], jobs: int) -> dict[str, Any]:
    """What the report says of a row's finished runs."""
    return {
        "date": datetime.date.today().isoformat(),
        "commit": sorted({found.commit for _, _, found in own}),
        "hardware": sorted({found.hardware for _, _, found in own}),
        "settings": list(own[0][1]) if own else [],
        "side_by_side": jobs,
        "seeds": [seed for seed, _, _ in own],
        "ne": [found.evaluations[-1][f"ne/{LABEL}"] for _, _, found in own],
        "auc": [found.evaluations[-1][f"auc/{LABEL}"] for _, _, found in own],
        "seconds": [found.seconds for _, _, found in own],
    }


def _mean(values: Sequence[float]) -> str:
    return f"{statistics.mean(values):.4f}" if values else ""


_WINDOW = {"local": 128, "global_rows": 128}
LENGTH = Lengths(
    towers={
        "HSTU": Tower(stages=({"num_layers": 4},), lengths=(1024, 4096, 16384)),
        "ULTRA-HSTU": Tower(
            stages=({"num_layers": 2, **_WINDOW}, {"num_layers": 2, **_WINDOW, "keep_newest": 512}),
            lengths=(1024, 4096, 16384, 65536),
        ),
    },
    lags=(256, 32768),
    samples=16384,
    settings=(
        f"data.path={SYNTHETIC_PATH}",
        "data.synthetic.lengths=constant",
        # Few items, all alike: what they have in common is learnt from few samples.
        "data.synthetic.num_items=16",
        "data.synthetic.item_exponent=0",
        "data.synthetic.num_candidates=16",
        "data.global_batch_size=32",
        "data.eval_batch_size=32",
        "data.num_epochs=1",
        "data.unknown_share=0",
        "data.reader_threads=4",
        'model.labels=[{"name": "match"}]',
        "model.dim=128",
        "model.layer.qk_dim=64",
        "model.layer.value_dim=64",
        "model.layer.dropout=0",
        "sparse_optimizer.learning_rate=0.02",
        "evaluation.baseline=false",
        "checkpoint.every_steps=null",
    ),
)

# The tower of `yambda_ultra`, and HSTU's of as many layers.
_WIDE = {"local": 256, "global_rows": 256}
SCORING = replace(
    LENGTH,
    towers={
        "HSTU": Tower(stages=({"num_layers": 18},), lengths=(1024, 4096, 16384), tokens=2),
        "HSTU, one token an event": Tower(stages=({"num_layers": 18},), lengths=(1024, 4096, 16384)),
        "ULTRA-HSTU": Tower(
            stages=({"num_layers": 6, **_WIDE}, {"num_layers": 12, "keep_newest": 1024, **_WIDE}),
            lengths=(1024, 4096, 16384),
        ),
    },
    settings=(
        *(each for each in LENGTH.settings if not each.startswith("model.")),
        f'model.labels=[{{"name": "{LABEL}"}}]',
        "model.dim=512",
        "model.layer.num_heads=4",
        "model.layer.qk_dim=128",
        "model.layer.value_dim=128",
        "model.layer.dropout=0",
        "embedding_dim=512",
    ),
    trained=False,
)
"""What it costs at the authors' width and depth, where a GPU has something to do."""
