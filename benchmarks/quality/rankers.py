"""Rankers beside each other on equal data, inputs and training: what is measured of a row, and its table.

A row is the recipe `own_log` on a public log with settings of its own.  Counts of items and users, which rankers start
from otherwise, are left out of the inputs: histories are all that tells users apart.  Differences are paired: a row
minus the first, seed by seed, with the interval that Student's t gives their mean.
"""

import datetime
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch

from benchmarks.quality.trainings import (
    Asked,
    Trained,
    Training,
    folder_of,
    prepare,
    seeded,
    train_all,
    with_known_seeds,
)
from trainer.steps.step_log import peak_flops

RECIPE = "own_log"
RATES = "rates of items and users"
T_95 = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78, 6: 2.57, 7: 2.45, 8: 2.36, 9: 2.31, 10: 2.26}
"""97.5% quantiles of Student's t by the number of seeds."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Log:
    """A log in our own protocol: trained on what came before a time, evaluated on what came after."""

    name: str
    folder: str
    """Folder of its files under the source, and of what becomes of it."""
    prepare: tuple[str, ...]
    """Arguments of `pipelines.prepare`, but for --source and --out."""
    labels: tuple[str, ...]
    """What is predicted and shown."""
    telling: str
    """An action that tells more than most events do, `$TELLING` in settings."""
    source: str | None = None
    """Folder of its files, where another log has them too."""

    def prepared(self, asked: Asked) -> Path:
        """The prepared data, made if it is not there."""
        out = asked.work / "data" / self.folder
        prepare(out, [self.prepare[0], "--source", str(asked.source / (self.source or self.folder)), *self.prepare[1:]])
        return out


@dataclass(frozen=True, kw_only=True, slots=True)
class Rankers:
    """Rows on logs."""

    logs: tuple[Log, ...]
    rows: Mapping[str, tuple[str, ...]]
    """Settings by name; what the others are compared with stands first."""
    settings: tuple[str, ...]
    """Settings of all rows."""

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the rows."""
        return tuple(self.rows)

    def measure(self, asked: Asked, report: dict[str, Any]) -> None:
        """Run what was asked for and put what ends of it into the report; what that says of the rest stays."""
        data = {log.name: log.prepared(asked) for log in self._logs(asked)}
        runs = [
            (log, name, self.training(log, name, seed, asked, data[log.name]))
            for log in self._logs(asked)
            for name in self.names
            if name in asked.rows
            for seed in asked.of_seeds
        ]
        trained = train_all([run for _, _, run in runs], asked.jobs, asked.limit_s)
        logs, rates = report.setdefault("logs", {}), report.setdefault("rates", {})
        for log in self._logs(asked):
            done = [
                (name, run, each)
                for (place, name, run), each in zip(runs, trained, strict=True)
                if place == log and each.seconds is not None
            ]
            if not done:
                continue
            found = {row: [(run, each) for name, run, each in done if name == row] for row in asked.rows}
            known = logs.get(log.name, {})
            rows = known | {
                row: with_known_seeds(_result(log, own, asked.jobs), known.get(row), ("metrics", "gflops", "seconds"))
                for row, own in found.items()
                if own
            }
            logs[log.name] = {name: rows[name] for name in self.names if name in rows}
            rates[log.name] = _of_rates(log, done[0][2])

    def _logs(self, asked: Asked) -> list[Log]:
        return [log for log in self.logs if not asked.logs or log.folder in asked.logs]

    def training(self, log: Log, name: str, seed: int, asked: Asked, data: Path) -> Training:
        """A row's run of a seed on a log."""
        labels = "model.labels=" + json.dumps([{"name": label} for label in log.labels])
        own = [each.replace("$TELLING", log.telling) for each in self.rows[name]]
        return Training(
            recipe=RECIPE,
            run=asked.work / "runs" / f"{log.folder}-{folder_of(name)}-{seed}",
            settings=(f"data.path={data}", *seeded(seed), labels, *self.settings, *own, *asked.settings),
        )

    def table(self, report: Mapping[str, Any]) -> str:
        """The report in Markdown: of the first row means, of the others what they differ by."""
        logs, rates = report["logs"], report["rates"]
        return "\n\n".join(_of_log(log, logs[log.name], rates.get(log.name)) for log in self.logs if log.name in logs)


