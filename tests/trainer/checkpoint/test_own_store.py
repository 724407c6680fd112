"""A store holds the checkpoints of one run, whatever other runs are told of it."""

import json
import shutil
from pathlib import Path

import pytest

from tests.support.training import read_lines, run_trainer, run_training, train
from trainer.checkpoint.catalogue import Catalogue
from trainer.checkpoint.store import LocalStore


@pytest.fixture
def settings(tmp_path: Path) -> tuple[str, ...]:
    return (f"checkpoint.store={tmp_path / 'store'}", "checkpoint.every_steps=2")


def test_a_run_goes_on_from_no_other_runs_checkpoints(settings: tuple[str, ...], tmp_path: Path) -> None:
    first, other = tmp_path / "first", tmp_path / "other"
    train(first, 1, *settings, "max_steps=2")
    before = sorted((tmp_path / "store").rglob("*"))
    status, output = run_training(other, 1, *settings, "max_steps=4", "optimizer.learning_rate=0.1")
    assert status == 2 and f"checkpoint.store={tmp_path / 'store'} holds the checkpoints of another run" in output
    assert sorted((tmp_path / "store").rglob("*")) == before and not other.exists()
    # The run itself goes on, from wherever its directory lies, and whoever reads it finds its checkpoints.
    moved = tmp_path / "moved"
    first.rename(moved)
    status, output = run_training(moved, 2, *settings, "max_steps=4")
    assert status == 0 and "ends at step" not in output, output[-3000:]
    lines = (moved / "metrics.jsonl").read_text().splitlines(keepends=True)
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3, 4]
    assert run_trainer("evaluate", str(moved))[0] == 0
    # From a backup that is older than its checkpoints it goes on, and says what is lost.
    (moved / "metrics.jsonl").write_text("".join(lines[:2]))
    status, output = run_training(moved, 1, *settings, "max_steps=5")
    told = f"{moved / 'metrics.jsonl'} ends at step 2 and the newest checkpoint is of step 4"
    assert status == 0 and told in output, output[-3000:]
    # Who has lost the first run's directory says so.
    (tmp_path / "store" / "RUN").unlink()
    assert [line["step"] for line in train(other, 1, *settings, "max_steps=6")] == [6]
    status, output = run_trainer("evaluate", str(moved))
    assert status == 2 and "holds the checkpoints of another run" in output


def test_of_two_runs_that_began_together_one_ends_before_it_saves(settings: tuple[str, ...], tmp_path: Path) -> None:
    """Of a sweep, for example; or a run whose directory was copied while it trained."""
    run = tmp_path / "run"
    train(run, 1, *settings, "max_steps=2")
    store = tmp_path / "store"
    named = (store / "RUN").read_text()
    catalogue = Catalogue(LocalStore(store))
    catalogue.claim("0123456789abcdef")
    catalogue.check_claim()
    (store / "RUN").write_text(named)
    with pytest.raises(ValueError, match="another job saves to"):
        catalogue.check_claim()
    # A copy is the same run: it may go on, and the original after it.
    shutil.copytree(run, tmp_path / "copy")
    assert read_lines(run / "metrics.jsonl")
    train(tmp_path / "copy", 1, *settings, "max_steps=3")
