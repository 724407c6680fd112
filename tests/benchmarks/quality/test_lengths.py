"""The table of lengths: its rows are models that train, cost is measured once, slopes are those of straight lines."""

import json
from dataclasses import replace
from itertools import repeat
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.cost import made_up_batch
from benchmarks.quality import lengths
from benchmarks.quality.lengths import LENGTH, RECIPE, SCORING, Cost, Lengths
from benchmarks.quality.trainings import Asked, Trained, Training
from pipelines.overlap import StepPipeline
from pipelines.reading.loader import dataset_info
from trainer.build import build_parallel, machine_of, make_plan
from trainer.config import TrainConfig
from trainer.parallel.mesh import Mesh
from trainer.recipes import load_recipe
from trainer.resolve import resolve
from trainer.typed_values import apply_overrides

TINY = replace(
    LENGTH,
    towers={name: replace(tower, lengths=(16, 32)) for name, tower in LENGTH.towers.items()},
    lags=(4, 16),
    samples=8,
    settings=(*LENGTH.settings, "model.dim=8", "model.layer.qk_dim=8", "model.layer.value_dim=8"),
)


def asked(folder: Path, **changes: Any) -> Asked:
    return replace(Asked(source=folder, work=folder, rows=TINY.names, seeds=2, jobs=1), **changes)


TABLES = {"length": LENGTH, "scoring": SCORING}
ROWS = {f"{kind} {name}": (table, name) for kind, table in TABLES.items() for name in table.names}


@pytest.mark.parametrize(("table", "name"), ROWS.values(), ids=ROWS)
def test_a_row_is_a_ranker_that_holds_its_histories(table: Lengths, name: str, tmp_path: Path) -> None:
    for length in table.towers[name].lengths:
        training = table.training(name, length, 0, asked(tmp_path))
        config = apply_overrides(load_recipe(RECIPE), list(training.settings))
        info = dataset_info(config.data)
        resolve(config, info)
        assert info.splits["train"].history_events == LENGTH.samples * length


def test_cost_is_of_one_sample_of_the_full_length(tmp_path: Path) -> None:
    """Both are measured on real steps of a real model; what they are is the machine's."""
    training = TINY.training(TINY.names[1], 32, 0, asked(tmp_path, settings=("data.global_batch_size=2",)))
    config = apply_overrides(load_recipe(RECIPE), list(training.settings))
    with lengths.joined(mesh := lengths.discover_mesh()):
        found = lengths.cost(replace(config, schedule=lengths.ScheduleConfig()), mesh)
    assert min(found.train_ms, found.score_ms) > 0


TABLE, RECORDED = (LENGTH, ("auto", "off")) if torch.cuda.is_available() else (TINY, ("off",))


@pytest.mark.parametrize("recorded", RECORDED)
@pytest.mark.parametrize(
    ("name", "length"), [(name, length) for name, tower in TABLE.towers.items() for length in tower.lengths]
)
def test_the_first_steps_of_a_row_have_finite_gradients(name: str, length: int, recorded: str, tmp_path: Path) -> None:
    """At the table's own sizes on a GPU, launched and recorded; not clipped, which would spread what is not finite."""
    own = ("optimizer.max_gradient_norm=null", f"recorded={recorded}")
    training = TABLE.training(name, length, 0, asked(tmp_path, settings=own))
    config = replace(apply_overrides(load_recipe(RECIPE), list(training.settings)), schedule=lengths.ScheduleConfig())
    resolved = resolve(config, dataset_info(config.data))
    with lengths.joined(mesh := lengths.discover_mesh()):
        model = build_parallel(resolved, make_plan(resolved, machine_of(mesh)), mesh)
        model.module.train()
        pipeline = StepPipeline(config.overlap, model.module, model.optimizers, mesh.device, model.loss)
        batches = repeat(made_up_batch(resolved, np.full(config.data.global_batch_size, length)).to(mesh.device))
        for step in range(1, 6):
            model.optimizers.set_step(step)
            loss = pipeline.step(batches)
            gradients = {name: each.grad for name, each in model.model.tower.named_parameters()}
            spoilt = [name for name, each in gradients.items() if each is not None and not each.isfinite().all()]
            assert loss.isfinite() and not spoilt, f"step {step}"
            assert any(each is not None and each.any() for each in gradients.values())


