"""Tables of quality: the pass is chosen without the last events, and what is shown is what is committed."""

import json
from pathlib import Path
from types import SimpleNamespace

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


def trained(*evaluations: dict[str, float], seconds: float | None = 2) -> Trained:
    return Trained(evaluations=evaluations, seconds=seconds, hardware="a GPU", commit="abc")


@pytest.fixture
def cell(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Cell:
    """101 passes over 2,560 samples in batches of 128, or over 1,280 without the last events."""

    def read(path: str) -> SimpleNamespace:
        return SimpleNamespace(splits={"train": SimpleNamespace(samples=1280 if "/gr-1" in path else 2560)})

    monkeypatch.setattr(quality, "read_dataset_info", read)
    return Cell("movielens", Row(recipe="ml1m_hstu", prepare=("--leave-last", "1")), "gr", tmp_path)


def test_the_pass_is_chosen_without_the_last_events_and_that_pass_is_read_of_the_tests(cell: Cell) -> None:
    assert {f"data.path={cell.data(1)}", "evaluation.every_steps=100"} <= set(cell.choosing().settings)
    assert {f"data.path={cell.data(0)}", "evaluation.every_steps=200", "seed=3"} <= set(cell.testing(3).settings)
    validated = trained(line(100, 0.1), line(200, 0.3), line(300, 0.2))
    # After the chosen pass a test is better, which must not count.
    tests = [trained(line(200, 0.4), line(400, 0.5), line(600, 0.9)), trained(line(200, 0.3), seconds=None)]
    found = cell.result(validated, tests)
    assert (found["pass"], found["test"]["ndcg@10"], found["seconds"]) == (20, [0.5], [2])
    assert list(found["validation"]) == ["10", "20", "101"]


def test_where_nothing_is_chosen_the_end_of_finished_runs_counts(cell: Cell) -> None:
    tests = [trained(line(200, 0.9), line(2020, 0.4)), trained(line(200, 0.8), line(400, 0.7), seconds=None)]
    found = cell.result(None, tests)
    assert (found["pass"], found["test"]["ndcg@10"], found["validation"]) == (101, [0.4], {})


def test_what_a_run_had_before_it_was_cut_off_counts(cell: Cell) -> None:
    found = cell.result(
        trained(line(100, 0.2), line(200, 0.3), seconds=None), [trained(line(200, 0.1), line(400, 0.2), seconds=None)]
    )
    assert (found["pass"], found["test"]["ndcg@10"], found["seconds"]) == (20, [0.2], [])


@pytest.mark.parametrize(("name", "row"), ROWS)
def test_a_row_is_a_recipe_with_settings_that_it_takes(name: str, row: Row) -> None:
    config = apply_overrides(load_recipe(row.recipe), list(row.settings))
    assert config.data.num_epochs >= row.every_passes
    assert "--leave-last" in row.prepare and "--drop-last" not in row.prepare, name


@pytest.mark.parametrize("name", list(TABLES))
def test_the_results_page_shows_what_is_committed(name: str) -> None:
    report = json.loads((ROOT / RESULTS / f"quality_{name}.json").read_text())
    assert table(report) in (ROOT / "docs" / "quality.md").read_text()
    assert set(report["rows"]) <= {row.name for row in TABLES[name].rows}
