"""What goes wrong in a new user's first hour: each mistake is one line that names it, before anything is sent.

What shows on nodes only is in `on_slurm/test_cluster.py` (an interpreter or a partition that does not exist, 64
processes on 2 cores) and `on_slurm/test_fitness.py`; the same directory twice in `tests/integration/test_resume.py`.
"""

import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from launch import records
from launch.commands import app
from trainer.command_line import run_command

BARE_PYTHON = Path(sys.base_prefix, "bin", "python3")
"""The interpreter that this environment was made from, without its packages."""

LOCAL = ("submit", "kuairand_sample", "--scheduler", "local_cwd", "--nodes", "1", "--procs-per-node", "2")
SLURM = ("submit", "kuairand_sample", "--scheduler", "slurm", "--nodes", "2", "--procs-per-node", "8")
CLUSTER = ("submit", "kuairand_sample", "--scheduler", "kubernetes", "--nodes", "2", "--procs-per-node", "8")

Here = Callable[..., tuple[int, list[str]]]


@pytest.fixture
def here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], commands: Callable[..., None]
) -> Here:
    """Run a command in this process, in a folder with a file: its exit status and its lines on standard error."""
    (tmp_path / "file").write_text("precious")
    commands(
        sbatch='echo "sbatch: error: invalid partition specified: $(grep -o partition=.* $2)" >&2; exit 1',
        scontrol='echo "slurm_load_jobs error: Unable to contact slurm controller (connect failure)" >&2; exit 1',
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(records, "FILE", tmp_path / "jobs.jsonl")

    def run(*arguments: str) -> tuple[int, list[str]]:
        status = run_command(app, list(arguments))
        return status, capfd.readouterr().err.splitlines()

    return run


@pytest.mark.parametrize(
    ("arguments", "status", "line"),
    [
        # Typos.
        ((), 2, "Missing command"),
        (("submit",), 2, "Missing argument 'RECIPE'"),
        (("submit", "kuairand_sampel", *LOCAL[2:]), 2, "unknown recipe 'kuairand_sampel': known are "),
        ((*LOCAL[:3], "slrum", *LOCAL[4:]), 2, "unknown scheduler 'slrum': known are local_cwd, slurm"),
        ((*LOCAL, "--run_dir", "r"), 2, "No such option: --run_dir"),
        ((*LOCAL, "--set", "data.num_epoch=1"), 2, "unknown key 'data.num_epoch'"),
        ((*LOCAL, "--set", "data.num_epochs=x"), 2, "key 'data.num_epochs' must be"),
        ((*LOCAL, "--set", "max_steps"), 2, "override 'max_steps' is not of the form key=value"),
        ((*SLURM, "--option", "partition"), 2, "--option 'partition' is not KEY=VALUE"),
        ((*SLURM, "--option", "nodes=3"), 2, "--option nodes=3: the job sets sbatch's --nodes itself (from --nodes)"),
        (
            (*SLURM, "--option", "container-image=a/b"),
            2,
            "--option container-image=a/b: the job sets sbatch's --container-image itself (from --image)",
        ),
        ((*SLURM, "--machine", "h100"), 2, "unknown machine 'h100': known are "),
        (("status", "17"), 2, "'17' is no run directory and no handle of a job: expected SCHEDULER://SESSION/ID"),
        (("list", "--scheduler", "lsf"), 2, "unknown scheduler 'lsf'"),
        (("logs", "slurm://longview/1", "--rank", "0", "--node", "0"), 2, "--rank, --node and --all name different"),
        # Sizes.
        ((*LOCAL[:-1], "0"), 2, "Invalid value for '--procs-per-node'"),
        ((*LOCAL, "--nodes", "9999"), 2, "19998 processes on this machine, which has "),
        ((*SLURM, "--machine", "cpu-2"), 2, "--procs-per-node 8 on machine cpu-2, which has 2 cores"),
        # Places.
        ((*LOCAL, "--python", "/nowhere/python"), 2, "--python /nowhere/python is no program on this machine"),
        ((*LOCAL, "--run-dir", "file"), 2, "--run-dir {here}/file is a file: name a directory"),
        ((*LOCAL, "--run-dir", "."), 2, "--run-dir {here} exists and holds no config.json, so it is no run"),
        ((*LOCAL, "--run-dir", "file/x"), 2, "--run-dir {here}/file/x cannot be written (Not a directory): name one"),
        ((*SLURM, "--run-dir", "a/100%n"), 2, "--run-dir {here}/a/100%n: Slurm reads % and \\ in the names of files"),
        ((*SLURM, "--run-dir", "/proc/x"), 2, "--run-dir /proc/x cannot be written (No such file or directory)"),
        ((*SLURM, "--set", "data.path=nowhere"), 2, "data.path=nowhere names nothing in {here}: give an absolute path"),
        ((*LOCAL, "--set", "data.path=nowhere"), 2, "data.path=nowhere names nothing in {here}: give an absolute path"),
        ((*LOCAL, "--plan", "plan.json"), 2, "--plan plan.json is not a plan ([Errno 2] No such file"),
        ((*LOCAL, "--plan", "file"), 2, "--plan file is not a plan (Expecting value"),
        ((*CLUSTER,), 2, "scheduler kubernetes needs --image and --run-dir, a path inside the container"),
        # A scheduler that does not want it, or does not answer.
        (
            (*SLURM, "--run-dir", "r", "--option", "partition=gppu"),
            1,
            "sbatch failed: sbatch: error: invalid partition ",
        ),
        (("status", "slurm://longview/1"), 1, "scontrol failed: slurm_load_jobs error: Unable to contact slurm"),
        (("status", "local_cwd://longview/never"), 1, "local_cwd knows no job local_cwd://longview/never"),
        (("cancel", "local_cwd://longview/never"), 1, "no local job never was submitted from this checkout"),
    ],
)
def test_a_mistake_is_one_line(arguments: tuple[str, ...], status: int, line: str, here: Here, tmp_path: Path) -> None:
    answered, lines = here(*arguments)
    lines = [said for said in lines if not said.startswith("copying the code with the job")]
    assert (answered, len(lines)) == (status, 1), lines
    assert lines[0].startswith(f"error: {line.format(here=tmp_path)}")
    assert (tmp_path / "file").read_text() == "precious"
    assert not list(tmp_path.rglob("*.py"))


@pytest.mark.parametrize("arguments", [(*SLURM, "--run-dir", "r"), ("list", "--scheduler", "slurm")])
def test_a_machine_without_slurm_is_said(
    arguments: tuple[str, ...], here: Here, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    status, lines = here(*arguments)
    assert status == 1
    assert lines[-1].endswith(" is not installed: run this where Slurm's commands are")


def test_an_environment_without_torch_is_said(here: Here) -> None:
    status, (first, *_, last) = here(*LOCAL, "--run-dir", "r", "--python", str(BARE_PYTHON))
    assert status == 1
    assert first.startswith(f"error: {BARE_PYTHON} on ")
    assert "torch, torchrec, torchx, typer: name an interpreter with --python" in first
    assert last == "error: the job failed; its processes have said why above"


def test_a_folder_and_a_run_of_any_name_are_sent_as_they_are(
    here: Here, tmp_path: Path, commands: Callable[..., None]
) -> None:
    # What Slurm would do: read the job's folder from the script, enter it, and run the script's last line.
    commands(sbatch='for script; do :; done; test -f "$script" && echo 17')
    folder = tmp_path / 'l\'\u00e9t\u00e9 \u65e5\u672c $HOME "x"'
    folder.mkdir()
    os.chdir(folder)
    status, lines = here(*SLURM, "--run-dir", "my runs/a\tb #1")
    assert (status, lines) == (0, [])
    (record,) = records.load()
    assert record.run_dir == str(folder / "my runs" / "a\tb #1")
    script = Path(record.job_dir, "job.sh").read_text()
    # The folder is entered, and holds the code.
    (enter,) = [line for line in script.splitlines() if line.startswith("cd ")]
    assert os.system(f"{enter.partition(' || ')[0]} && test -f launch/node.py") == 0
