"""docs/quality.md shows the demo's evaluation that is committed, and a label is shown as the run's file has it."""

import json
from pathlib import Path

from benchmarks.days import METRICS
from benchmarks.demo import RESULTS, labels, table

ROOT = Path(__file__).resolve().parents[2]


def test_the_document_shows_the_committed_evaluation() -> None:
    result = json.loads(RESULTS.read_text())
    assert table(result) in (ROOT / "docs" / "quality.md").read_text()
    assert result["labels"]["is_click"]["auc"] > result["labels"]["is_click"]["auc_baseline"] + 0.02


def test_labels_are_read_from_a_runs_newest_evaluation(tmp_path: Path) -> None:
    values = {f"{name}/like": 0.5 for name in METRICS}
    lines = [json.dumps({"step": step, **values, "auc/like": step / 10}) for step in (4, 6)]
    (tmp_path / "eval.jsonl").write_text("\n".join(lines) + "\n")
    found = labels(tmp_path)
    assert list(found) == ["like"]
    assert "| like | 0 | 0.500 | 0.500 | 0.600 +- 0.500 | 0.500 | +0.100 |" in table({"labels": found})
