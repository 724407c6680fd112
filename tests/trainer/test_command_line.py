"""Mistakes on the command line are answered with one line and exit status 2, before anything is written."""

import gc
import json
import os
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import typer

from embeddings.records import from_dict
from trainer.command_line import lasting, run_command
from trainer.commands import app
from trainer.recipes import RECIPES, load_recipe
from trainer.run.run_dir import RunDir
from trainer.run.writing import write_json
from trainer.typed_values import apply_overrides, to_dict


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "nothing"], "unknown recipe 'nothing': known are dlrm_v4, kuairand_days"),
        (["train", "kuairand_sample", "--set", "a=1"], "unknown key 'a'"),
        (
            ["train", "kuairand_sample", "--set", "log_every=1", "max_steps=soon"],
            "'max_steps' must be an integer or null",
        ),
        (["train", "kuairand_sample", "--set", "log_every"], "not of the form key=value"),
        (["train", "kuairand_sample", "--fast"], "No such option: --fast"),
        (["train"], "Missing argument 'RECIPE'"),
        (["fly"], "No such command 'fly'"),
        (["plan", "kuairand_sample"], "Missing option '--world-size'"),
        (["plan", "kuairand_sample", "--world-size", "0"], "Invalid value for '--world-size'"),
        (["plan", "kuairand_sample", "--world-size", "12", "--local-world-size", "8"], "local_world_size=8"),
        (
            ["plan", "kuairand_sample", "--world-size", "8", "--set", "placement.machine=h900-8"],
            "unknown machine 'h900-8'",
        ),
        (["plan", "kuairand_sample", "--world-size", "8", "--set", "placement.machine=cpu-2"], "nodes with GPUs"),
        (["train", "kuairand_sample", "--set", "placement.machine=h900-8"], "unknown machine 'h900-8'"),
    ],
)
def test_wrong_use_is_one_line_and_status_two(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_command(app, arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error and error.count("\n") == 1


def test_other_ranks_leave_the_line_to_the_first(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "1")
    assert run_command(app, ["train", "nothing"]) == 2
    assert capsys.readouterr().err == ""


def test_a_plan_says_which_machine_it_is_for_and_how_its_rates_were_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = tmp_path / "own.json"
    rates = {"device": 3000, "within_node": 400, "across_nodes": 40, "host_link": 50}
    node = {"gpus": 4, "hbm_gib": 70, "host_gib": 500, "rates": rates, "calibration": "measured on a Tuesday"}
    own.write_text(json.dumps(node))
    command = ["plan", "kuairand_sample", "--world-size", "8", "--set", f"placement.machine={own}"]
    assert run_command(app, command) == 0
    assert "8 cuda ranks (2 x 4), 70 GiB each, rates measured on a Tuesday" in capsys.readouterr().out
    # What the command line says goes before the file.
    assert run_command(app, [*command, "--hbm-gib", "60", "--local-world-size", "8"]) == 0
    assert "8 cuda ranks (1 x 8), 60 GiB each, rates measured on a Tuesday" in capsys.readouterr().out


def test_recipes_are_listed_with_a_line_each(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(app, ["recipes"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list(RECIPES) and all(len(line.split()) > 3 for line in lines)


@pytest.mark.parametrize("name", list(RECIPES))
def test_every_recipe_survives_the_trip_through_json(name: str) -> None:
    config = load_recipe(name)
    assert config.name == name
    assert from_dict(type(config), to_dict(config)) == config


def test_run_directory_of_another_run_is_refused_untouched(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = RunDir(tmp_path)
    write_json(run.config_file, to_dict(apply_overrides(load_recipe("kuairand_sample"), ["seed=7"])))
    before = run.config_file.read_bytes()
    assert run_command(app, ["train", "kuairand_sample", "--run-dir", str(tmp_path)]) == 2
    assert "was trained with seed=7, now 0" in capsys.readouterr().err
    write_json(run.config_file, json.loads(before) | {"name": "another"})
    assert run_command(app, ["train", "kuairand_sample", "--run-dir", str(tmp_path)]) == 2
    assert "holds a run of recipe 'another'" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


def test_missing_data_is_a_failure_and_leaves_no_run_directory(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir, data = tmp_path / "run", tmp_path / "nothing"
    arguments = ["train", "kuairand_sample", "--run-dir", str(run_dir), "--set", f"data.path={data}"]
    assert run_command(app, arguments) == 1
    assert f"{data}/dataset.json does not exist" in capsys.readouterr().err
    assert not run_dir.exists()


def test_checkpoint_without_complete_cannot_be_evaluated(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = RunDir(tmp_path)
    write_json(run.config_file, to_dict(load_recipe("kuairand_sample")))
    (run.checkpoints / "step-00000005").mkdir(parents=True)
    assert run_command(app, ["evaluate", str(tmp_path), "--step", "5"]) == 2
    assert "no file COMPLETE" in capsys.readouterr().err
    assert run_command(app, ["evaluate", str(tmp_path)]) == 2
    assert "holds no complete checkpoint" in capsys.readouterr().err


def test_the_first_step_waits_for_no_import_that_it_does_not_need() -> None:
    """torchmetrics imports what it finds of libraries for pictures and texts, which took 6 of 20 s on a GPU machine."""
    needless = ("torchmetrics", "torchrec.metrics", "torchx", "duckdb", "matplotlib", "scipy", "pandas", "transformers")
    code = f"import sys, trainer.jobs.train; print(sorted(set({needless}) & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


class _Circle:
    def __init__(self) -> None:
        self.itself = self


@pytest.mark.parametrize("fails", [False, True])
def test_what_lasts_is_not_looked_at_for_garbage_and_all_else_is(fails: bool) -> None:
    gc.collect()
    try:
        with lasting():
            kept = weakref.ref(_Circle())
            if fails:
                raise ImportError
    except ImportError:
        pass
    later = weakref.ref(_Circle())
    gc.collect()
    assert gc.isenabled() and later() is None and (kept() is None) == fails
    gc.unfreeze()
    gc.collect()
    assert kept() is None


@pytest.mark.parametrize(
    ("encoding", "name", "status"), [("iso8859-1", "\u043c", 2), ("iso8859-1", "plain", 0), ("utf-8", "\u043c", 0)]
)
def test_a_name_that_a_locale_writes_otherwise_than_others_read_it_is_refused(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], encoding: str, name: str, status: int
) -> None:
    monkeypatch.setattr(sys, "getfilesystemencoding", lambda: encoding)
    made = typer.Typer()

    @made.command()
    def take(word: str) -> None:
        del word

    assert run_command(made, [name]) == status
    assert ("encoding is iso8859-1" in capfd.readouterr().err) == (status == 2)


@pytest.mark.parametrize(("given", "spins"), [(None, "'20000'"), ("active", "'30000000000'")])
def test_threads_of_operations_wait_busily_for_a_short_while_unless_asked(given: str | None, spins: str) -> None:
    """As libgomp, PyTorch's, says itself when it is loaded: how often a thread looks before it sleeps."""
    told = {name: value for name, value in os.environ.items() if name not in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")}
    told |= {"OMP_DISPLAY_ENV": "VERBOSE"} | ({} if given is None else {"OMP_WAIT_POLICY": given})
    command = [sys.executable, "-m", "trainer", "plan", "kuairand_sample", "--world-size", "2"]
    done = subprocess.run(command, env=told, capture_output=True, text=True, check=True)
    assert f"GOMP_SPINCOUNT = {spins}" in done.stderr
