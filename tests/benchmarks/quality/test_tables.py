"""Tables of quality: the pass is chosen without the last events, and what was known of rows that were cut off stays."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks.quality import next_item, rankers
from benchmarks.quality import tables as quality
from benchmarks.quality.next_item import METRICS, ML1M, Cell, Row
from benchmarks.quality.rankers import ABLATION, HISTORIES, RANKING, RATES, RECIPE, Rankers
from benchmarks.quality.trainings import Asked, Trained, Training
from tests.support.batches import small_selection
from trainer.models.ranker import build_ranker_tower
from trainer.recipes import load_recipe
from trainer.typed_values import apply_overrides


def line(step: int, ndcg: float) -> dict[str, float]:
    return {"step": step, **dict.fromkeys(METRICS, 0.5), "ndcg@10": ndcg}


def trained(*evaluations: dict[str, float], seconds: float | None = 2) -> Trained:
    return Trained(evaluations=evaluations, seconds=seconds, hardware="a GPU", commit="abc")


@pytest.fixture
def cell(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Cell:
    """101 passes over 2,560 samples in batches of 128, or over 1,280 without the last events."""

    def read(path: str) -> SimpleNamespace:
        return SimpleNamespace(splits={"train": SimpleNamespace(samples=1280 if "/gr-1" in path else 2560)})

    monkeypatch.setattr(next_item, "read_dataset_info", read)
    return Cell("movielens", Row(recipe="ml1m_hstu", prepare=("--leave-last", "1")), "gr", tmp_path)


def test_the_pass_is_chosen_without_the_last_events_and_that_pass_is_read_of_the_tests(cell: Cell) -> None:
    assert {f"data.path={cell.data(1)}", "evaluation.every_steps=100"} <= set(cell.choosing().settings)
    assert {f"data.path={cell.data(0)}", "evaluation.every_steps=200", "seed=3"} <= set(cell.testing(3).settings)
    validated = trained(line(100, 0.1), line(200, 0.3), line(300, 0.2))
    # After the chosen pass a test is better, which must not count.
    tests = {3: trained(line(200, 0.4), line(400, 0.5), line(600, 0.9)), 4: trained(line(200, 0.3), seconds=None)}
    found = cell.result(validated, tests)
    assert (found["pass"], found["seeds"], found["test"]["ndcg@10"], found["seconds"]) == (20, [3], [0.5], [2])
    assert list(found["validation"]) == ["10", "20", "101"]


def test_where_nothing_is_chosen_the_end_of_finished_runs_counts(cell: Cell) -> None:
    tests = {0: trained(line(200, 0.9), line(2020, 0.4)), 1: trained(line(200, 0.8), line(400, 0.7), seconds=None)}
    found = cell.result(None, tests)
    assert (found["pass"], found["test"]["ndcg@10"], found["validation"]) == (101, [0.4], {})


def test_what_a_run_had_before_it_was_cut_off_counts(cell: Cell) -> None:
    found = cell.result(
        trained(line(100, 0.2), line(200, 0.3), seconds=None),
        {0: trained(line(200, 0.1), line(400, 0.2), seconds=None)},
    )
    assert (found["pass"], found["test"]["ndcg@10"], found["seconds"]) == (20, [0.2], [None])


def test_further_seeds_join_those_that_are_known_of_the_same_pass(
    cell: Cell, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    ndcg = [0.4]
    monkeypatch.setattr(next_item, "train_all", lambda runs, *_: [trained(line(2020, ndcg[0])) for _ in runs])
    monkeypatch.setattr(next_item, "prepare", lambda *_: None)
    report: dict[str, Any] = {}
    asked = Asked(source=tmp_path, work=tmp_path, rows=("ml1m_hstu",), seeds=2, jobs=5, last_pass=True, orders=("gr",))
    for ndcg[0], first_seed in ((0.4, 0), (0.5, 1)):
        ML1M.measure(replace(asked, first_seed=first_seed), report)
    found = report["rows"]["ml1m_hstu"]["orders"]["gr"]
    assert (found["seeds"], found["test"]["ndcg@10"], found["seconds"]) == ([0, 1, 2], [0.4, 0.5, 0.5], [2, 2, 2])
    assert "| 101 |  | 3 | .5000 +- .0000 | .4667 +- .0577 |" in ML1M.table(report)
    found["pass"] = 40
    ML1M.measure(replace(asked, seeds=1), report)
    assert report["rows"]["ml1m_hstu"]["orders"]["gr"]["seeds"] == [0]


@pytest.mark.parametrize("ended", [False, True])
def test_a_cell_of_which_nothing_ended_leaves_what_is_known_of_it(
    ended: bool, cell: Cell, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def train_all(runs: list[Training], *_: object) -> list[Trained]:
        return [trained(line(2020, 0.4), seconds=2 if ended else None) for _ in runs]

    monkeypatch.setattr(next_item, "train_all", train_all)
    monkeypatch.setattr(next_item, "prepare", lambda *_: None)
    known = {"pass": 40}
    report: dict[str, Any] = {"rows": {"ml1m_hstu": {"orders": {"gr": known}}}}
    asked = Asked(source=tmp_path, work=tmp_path, rows=("ml1m_hstu", "ml1m_sasrec"), seeds=1, jobs=5, last_pass=True)
    ML1M.measure(asked, report)
    assert (report["rows"]["ml1m_hstu"]["orders"]["gr"] is known) is not ended
    assert ("ml1m_sasrec" in report["rows"]) is ended
    assert not ended or report["rows"]["ml1m_hstu"]["orders"]["log"]["side_by_side"] == 4


def test_a_row_without_trainings_of_its_own_scores_those_of_another(
    cell: Cell, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    scored: list[tuple[str, str]] = []

    def score_all(runs: list[Training], data: Path, _: int) -> list[Trained]:
        scored.extend((run.run.name, data.name) for run in runs)
        return [trained(line(7, 0.3)) for _ in runs]

    monkeypatch.setattr(next_item, "train_all", lambda runs, *_: [trained(line(7, 0.4)) for _ in runs])
    monkeypatch.setattr(next_item, "score_all", score_all)
    monkeypatch.setattr(next_item, "prepare", lambda *_: None)
    name, known = "ml1m_longview", "ml1m_longview, 199 films known"
    asked = Asked(source=tmp_path, work=tmp_path, rows=(name, known), seeds=2, jobs=1, last_pass=True, orders=("gr",))
    ML1M.measure(asked, report := dict[str, Any]())
    assert [run for run, _ in scored] == ["ml1m_longview-gr-test-0", "ml1m_longview-gr-test-1"]
    assert all(data.endswith("max-history199") for _, data in scored)
    assert [report["rows"][each]["orders"]["gr"]["test"]["ndcg@10"] for each in (name, known)] == [[0.4] * 2, [0.3] * 2]


@pytest.mark.parametrize("row", ML1M.rows, ids=ML1M.names)
def test_a_row_is_a_recipe_with_settings_that_it_takes(row: Row) -> None:
    config = apply_overrides(load_recipe(row.recipe), list(row.settings))
    assert config.data.num_epochs >= row.every_passes
    assert "--leave-last" in row.prepare and "--drop-last" not in row.prepare


RANKER_ROWS = [(named, name) for named in (RANKING, ABLATION, HISTORIES) for name in named.rows]


@pytest.mark.parametrize(("named", "name"), RANKER_ROWS, ids=[name for _, name in RANKER_ROWS])
def test_a_row_of_rankers_is_a_model_that_can_be_built(named: Rankers, name: str, tmp_path: Path) -> None:
    asked = Asked(source=tmp_path, work=tmp_path, rows=(name,), seeds=1, jobs=1)
    for log in named.logs:
        config = apply_overrides(load_recipe(RECIPE), list(named.training(log, name, 0, asked, tmp_path).settings))
        selection = small_selection((), columns=False)
        widths = {"item": config.embedding_dim}
        build_ranker_tower(
            config.model,
            selection=selection,
            widths=widths,
            action_names=(log.telling,),
            output_bits=[None] * len(log.labels),
        )


def cell_of(seeds: list[int], values: list[float]) -> dict[str, Any]:
    names = [f"{kind}/{label}" for label in ABLATION.logs[0].labels for kind in ("ne", "auc")]
    return {"seeds": seeds, "metrics": dict.fromkeys(names, values), "gflops": [None] * len(seeds)}


def test_rankers_are_compared_seed_by_seed_with_the_first_row() -> None:
    """Differences .01 and .03 of the seeds that both have: mean .02, and 12.71 standard errors of .01."""
    first, *others = ABLATION.names
    rows = {first: cell_of([0, 1, 2], [0.8, 0.6, 0.7]), others[0]: cell_of([0, 2], [0.81, 0.73])}
    log = ABLATION.logs[0].name
    rates = dict.fromkeys(rows[first]["metrics"], 0.9)
    assert (
        ABLATION.table({"logs": {log: rows}, "rates": {log: rates}})
        .splitlines()[2]
        .startswith(f"| {RATES} |  | 0.9000 |")
    )
    lines = ABLATION.table({"logs": {log: rows}, "rates": {}}).splitlines()
    assert lines[2].startswith(f"| {first} | 3 | 0.7000 |")
    assert lines[3].startswith(f"| {others[0]} | 2 | +0.0200 +- 0.1271 |")


def test_a_row_whose_runs_are_all_cut_off_leaves_what_is_known_of_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    first, second = ABLATION.names[:2]
    log = ABLATION.logs[0]
    values = {f"{kind}{of}/{label}": 0.8 for label in log.labels for kind in ("ne", "auc") for of in ("", "_baseline")}

    def train_all(runs: list[Training], *_: object) -> list[Trained]:
        for run in runs:
            run.run.mkdir(parents=True)
            (run.run / "metrics.jsonl").touch()
        return [trained({"step": 1, **values}, seconds=None if "K1" in run.run.name else 2) for run in runs]

    monkeypatch.setattr(rankers, "train_all", train_all)
    monkeypatch.setattr(rankers, "prepare", lambda *_: None)
    known = {"logs": {log.name: {second: cell_of([0], [0.5])}}}
    asked = Asked(source=tmp_path, work=tmp_path, rows=(first, second), seeds=2, jobs=1, logs=(log.folder,))
    ABLATION.measure(asked, report := dict(known))
    rows = report["logs"][log.name]
    assert (rows[first]["seeds"], rows[second]) == ([0, 1], cell_of([0], [0.5]))
    assert report["rates"][log.name] == dict.fromkeys(rows[first]["metrics"], 0.8)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--table", "ml1m", "--rows", "ml1m_hstv"], "--rows names 'ml1m_hstv', but table ml1m has ml1m_sasrec; "),
        (["--table", "ranking", "--orders", "gr"], "--orders names 'gr', but table ranking has none"),
        (
            ["--table", "ablation", "--logs", "netflix"],
            "--logs names 'netflix', but table ablation has movielens; kuairand",
        ),
        (["--table", "ranking", "--seeds", "11"], "--seeds must lie in 0 to 10"),
        (["--table", "ranking", "--jobs", "0"], "--jobs be at least 1, got 5 and 0"),
    ],
)
def test_what_a_table_does_not_have_is_said_before_anything_is_trained(
    given: list[str], said: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["quality", *given, "--work", str(tmp_path / "work")])
    with pytest.raises(SystemExit):
        quality.main()
    assert said in capsys.readouterr().err and not (tmp_path / "work").exists()
