"""Which start goes back to an older checkpoint: the first of a job, not one that a launcher repeats."""

from pathlib import Path

import pytest

from trainer.command_line import WrongUse
from trainer.run.going_back import JOBS, has_gone_back, note_going_back
from trainer.run.run_dir import RunDir


@pytest.mark.parametrize(("job", "restarts"), JOBS)
def test_a_job_goes_back_to_a_step_once(
    job: str, restarts: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = RunDir(tmp_path)
    for names in JOBS:
        for name in names:
            monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(job, "17")
    monkeypatch.setenv(restarts, "1")
    assert not has_gone_back(run, 4), "it was started again before it came so far"
    note_going_back(run, 4)
    assert has_gone_back(run, 4)
    assert not has_gone_back(run, 2), "another step"
    monkeypatch.setenv(job, "18")
    assert not has_gone_back(run, 4), "another job"
    monkeypatch.setenv(job, "17")
    monkeypatch.setenv(restarts, "0")
    assert not has_gone_back(run, 4), "a person types the command once more"
    monkeypatch.delenv(job)
    monkeypatch.delenv(restarts)
    assert not has_gone_back(run, 4), "no launcher"


def test_a_start_that_does_not_go_back_notes_nothing(tmp_path: Path) -> None:
    note_going_back(RunDir(tmp_path), None)
    assert not list(tmp_path.iterdir())


def test_a_damaged_note_is_named_with_what_to_do(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    run.back_file.write_text('{"step": 4')
    with pytest.raises(WrongUse, match=r"back\.json is not valid JSON .*: remove it, and the job goes back once more"):
        has_gone_back(run, 4)