EQUAL = (
    "model.input.counts=[]",
    "data.max_history_len=256",
    "data.global_batch_size=128",
    "checkpoint.every_steps=null",
)
KUAIRAND = Log(
    name="KuaiRand-Pure",
    folder="kuairand",
    prepare=("kuairand", "--no-counts"),
    labels=("is_click", "long_view", "is_like"),
    telling="is_like",
)
MOVIELENS = Log(
    name="MovieLens-1M",
    folder="movielens",
    prepare=("movielens", "--no-counts", "--max-history", "256"),
    labels=("rated_3_or_more", "rated_4_or_more", "rated_5"),
    telling="rated_5",
)


def _stages(*stages: Mapping[str, int]) -> str:
    return "model.stages=" + json.dumps(stages)


def _layer(variant: str) -> tuple[str, ...]:
    return (f"model.layer.variant={variant}",)


_SEMI_LOCAL = {"local": 32, "global_rows": 32}
_ULTRA = _stages({"num_layers": 1, **_SEMI_LOCAL}, {"num_layers": 1, **_SEMI_LOCAL, "keep_newest": 128})
RANKING = Rankers(
    logs=(KUAIRAND, MOVIELENS),
    rows={
        "HSTU": ("model.input.merge=interleave", "model.max_len=1024"),
        "ULTRA-HSTU": (_ULTRA,),
        "softmax Transformer": _layer("softmax"),
        "SASRec": _layer("last_event"),
        # It has no values: their width is left as it comes.
        "DIN": (*_layer("target_attention"), "model.layer.value_dim=128", _stages({"num_layers": 1})),
    },
    settings=EQUAL,
)
_CHANNELS = [
    {"name": "all", "dim": 32, "stages": [{"num_layers": 2}]},
    {"name": "liked", "dim": 32, "stages": [{"num_layers": 2}], "actions": ["$TELLING"]},
]
ABLATION = Rankers(
    logs=(MOVIELENS, KUAIRAND),
    rows={
        "one token an event, all of it seen": (),
        "K1 = 32, K2 = 32": (_stages({"num_layers": 2, **_SEMI_LOCAL}),),
        "K1 = 0 (K2 = 32)": (_stages({"num_layers": 2, "local": 0, "global_rows": 32}),),
        "K2 = 0 (K1 = 32)": (_stages({"num_layers": 2, "local": 32}),),
        "prefix columns (K1 = 32, 32 oldest)": (_stages({"num_layers": 2, "local": 32, "global_columns": 32}),),
        "truncation: second layer on 64": (_stages({"num_layers": 1}, {"num_layers": 1, "keep_newest": 64}),),
        "one layer, at candidates alone": (_stages({"num_layers": 1}),),
        "mixture of transducers": (
            "model.stages=[]",
            "model.channels=" + json.dumps(_CHANNELS),
            "model.layer.num_heads=1",
        ),
        "stochastic length": ("data.stochastic_length.mode=plain",),
        "load-balanced stochastic length": (
            "data.stochastic_length.mode=load_balanced",
            "data.stochastic_length.warmup_batches=20",
        ),
        "two tokens an event": ("model.input.merge=interleave", "model.max_len=1024"),
        "candidates with a learned action": ("model.input.candidate_action=learned",),
        "softmax": _layer("softmax"),
        "production layer": ("model.layer.variant=production",),
        "histories of 64": ("data.max_history_len=64",),
    },
    settings=EQUAL,
)


def _of_length(length: int, stages: str) -> tuple[str, ...]:
    return (f"data.max_history_len={length}", f"model.max_len={2 * length + 512}", stages)


