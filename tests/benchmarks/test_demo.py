"""A label of the demo is shown as the run's file has it."""

import json
from pathlib import Path

from benchmarks.days import METRICS
from benchmarks.demo import RESULTS, labels, table


def test_the_committed_evaluation_is_ahead_of_the_rates() -> None:
    result = json.loads(RESULTS.read_text())
    assert result["labels"]["is_click"]["auc"] > result["labels"]["is_click"]["auc_baseline"] + 0.02


def test_labels_are_read_from_a_runs_newest_evaluation(tmp_path: Path) -> None:
    values = {f"{name}/like": 0.5 for name in METRICS}
    lines = [json.dumps({"step": step, **values, "auc/like": step / 10}) for step in (4, 6)]
    (tmp_path / "eval.jsonl").write_text("\n".join(lines) + "\n")
    found = labels(tmp_path)
    assert list(found) == ["like"]
    assert "| like | 0 | 0.500 | 0.500 | 0.600 +- 0.500 | 0.500 | +0.100 |" in table({"labels": found})
