"""A run directory refuses another run's configuration, and its metric files never repeat a step."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from trainer.run_dir import COMPLETE, JsonLines, RunDir, locked, write_json

CONFIG = {"name": "demo", "max_steps": 10, "seed": 1, "checkpoint": {"every": 5}}


def test_only_folders_with_the_complete_file_are_checkpoints(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    for step in (5, 10, 15):
        run.checkpoint(step).mkdir(parents=True)
    (run.checkpoint(5) / COMPLETE).touch()
    (run.checkpoint(10) / COMPLETE).touch()
    assert run.complete_steps() == [5, 10]
    assert run.step_to_load(None) == 10
    assert run.step_to_load(5) == 5
    with pytest.raises(ValueError, match="step 15: its checkpoint has no file COMPLETE"):
        run.step_to_load(15)
    with pytest.raises(ValueError, match=r"step 7: it has no checkpoint \(complete steps: 5, 10\)"):
        run.step_to_load(7)


def test_an_empty_run_has_nothing_to_load(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no complete checkpoint"):
        RunDir(tmp_path).step_to_load(None)


def test_settings_that_do_not_change_the_numbers_may_change(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    write_json(run.config_file, CONFIG)
    run.check_same_run({**CONFIG, "max_steps": 99, "checkpoint": {"every": 1}})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 2}, "seed=1, now 2"),
        ({"name": "other"}, "recipe 'demo', not 'other'"),
        ({"new": 1}, "new=null, now 1"),
    ],
)
def test_another_run_is_refused(tmp_path: Path, change: dict[str, object], message: str) -> None:
    run = RunDir(tmp_path)
    write_json(run.config_file, CONFIG)
    with pytest.raises(ValueError, match=message):
        run.check_same_run({**CONFIG, **change})


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(ValueError, match="no run"):
        RunDir(tmp_path).check_same_run(CONFIG)
    with pytest.raises(ValueError, match="is a file"):
        RunDir(tmp_path / "thesis.tex").check_same_run(CONFIG)


def test_json_lines_never_repeat_a_step_and_drop_a_torn_line(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"st')
    lines = JsonLines(path)
    assert not lines.append({"step": 2})
    assert lines.append({"step": 3})
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2, 3]


def test_an_older_step_that_is_not_there_is_added(tmp_path: Path) -> None:
    lines = JsonLines(tmp_path / "eval.jsonl")
    assert lines.append({"step": 8}) and lines.append({"step": 4}) and not lines.append({"step": 8})


def test_an_undefined_metric_is_null(tmp_path: Path) -> None:
    path = tmp_path / "eval.jsonl"
    JsonLines(path).append({"step": 1, "auc/click": float("nan"), "ne/click": 0.5})
    assert path.read_text() == '{"step": 1, "auc/click": null, "ne/click": 0.5}\n'


HOLD_THE_LOCK = """
import pathlib, sys, time
from trainer.run_dir import RunDir, locked
with locked(RunDir(pathlib.Path(sys.argv[1]))):
    print("locked", flush=True)
    time.sleep(600)
"""


def test_one_process_trains_a_run_at_a_time(tmp_path: Path) -> None:
    run = RunDir(tmp_path / "run")
    other = subprocess.Popen([sys.executable, "-c", HOLD_THE_LOCK, str(run.path)], stdout=subprocess.PIPE, text=True)
    assert other.stdout is not None
    assert other.stdout.readline() == "locked\n"
    with pytest.raises(ValueError, match=f"is being trained by another job .process {other.pid} on "), locked(run):
        pytest.fail("locked twice")
    # However it ends.
    other.kill()
    other.communicate()
    with locked(run):
        pass
    with locked(run):
        pass
    # A new run, as far as its configuration goes.
    run.check_same_run(CONFIG)
