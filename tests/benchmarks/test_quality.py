"""Tables of quality: the pass is chosen without the last events, and what is shown is what is committed."""

import json
from pathlib import Path

import pytest

from benchmarks import quality
from benchmarks.quality import METRICS, RESULTS, TABLES, Cell, Row, table
from benchmarks.trainings import Trained
from trainer.recipes import load_recipe
from trainer.typed_values import apply_overrides

ROOT = Path(__file__).resolve().parents[2]
ROWS = [(name, row) for name, each in TABLES.items() for row in each.rows]


def line(step: int, ndcg: float) -> dict[str, float]:
    return {"step": step, **dict.fromkeys(METRICS, 0.5), "ndcg@10": ndcg}


@pytest.fixture
def cell(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Cell:
    """10 passes over 1,280 samples of the one data set, and over 2,560 of the other, in batches of 128."""
    monkeypatch.setattr(Cell, "_samples", lambda self, data: 1280 if data == self.data(1) else 2560)
    return Cell("movielens", Row(recipe="ml1m_hstu", prepare=("--leave-last", "1")), "gr", tmp_path)


def test_the_pass_is_chosen_without_the_last_events_and_the_same_pass_is_tested(cell: Cell) -> None:
    assert f"data.path={cell.data(1)}" in cell.choosing().settings
    assert "evaluation.every_steps=50" in cell.choosing().settings
    validated = Trained(evaluations=(line(50, 0.1), line(60, 0.3), line(100, 0.2)), seconds=1)
    passes = cell.best_pass(validated)
    assert passes == 6
    testing = cell.testing(3, passes)
    assert {f"data.path={cell.data(0)}", "evaluation.every_steps=120", "seed=3"} <= set(testing.settings)
    # After the chosen pass the run is better on what it is tested on, which must not count.
    tested = Trained(evaluations=(line(120, 0.4), line(200, 0.9)), seconds=2)
    found = cell.result(validated, passes, [tested])
    assert (found["pass"], found["test"]["ndcg@10"], found["seconds"]) == (6, [0.4], [2])
    assert list(found["validation"]) == ["5.0", "6.0", "10.0"]


def test_where_nothing_is_chosen_the_last_pass_counts(cell: Cell) -> None:
    passes = cell.last_pass
    assert passes == load_recipe("ml1m_hstu").data.num_epochs
    found = cell.result(None, passes, [Trained(evaluations=(line(120, 0.9), line(2020, 0.4)), seconds=2)])
    assert (found["pass"], found["test"]["ndcg@10"], found["validation"]) == (passes, [0.4], {})


@pytest.mark.parametrize(("name", "row"), ROWS)
def test_a_row_is_a_recipe_with_settings_that_it_takes(name: str, row: Row) -> None:
    config = apply_overrides(load_recipe(row.recipe), list(row.settings))
    assert config.data.num_epochs >= row.every_passes
    assert "--leave-last" in row.prepare and "--drop-last" not in row.prepare, name


@pytest.mark.parametrize("name", list(TABLES))
def test_the_results_page_shows_what_is_committed(name: str) -> None:
    report = json.loads((ROOT / RESULTS / f"quality_{name}.json").read_text())
    assert table(report) in (ROOT / "docs" / "quality.md").read_text()
    assert set(report["rows"]) <= {row.recipe for row in TABLES[name].rows}


def test_the_commit_of_a_result_names_the_code() -> None:
    assert quality.commit()
