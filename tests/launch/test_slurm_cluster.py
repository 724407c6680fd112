"""Two-node jobs on a real Slurm: every process joins, the demo recipe trains, and a later submission resumes it."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from torchx.specs import AppState

from launch import records
from launch.submit import Request, runner, submit
from launch.workspace import ROOT
from tests.support.slurm import Cluster, missing_programs, slurm_cluster
from tests.support.small_data import small_dataset
from tests.support.training import SMALL, losses, read_lines

TIMEOUT_S = 180


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    missing = missing_programs()
    if missing or os.geteuid() != 0:
        reason = f"needs root and Slurm (missing: {missing}): python -m tests.support.slurm install"
        if os.environ.get("CI"):
            pytest.fail(reason)
        pytest.skip(reason)
    with slurm_cluster(tmp_path_factory.mktemp("slurm")) as running, pytest.MonkeyPatch.context() as patch:
        patch.setenv("SLURM_CONF", running.environment["SLURM_CONF"])
        patch.setattr(records, "FILE", running.folder / "jobs.jsonl")
        yield running


@pytest.mark.parametrize(
    "failures",
    [
        pytest.param((), id="first-time"),
        # Slurm takes two to three minutes to start a requeued heterogeneous job.
        pytest.param(("1",), id="after-a-failure", marks=pytest.mark.slow),
    ],
)
def test_nodes_find_each_other(cluster: Cluster, tmp_path: Path, failures: tuple[str, ...]) -> None:
    request = Request(
        recipe="kuairand_sample",
        scheduler="slurm",
        nodes=2,
        procs_per_node=1,
        run_dir=tmp_path,
        max_retries=len(failures),
    )
    app = request.app()
    (role,) = app.roles
    role.args = [*role.args[: role.args.index("--")], "--", "-m", "tests.launch.tiny_job", str(tmp_path), *failures]
    # The job's copy of the code leaves the tests out.
    role.env["PYTHONPATH"] = str(ROOT)
    with runner("slurm") as torchx:
        handle = submit(torchx, request, app)
        status = torchx.wait(handle, wait_interval=0.5)
        listed = {job.app_handle: job.state for job in torchx.list("slurm")}
    assert status is not None
    assert status.state == AppState.SUCCEEDED, _output(tmp_path)
    assert listed[handle] == AppState.SUCCEEDED
    assert [(tmp_path / f"rank-{rank}").read_text() for rank in (0, 1)] == ["2 1", "2 1"]


def test_the_demo_trains_on_two_nodes_and_resumes(cluster: Cluster, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    assert _train(run_dir, "max_steps=3") == "SUCCEEDED"
    first = losses(read_lines(run_dir / "metrics.jsonl"))
    assert sorted(first) == [1, 2, 3]
    assert _train(run_dir, "max_steps=5") == "SUCCEEDED"
    lines = read_lines(run_dir / "metrics.jsonl")
    assert sorted(losses(lines)) == [1, 2, 3, 4, 5]
    assert {line["world_size"] for line in lines} == {2}
    assert {step: loss for step, loss in losses(lines).items() if step <= 3} == first
    assert sorted(path.name for path in (run_dir / "logs").iterdir()) == ["rank-0.log", "rank-1.log"]
    assert json.loads((run_dir / "config.json").read_text())["name"] == "kuairand_sample"


def test_a_failed_job_says_so_and_its_output_is_found(cluster: Cluster, tmp_path: Path) -> None:
    handle = _submit(tmp_path / "run", "data.path=nowhere")
    assert _end(handle) == "FAILED"
    shown = _launch("logs", handle, "--node", "0")
    assert "nowhere" in shown.stdout


def _train(run_dir: Path, *overrides: str) -> str:
    state = _end(_submit(run_dir, *overrides))
    assert state == "SUCCEEDED", _output(run_dir)
    return state


def _submit(run_dir: Path, *overrides: str) -> str:
    size = ("--scheduler", "slurm", "--nodes", "2", "--procs-per-node", "1", "--option", "partition=main")
    done = _launch(
        "submit",
        "kuairand_sample",
        *size,
        "--run-dir",
        str(run_dir),
        "--set",
        f"data.path={small_dataset()}",
        *SMALL,
        *overrides,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[-1]


def _end(handle: str) -> str:
    deadline = time.monotonic() + TIMEOUT_S
    while time.monotonic() < deadline:
        state = _launch("status", handle).stdout.strip()
        if state in ("SUCCEEDED", "FAILED", "CANCELLED"):
            return state
        time.sleep(0.5)
    _launch("cancel", handle)
    pytest.fail(f"{handle} has not ended after {TIMEOUT_S} s")


def _launch(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "launch", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def _output(run_dir: Path) -> str:
    return "".join(path.read_text()[-3000:] for path in sorted((run_dir / "jobs").glob("*/slurm-*")))