def test_what_was_measured_is_used_again_and_unfinished_runs_are_left_out(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    measured = []

    def cost(config: TrainConfig, _: Mesh) -> Cost:
        measured.append(config.data.max_history_len)
        return Cost(train_ms=1.0, score_ms=0.5)

    def train_all(runs: list[Training], jobs: int, limit_s: float | None) -> list[Trained]:
        line = {"ne/match": 0.9, "auc/match": 0.6}
        done = [None if str(run.run).endswith("-32-1") else 3.0 for run in runs]
        return [Trained(evaluations=(line,), seconds=seconds, hardware="a GPU", commit="abc") for seconds in done]

    monkeypatch.setattr(lengths, "cost", cost)
    monkeypatch.setattr(lengths, "train_all", train_all)
    report: dict[str, Any] = {}
    for _ in range(2):
        TINY.measure(asked(tmp_path), report)
    assert measured == [16, 32, 16, 32]
    row = json.loads(json.dumps(report))["rows"][TINY.names[1]]
    assert (row["16"]["seeds"], row["32"]["seeds"], row["32"]["train_ms"]) == ([0, 1], [0], 1.0)
    monkeypatch.setattr(
        lengths, "train_all", lambda runs, *_: [replace(each, seconds=None) for each in train_all(runs, 1, None)]
    )
    known = json.loads(json.dumps(report))
    TINY.measure(asked(tmp_path), report)
    assert report == known, "what nothing ended of stays as it is known"
    (tmp_path / "runs").rename(tmp_path / "runs_of_before")
    monkeypatch.setattr(lengths, "cost", lambda *_: Cost(train_ms=2.0, score_ms=1.0))
    TINY.measure(asked(tmp_path), report)
    cells = [(row["train_ms"], row["ne"]) for rows in report["rows"].values() for row in rows.values()]
    assert cells == [(2.0, row["ne"]) for rows in known["rows"].values() for row in rows.values()]


def rows_of(costs: dict[str, float], gains: dict[str, float]) -> dict[str, Any]:
    return {
        length: {"seeds": [0], "ne": [1 - gains[length]], "auc": [0.5], "train_ms": cost, "score_ms": cost / 2}
        for length, cost in costs.items()
    }


def test_slopes_are_compared_over_the_lengths_that_both_have() -> None:
    """HSTU gains .1 for 2 ms, ULTRA-HSTU .1 for .5 ms; what it gains beyond does not count."""
    hstu, ultra = TINY.names
    gains = {"16": 0.1, "32": 0.2, "64": 0.9}
    report = {
        "samples": 8,
        "rows": {
            hstu: rows_of({"16": 1.0, "32": 3.0}, gains),
            ultra: rows_of({"16": 1.0, "32": 1.5, "64": 2.5}, gains),
        },
    }
    assert "from 16 to 32 events, ULTRA-HSTU over HSTU: 4.0 times in training, 4.0 times" in TINY.table(report)
    for row in report["rows"][hstu].values():
        row["ne"] = [1.0]
    assert "times" not in TINY.table(report)
    alone = {"samples": 8, "rows": {ultra: report["rows"][ultra]}}
    assert "times" not in Lengths.table(TINY, alone)


def test_where_nothing_is_trained_what_further_events_cost_is_compared(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """HSTU's 3,072 events more cost 6 ms in training and 3 in scoring, ULTRA-HSTU's 1 and .25."""
    of_rows = {
        1024: {"HSTU": (2.0, 1.0), "ULTRA-HSTU": (1.0, 0.25)},
        4096: {"HSTU": (8.0, 4.0), "ULTRA-HSTU": (2.0, 0.5)},
    }

    def cost(config: TrainConfig, _: Mesh) -> Cost:
        name = "HSTU" if config.model.input.merge == "interleave" else "ULTRA-HSTU"
        train_ms, score_ms = of_rows[config.data.max_history_len][name]
        return Cost(train_ms=train_ms, score_ms=score_ms)

    monkeypatch.setattr(lengths, "cost", cost)
    names = ("HSTU", "ULTRA-HSTU")
    towers = {name: replace(SCORING.towers[name], lengths=tuple(of_rows)) for name in names}
    report: dict[str, Any] = {}
    replace(SCORING, towers=towers).measure(asked(tmp_path, rows=names), report)
    lines = replace(SCORING, towers=towers).table(report).splitlines()
    assert lines[3] == "| HSTU | 4,096 | 131.07 | 4.000 |"
    assert lines[-1].startswith(
        "An event more from 1,024 to 4,096 costs HSTU 6.0 times as much in training and 12.0 times"
    )
