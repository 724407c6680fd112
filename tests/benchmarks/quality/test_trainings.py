"""Trainings of benchmarks: done once, and cut off at their limit with what they had by then."""

import json
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks.quality.trainings import Training, commit, score_all, train, train_all, with_known_seeds


@pytest.fixture
def training(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Training:
    """Its process adds an evaluation and ends; that of `failing` fails, of another recipe waits for ever."""
    package = tmp_path / "trainer"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "__main__.py").write_text(
        "import os, sys, threading\n"
        "if sys.argv[2] == 'failing':\n"
        "    sys.exit(1)\n"
        "if sys.argv[1] == 'train' and sys.argv[2] != 'short':\n"
        "    threading.Event().wait()\n"
        "name = sys.argv[4] + '/eval.jsonl' if sys.argv[1] == 'train' else sys.argv[2] + '/eval_later.jsonl'\n"
        "open(name, 'a').write('{\"step\": 1}\\n')\n"
        "open('threads', 'w').write(os.environ['OMP_NUM_THREADS'])\n"
    )
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "a").mkdir(parents=True)
    return Training(recipe="short", run=tmp_path / "runs" / "a", settings=())


def test_a_training_that_is_done_is_not_done_again(training: Training) -> None:
    first, again = train(training), train(training)
    assert first == again
    assert (first.evaluations, first.commit) == (({"step": 1},), commit())
    assert json.loads((training.run / "finished.json").read_text())["seconds"] == first.seconds


def test_a_finished_training_is_scored_on_other_data_once(training: Training) -> None:
    unfinished = replace(training, run=training.run.with_name("b"))
    trained = train(training)
    for _ in range(2):
        found, nothing = score_all([training, unfinished], Path("later"), jobs=1)
        assert (found.evaluations, found.seconds) == (({"step": 1},), trained.seconds)
        assert (nothing.evaluations, nothing.seconds) == ((), None)


def test_at_the_limit_runs_are_cut_off_and_none_begins(training: Training) -> None:
    (training.run / "eval.jsonl").write_text('{"step": 5}\n')
    waits = replace(training, recipe="long")
    unbegun = replace(waits, run=training.run.with_name("b"))
    cut, none = train_all([waits, unbegun], jobs=1, limit_s=0.1)
    assert (cut.evaluations, cut.seconds) == (({"step": 5},), None)
    assert (none.evaluations, none.seconds) == ((), None)
    assert not unbegun.run.exists()


def test_trainings_side_by_side_share_the_cores(training: Training, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(32))
    for jobs, threads in ((5, 6), (1, 32), (40, 1)):
        (training.run / "finished.json").unlink(missing_ok=True)
        train_all([training], jobs=jobs)
        assert int(Path("threads").read_text()) == threads


def test_one_that_fails_stops_none_of_the_others(training: Training) -> None:
    fails = replace(training, recipe="failing", run=training.run.with_name("b"))
    with pytest.raises(SystemExit, match=r"failed: see .*b\.log"):
        train_all([fails, training], jobs=1)
    assert (training.run / "finished.json").is_file()


def row_of(seeds: Sequence[int], commit: str, setting: str = "a=1") -> dict[str, Any]:
    values = [f"{commit}{seed}" for seed in seeds]
    settings = [f"seed={seeds[0]}", f"data.seed={seeds[0]}", setting]
    about = {"commit": [commit], "hardware": ["a GPU"], "settings": settings}
    return {"seeds": list(seeds), "ne": values, "metrics": {"auc": values}, **about}


def test_seeds_that_were_not_trained_again_stay_where_they_were_of_the_same_settings() -> None:
    values = ("ne", "metrics")
    joined = with_known_seeds(row_of([2, 4], "b"), row_of([0, 1, 2, 3], "a"), values)
    of_seeds = ["a0", "a1", "b2", "a3", "b4"]
    assert (joined["seeds"], joined["ne"], joined["metrics"]) == ([0, 1, 2, 3, 4], of_seeds, {"auc": of_seeds})
    assert joined["commit"] == ["a", "b"]
    again = row_of([0, 1], "b")
    for known in (row_of([1], "a"), row_of([0, 1, 2], "a", "a=2"), None):
        assert with_known_seeds(again, known, values) == again
