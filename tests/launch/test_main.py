"""The command line: in processes in which torch cannot be imported and, where that is beside the point, in this one."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from launch.__main__ import app
from trainer.command_line import run_command

ROOT = Path(__file__).resolve().parents[2]

# Runs `python -m launch` with the import of torch, and of everything that needs it, failing.
WITHOUT_TORCH = """
import runpy, sys
for name in ("torch", "torchrec", "fbgemm_gpu", "triton", "numpy", "pyarrow"):
    sys.modules[name] = None
sys.argv[0] = "launch"
runpy.run_module("launch", run_name="__main__")
"""

SUBMIT = ("submit", "kuairand_sample", "--scheduler", "local_cwd", "--nodes", "1", "--procs-per-node", "2")


def _launch(*arguments: str, folder: Path = ROOT) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", WITHOUT_TORCH, *arguments],
        cwd=folder,
        # No Docker engine answers at that address, whatever runs on this machine.
        env={"PYTHONPATH": str(ROOT), "PATH": "/nowhere", "HOME": str(folder), "DOCKER_HOST": "unix:///nowhere"},
        capture_output=True,
        text=True,
        check=False,
    )


Here = Callable[..., tuple[int, str]]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Here:
    """Run a command in this process, in an empty folder: its exit status and its one line on standard error."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", "/nowhere")

    def run(*arguments: str) -> tuple[int, str]:
        status = run_command(app, list(arguments))
        (line,) = capsys.readouterr().err.splitlines()
        return status, line

    return run


@pytest.mark.parametrize("command", [(), ("submit",), ("sweep",), ("logs",)])
def test_help(command: tuple[str, ...]) -> None:
    done = _launch(*command, "--help")
    assert done.returncode == 0, done.stderr
    assert "--help" in done.stdout


@pytest.mark.parametrize("scheduler", ["local_cwd", "slurm"])
def test_dry_run_prints_the_job_and_writes_nothing(scheduler: str, tmp_path: Path) -> None:
    size = ("--nodes", "2", "--procs-per-node", "4")
    done = _launch("submit", "kuairand_sample", "--scheduler", scheduler, *size, "--dry-run", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "launch.node" in done.stdout
    assert str(tmp_path / "runs" / "kuairand_sample") in done.stdout
    assert list(tmp_path.iterdir()) == []


def test_set_takes_several_values(tmp_path: Path) -> None:
    done = _launch(*SUBMIT, "--dry-run", "--set", "data.num_epochs=1", "embedding_dim=16", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("--set ") == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "Missing command"),
        (("submit",), "Missing argument 'RECIPE'"),
        (("submit", "nope", *SUBMIT[2:]), "unknown recipe 'nope': known are "),
        ((*SUBMIT, "--bad"), "No such option: --bad"),
        ((*SUBMIT, "--set", "data.nope=1"), "unknown key 'data.nope'"),
        ((*SUBMIT, "--set", "data.num_epochs=x"), "key 'data.num_epochs' must be"),
        ((*SUBMIT[:-1], "0"), "Invalid value for '--procs-per-node'"),
        ((*SUBMIT, "--option", "x"), "--option 'x' is not KEY=VALUE"),
        (("status", "17"), "'17' is no job handle: expected SCHEDULER://SESSION/ID"),
        (("list", "--scheduler", "lsf"), "unknown scheduler 'lsf'"),
        (("logs", "slurm://longview/1", "--rank", "0", "--node", "0"), "--rank, --node and --all name different logs"),
        (("logs", "slurm://longview/1", "--rank", "0", "--all"), "--rank, --node and --all name different logs"),
    ],
)
def test_wrong_use_is_one_line_and_status_2(arguments: tuple[str, ...], message: str, here: Here) -> None:
    status, line = here(*arguments)
    assert status == 2
    assert line.startswith(f"error: {message}")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("status", "local_cwd://longview/never"), "local_cwd knows no job local_cwd://longview/never"),
        (("cancel", "local_cwd://longview/never"), "no local job never was submitted from this checkout"),
        (("status", "slurm://longview/1"), "scontrol is not installed: run this where Slurm's commands are"),
    ],
)
def test_failures_are_one_line_and_status_1(arguments: tuple[str, ...], message: str, here: Here) -> None:
    status, line = here(*arguments)
    assert status == 1
    assert line.startswith(f"error: {message}")


def test_a_plan_is_read_before_anything_is_sent(tmp_path: Path, here: Here) -> None:
    def error_of(plan: Path) -> str:
        status, line = here(*SUBMIT, "--plan", str(plan))
        assert status == 2
        return line

    plan = tmp_path / "plan.json"
    assert error_of(plan).startswith(f"error: --plan {plan} is not a plan ([Errno 2] No such file")
    plan.write_text("[]")
    assert error_of(plan).startswith(f"error: --plan {plan} is not a plan (list indices")
    plan.write_text('{"machine": {"world_size": 16}}')
    assert error_of(plan) == (
        f"error: --plan {plan} is for 16 processes, this job has 2: plan again with --world-size 2"
    )
    assert [path.name for path in tmp_path.iterdir()] == ["plan.json"]


def test_a_directory_that_is_no_run_of_this_recipe_is_left_alone(tmp_path: Path, here: Here) -> None:
    (tmp_path / "thesis.tex").write_text("precious")
    status, line = here(*SUBMIT, "--run-dir", str(tmp_path))
    assert status == 2
    assert line.startswith(f"error: --run-dir {tmp_path} exists and holds no config.json")
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_doctor_says_what_is_missing() -> None:
    done = _launch("doctor", "--scheduler", "slurm")
    assert done.returncode == 1
    assert done.stdout.splitlines() == ["BAD  sinfo is not installed: run this where Slurm's commands are"]


def test_an_engine_that_does_not_answer_is_one_line_and_status_1() -> None:
    done = _launch("list", "--scheduler", "local_docker")
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: Docker does not answer")
