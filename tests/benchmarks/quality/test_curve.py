"""A recipe trained to its end: its settings hold, and its curve has a point for every doubling of what was seen."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks.quality import curve
from benchmarks.quality.curve import YAMBDA
from benchmarks.quality.trainings import Asked, Trained, Training
from pipelines.reading.loader import dataset_info
from trainer.recipes import load_recipe
from trainer.resolve import resolve
from trainer.typed_values import apply_overrides


def asked(folder: Path) -> Asked:
    return Asked(source=folder, work=folder, rows=YAMBDA.names, seeds=1, jobs=1)


def test_the_recipe_keeps_its_layers_and_lengths(tmp_path: Path) -> None:
    recipe = load_recipe(YAMBDA.recipe)
    config = apply_overrides(recipe, list(YAMBDA.training(asked(tmp_path)).settings))
    resolve(config, dataset_info(config.data))
    assert replace(config.model, labels=recipe.model.labels) == recipe.model
    assert config.data.max_history_len == recipe.data.max_history_len == config.data.synthetic.max_len


def test_the_curve_has_a_point_for_every_doubling_and_the_end(tmp_path: Path) -> None:
    """Lines of 10, 20, .. 110 samples whose loss falls by one each: points at 10, 20, 40, 80 and 110."""
    lines = [
        {"samples": 10 * (i + 1), "loss": 11.0 - i, "ne/match": 1 - i / 100, "auc/match": 0.5 + i / 100}
        for i in range(11)
    ]
    file = tmp_path / "metrics.jsonl"
    file.write_text("\n".join(map(json.dumps, lines)))
    points = curve.curve(file)
    assert [point["samples"] for point in points] == [10, 20, 40, 80, 110]
    assert [point["loss"] for point in points] == [11, 10, 8.5, 5.5, 2]
    assert (points[-1]["ne"], points[-1]["auc"]) == (lines[-1]["ne/match"], lines[-1]["auc/match"])


@pytest.mark.parametrize("seconds", [None, 3.0])
def test_a_run_that_was_cut_off_is_not_the_tables(
    seconds: float | None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    line = {"samples": 32, "loss": 0.5, "ne/match": 0.9, "auc/match": 0.6}

    def train_all(runs: list[Training], *_: object) -> list[Trained]:
        runs[0].run.mkdir(parents=True)
        (runs[0].run / "metrics.jsonl").write_text(json.dumps(line))
        return [Trained(evaluations=(line,), seconds=seconds, hardware="a GPU", commit="abc")]

    monkeypatch.setattr(curve, "train_all", train_all)
    report: dict[str, Any] = {}
    YAMBDA.measure(asked(tmp_path), report)
    assert bool(report) == (seconds is not None)
    if report:
        text = YAMBDA.table(json.loads(json.dumps(report)))
        assert "| 32 | 0.5000 | 0.9000 | 0.6000 |" in text and "evaluation, after 3 s" in text
