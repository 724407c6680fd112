"""A day is shown as the run's files have it."""

import json
from pathlib import Path

from benchmarks.days import METRICS, RESULTS, days, table


def test_committed_days_were_scored_before_they_were_trained_on() -> None:
    result = json.loads(RESULTS.read_text())
    # Each is scored after all before it have been trained on, and never again.
    steps = [day["step"] for day in result["days"]]
    assert steps == sorted(steps) and len({day["day"] for day in result["days"]}) == len(steps) > 6


def test_days_are_read_from_a_run(tmp_path: Path) -> None:
    values = {f"{name}/long_view": 0.5 for name in METRICS}
    (tmp_path / "progressive.jsonl").write_text(json.dumps({"step": 3, "part": "day-001", **values}) + "\n")
    (tmp_path / "eval.jsonl").write_text(
        "".join(json.dumps({"step": step, **values, "auc/long_view": step / 10}) + "\n" for step in (4, 6))
    )
    first, last = days(tmp_path)
    assert (first["day"], first["step"], first["auc"]) == ("day-001", 3, 0.5)
    assert (last["day"], last["step"], last["auc"]) == ("the last day", 6, 0.6)
    assert "| the last day | 6 | 0 | 0.500 | 0.500 | 0.600 +- 0.500 | 0.500 | +0.100 |" in table({"days": [last]})


def test_a_day_of_one_class_and_a_torn_line_are_no_failure(tmp_path: Path) -> None:
    """Undefined metrics are null, a run without a baseline has none, one that still writes may stand in a line."""
    known = {"positives/long_view": 0.0, "ne/long_view": None, "auc/long_view": None, "auc_95/long_view": None}
    line = json.dumps({"step": 3, "part": "day-001", **known})
    (tmp_path / "progressive.jsonl").write_text(f"{line}\n{line[:30]}")
    assert "| day-001 | 3 | 0 | - | - | - +- - | - | - |" in table({"days": days(tmp_path)})