LENGTHS = (64, 256, 1024, 2048)
_FULL = _stages({"num_layers": 2})
HISTORIES = Rankers(
    logs=(
        replace(
            MOVIELENS,
            folder="movielens_long",
            source="movielens",
            prepare=("movielens", "--no-counts", "--max-history", str(max(LENGTHS)), "--candidates", "64"),
        ),
    ),
    rows={
        **{f"HSTU, one token an event, {length:,} events": _of_length(length, _FULL) for length in LENGTHS},
        **{f"ULTRA-HSTU, {length:,} events": _of_length(length, _ULTRA) for length in LENGTHS[1:]},
    },
    settings=tuple(each for each in EQUAL if not each.startswith("data.max_history_len=")),
)
"""The longest real histories at hand: what more of them are worth to whom."""


def _measured(log: Log) -> list[str]:
    return [f"{kind}/{label}" for label in log.labels for kind in ("ne", "auc")]


def _of_rates(log: Log, trained: Trained) -> dict[str, float]:
    """What the rates of items and users in the training split predict of a log; no seed changes it."""
    return {key: trained.evaluations[-1][key.replace("/", "_baseline/")] for key in _measured(log)}


def _result(log: Log, runs: Sequence[tuple[Training, Trained]], jobs: int) -> dict[str, Any]:
    """What the report says of a row on a log: its finished runs, by seed."""
    return {
        "date": datetime.date.today().isoformat(),
        "commit": sorted({each.commit for _, each in runs}),
        "hardware": sorted({each.hardware for _, each in runs}),
        "settings": [each for each in runs[0][0].settings if not each.startswith("data.path=")],
        "side_by_side": jobs,
        "seeds": [int(run.run.name.rsplit("-", 1)[1]) for run, _ in runs],
        "metrics": {key: [each.evaluations[-1][key] for _, each in runs] for key in _measured(log)},
        "gflops": [_gflops(run.run) for run, _ in runs],
        "seconds": [each.seconds for _, each in runs],
    }


def _gflops(run: Path) -> float | None:
    """GFLOP of the dense model's training on the mean sample; None where the run's GPU has no known peak."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    found = [line["mfu"] / line["samples_per_s"] for line in lines if "mfu" in line]
    peak = peak_flops(torch.device("cuda")) if found else None
    return None if peak is None else round(mean(found) * peak / 1e9, 3)


def _of_log(log: Log, rows: Mapping[str, Any], rates: Mapping[str, float] | None) -> str:
    measured = _measured(log)
    head = [log.name, "seeds", *(f"{label}: {kind.upper()}" for kind, label in (key.split("/") for key in measured))]
    lines = ["| " + " | ".join([*head, "GFLOP"]) + " |", "| --- |" + " --- |" * (len(measured) + 2)]
    first = next(iter(rows.values()))
    if rates is not None:
        lines.append("| " + " | ".join([RATES, "", *(f"{rates[key]:.4f}" for key in measured), ""]) + " |")
    for name, cell in rows.items():
        values = [_cell(cell, None if cell is first else first, key) for key in measured]
        known = [each for each in cell["gflops"] if each is not None]
        cost = f"{mean(known):.2f}" if known else ""
        lines.append("| " + " | ".join([name, str(len(cell["seeds"])), *values, cost]) + " |")
    return "\n".join(lines)


def _cell(cell: Mapping[str, Any], first: Mapping[str, Any] | None, key: str) -> str:
    """A mean, or the mean of the differences from the first row of the same seeds, with its interval."""
    of_seed = dict(zip(cell["seeds"], cell["metrics"][key], strict=True))
    if not of_seed:
        return ""
    if first is None:
        return f"{mean(of_seed.values()):.4f}"
    others = dict(zip(first["seeds"], first["metrics"][key], strict=True))
    differences = [value - others[seed] for seed, value in of_seed.items() if seed in others]
    if not differences:
        return ""
    if len(differences) == 1:
        return f"{differences[0]:+.4f}"
    interval = T_95[len(differences)] * stdev(differences) / len(differences) ** 0.5
    return f"{mean(differences):+.4f} +- {interval:.4f}"
