"""Trainings of benchmarks: done once, and cut off at their limit with what they had by then."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.trainings import Training, commit, train, train_all


@pytest.fixture
def training(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Training:
    """Its process adds an evaluation and ends; that of `failing` fails, of another recipe waits for ever."""
    package = tmp_path / "trainer"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "__main__.py").write_text(
        "import sys, threading\n"
        "if sys.argv[2] == 'failing':\n"
        "    sys.exit(1)\n"
        "if sys.argv[2] != 'short':\n"
        "    threading.Event().wait()\n"
        "open(sys.argv[4] + '/eval.jsonl', 'a').write('{\"step\": 1}\\n')\n"
    )
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "a").mkdir(parents=True)
    return Training(recipe="short", run=tmp_path / "runs" / "a", settings=())


def test_a_training_that_is_done_is_not_done_again(training: Training) -> None:
    first, again = train(training), train(training)
    assert first == again
    assert (first.evaluations, first.commit) == (({"step": 1},), commit())
    assert json.loads((training.run / "finished.json").read_text())["seconds"] == first.seconds


def test_at_the_limit_runs_are_cut_off_and_none_begins(training: Training) -> None:
    (training.run / "eval.jsonl").write_text('{"step": 5}\n')
    waits = replace(training, recipe="long")
    unbegun = replace(waits, run=training.run.with_name("b"))
    cut, none = train_all([waits, unbegun], jobs=1, limit_s=0.1)
    assert (cut.evaluations, cut.seconds) == (({"step": 5},), None)
    assert (none.evaluations, none.seconds) == ((), None)
    assert not unbegun.run.exists()


def test_one_that_fails_stops_none_of_the_others(training: Training) -> None:
    fails = replace(training, recipe="failing", run=training.run.with_name("b"))
    with pytest.raises(SystemExit, match=r"failed: see .*b\.log"):
        train_all([fails, training], jobs=1)
    assert (training.run / "finished.json").is_file()
