"""A run of two ranks with all that is watched of one: a trace of some steps, metrics in training, and a target."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

from tests.support.training import read_lines, train
from trainer.command_line import WrongUse, parse_window

TARGET = ("evaluation.every_steps=1", "evaluation.first_step=4", "evaluation.target=auc/is_click>=0.01", "max_steps=6")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    """Its directory, and what it logged."""
    folder = tmp_path_factory.mktemp("run")
    return folder, train(folder, 2, *TARGET, options=("--profile", "2:2"))


def test_windows_are_a_step_and_a_count() -> None:
    assert parse_window("3:2") == (3, 2)
    for text in ("3", "0:2", "3:0", "-1:2", "a:b", "3:2:1"):
        with pytest.raises(WrongUse, match="--profile must be STEP:COUNT"):
            parse_window(text)


def test_each_rank_writes_a_trace_of_the_steps_asked_for(run: tuple[Path, list[dict[str, Any]]]) -> None:
    folder, _ = run
    traces = sorted((folder / "profile").iterdir())
    assert [path.name for path in traces] == [f"steps-2-to-3-rank-{rank}.json" for rank in (0, 1)]
    for trace in traces:
        names = [event.get("name") for event in json.loads(trace.read_text())["traceEvents"]]
        # A range stands in a trace once for each step, and not for those before and after.
        for stage in ("longview: tower", "longview: loss"):
            assert names.count(stage) == 2, stage
        assert any("forward" in str(name) for name in names)
    said = (folder / "logs" / "rank-0.log").read_text()
    assert said.count("profile of steps 2 to 3: ") == 1 and str(traces[0]) in said


def test_what_is_trained_on_is_measured(run: tuple[Path, list[dict[str, Any]]]) -> None:
    _, lines = run
    for line in lines:
        assert 0 <= line["data_wait"] <= 1
        assert line["ne/is_click"] > 0 and 0 <= line["auc/is_click"] <= 1 and line["calibration/is_click"] > 0
    first, last = lines[0], lines[-1]
    assert first["lifetime_ne/is_click"] == first["ne/is_click"]
    windows = [line["ne/is_click"] for line in lines]
    assert min(windows) < last["lifetime_ne/is_click"] < max(windows)
    assert not math.isnan(last["lifetime_auc/is_click"])


def test_training_ends_at_its_target_and_stays_there(run: tuple[Path, list[dict[str, Any]]]) -> None:
    folder, lines = run
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    (record,) = read_lines(folder / "eval.jsonl")
    assert record["step"] == 4 and record["auc_baseline/is_click"] > 0
    # The same command again has nothing to do.
    assert len(train(folder, 1, *TARGET)) == 4
    assert len(read_lines(folder / "eval.jsonl")) == 1
