"""The command line, in processes in which torch cannot be imported; mistakes are in `test_new_user.py`."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest

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


@pytest.mark.parametrize("command", [(), ("submit",), ("sweep",), ("logs",)])
def test_help(command: tuple[str, ...]) -> None:
    done = _launch(*command, "--help")
    assert done.returncode == 0, done.stderr
    assert "--help" in done.stdout


def test_an_interrupt_among_the_imports_ends_without_a_word(tmp_path: Path) -> None:
    (tmp_path / "typer.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGINT)\n")
    command = [sys.executable, "-m", "launch", "list", "--scheduler", "local_cwd"]
    done = subprocess.run(
        command, cwd=tmp_path, env={"PYTHONPATH": f"{tmp_path}:{ROOT}"}, capture_output=True, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (-signal.SIGINT, b"", b"")


@pytest.mark.parametrize(
    ("scheduler", "more"),
    [
        ("local_cwd", ()),
        ("slurm", ()),
        ("kubernetes", ("--image", "i", "--mount", "claim:/runs", "--run-dir", "/runs/kuairand_sample")),
    ],
)
def test_dry_run_prints_the_job_and_writes_nothing(scheduler: str, more: tuple[str, ...], tmp_path: Path) -> None:
    size = ("--nodes", "2", "--procs-per-node", "1")
    done = _launch("submit", "kuairand_sample", "--scheduler", scheduler, *size, *more, "--dry-run", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "launch.node" in done.stdout
    assert str(Path("/" if more else tmp_path, "runs", "kuairand_sample")) in done.stdout
    assert list(tmp_path.iterdir()) == []


def test_set_takes_several_values(tmp_path: Path) -> None:
    done = _launch(*SUBMIT, "--dry-run", "--set", "data.num_epochs=1", "embedding_dim=16", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "--set data.num_epochs=1 --set embedding_dim=16" in done.stdout


def test_steps_to_profile_are_checked_before_anything_is_sent(tmp_path: Path) -> None:
    done = _launch(*SUBMIT, "--profile", "100", folder=tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith("error: --profile must be STEP:COUNT")
    assert list(tmp_path.iterdir()) == []


def test_a_plan_for_another_job_is_refused_before_anything_is_sent(tmp_path: Path) -> None:
    plan = tmp_path / "plan.json"
    plan.write_text('{"machine": {"world_size": 16}}')
    done = _launch(*SUBMIT, "--plan", str(plan), folder=tmp_path)
    assert done.returncode == 2
    assert done.stderr == (
        f"error: --plan {plan} is for 16 processes, this job has 2: plan again with --world-size 2\n"
    )
    assert [path.name for path in tmp_path.iterdir()] == ["plan.json"]


def test_doctor_says_what_is_missing() -> None:
    done = _launch("doctor", "--scheduler", "slurm")
    assert done.returncode == 1
    assert done.stdout.splitlines() == ["BAD  sinfo is not installed: run this where Slurm's commands are"]


def test_an_engine_that_does_not_answer_is_one_line_and_status_1() -> None:
    done = _launch("list", "--scheduler", "local_docker")
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: Docker does not answer")
