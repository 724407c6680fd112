"""A run that is asked for a trace of some steps writes those, with their stages named; training metrics are logged."""

import json
import math
from pathlib import Path

import pytest

from tests.support.training import train
from trainer.command_line import WrongUse, parse_window


def test_windows_are_a_step_and_a_count() -> None:
    assert parse_window("3:2") == (3, 2)
    for text in ("3", "0:2", "3:0", "-1:2", "a:b", "3:2:1"):
        with pytest.raises(WrongUse, match="--profile must be STEP:COUNT"):
            parse_window(text)


def test_two_ranks_write_a_trace_each_and_log_what_they_learn_from(tmp_path: Path) -> None:
    overrides = ("max_steps=4", "evaluation.baseline=false")
    lines = train(tmp_path, 2, *overrides, options=("--profile", "2:2"))
    traces = sorted((tmp_path / "profile").iterdir())
    assert [path.name for path in traces] == [f"steps-2-to-3-rank-{rank}.json" for rank in (0, 1)]
    for trace in traces:
        names = [event.get("name") for event in json.loads(trace.read_text())["traceEvents"]]
        # A range stands in a trace once for each step, and not for those before and after.
        for stage in ("longview: tower", "longview: loss"):
            assert names.count(stage) == 2, stage
        assert any("forward" in str(name) for name in names)
    said = (tmp_path / "logs" / "rank-0.log").read_text()
    assert said.count("profile of steps 2 to 3: ") == 1 and str(traces[0]) in said
    for line in lines:
        assert 0 <= line["data_wait"] <= 1
        assert line["ne/is_click"] > 0 and 0 <= line["auc/is_click"] <= 1 and line["calibration/is_click"] > 0
    first, last = lines[0], lines[-1]
    assert first["lifetime_ne/is_click"] == first["ne/is_click"]
    windows = [line["ne/is_click"] for line in lines]
    assert min(windows) < last["lifetime_ne/is_click"] < max(windows)
    assert not math.isnan(last["lifetime_auc/is_click"])
