"""The trainer itself on a real Slurm of two nodes: whatever ends its allocations, its losses are those of a run that
nothing has ended, digit for digit.
"""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from torchx.specs import AppState

from launch import attempts, records
from launch.progress import newest_checkpoint
from launch.records import JobRecord
from launch.schedulers import slurm_queue
from launch.workspace import ROOT
from tests.support.slurm import Cluster
from tests.support.slurm_jobs import TIMEOUT_S, batch_output, count, counted, expect, request, send, until, warn
from tests.support.small_data import small_dataset
from tests.support.training import SMALL, losses, read_lines, train
from trainer.run.run_dir import RunDir

PACE_S = 0.2
"""Of a step, at least."""
STEPS, MINUTES_3 = 250, 900
"""More than an allocation of a minute has room for, and three minutes."""
APART = ["partition=gpu", "nodelist=longview-g[3-4]"]
SETTINGS = ("data.num_epochs=40", "checkpoint.every_steps=20")


@pytest.fixture(scope="module")
def limited(cluster: Cluster) -> JobRecord:
    """A run that a minute is not enough for; sent first, looked at last, on nodes that no other run asks for."""
    return _send_trainer(cluster.folder / "limited", STEPS, options=["time=1", *APART])


@pytest.fixture(scope="module")
def unbroken(limited: JobRecord, tmp_path_factory: pytest.TempPathFactory) -> dict[int, float]:
    """The losses of a run of the same settings that nothing ends."""
    return losses(train(tmp_path_factory.mktemp("unbroken"), 2, *SETTINGS, f"max_steps={STEPS}"))


def test_a_warned_run_saves_and_goes_on(cluster: Cluster, unbroken: dict[int, float], tmp_path: Path) -> None:
    record = _submit(tmp_path / "run", *SETTINGS, "max_steps=60")
    warn(record)
    expect(record, AppState.SUCCEEDED)
    assert [attempt.ended for attempt in attempts.read(tmp_path / "run")] == ["stopped", "done"]
    _expect_losses(record, 60, unbroken)
    machine = json.loads((tmp_path / "run" / "plan.json").read_text())["machine"]
    assert (machine["world_size"], machine["local_world_size"], machine["racks"]) == (2, 1, 2)
    assert sorted(path.name for path in (tmp_path / "run" / "logs").iterdir()) == ["rank-0.log", "rank-1.log"]


@pytest.mark.parametrize("job", ["counting_job", pytest.param("paced_trainer", marks=pytest.mark.slow)])
def test_preemptions_a_killed_worker_and_a_lost_node_cost_nothing(
    cluster: Cluster, unbroken: dict[int, float], tmp_path: Path, job: str
) -> None:
    if job == "counting_job":
        record = count(tmp_path, "160", "10", options=["partition=low"], max_retries=1)
    else:
        record = _send_trainer(tmp_path, 160, options=["partition=low"])
    for _ in range(2):
        _until_further(record)
        # Two nodes of the partition, which makes Slurm tell our job to end, and start it again afterwards.
        urgent = ["sbatch", "--partition=urgent", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap=true"]
        assert slurm_queue.run(urgent).returncode == 0
        _until_ended(record)
    _until_further(record)
    # Rank 1's process ends as if memory had run out.
    os.kill(_worker(tmp_path, job, rank=1), signal.SIGKILL)
    _until_ended(record)
    _until_further(record)
    node = ["scontrol", "update", "nodename=longview-g2"]
    assert slurm_queue.run([*node, "state=down", "reason=test"]).returncode == 0
    _until_ended(record)
    slurm_queue.run([*node, "state=resume"])
    expect(record, AppState.SUCCEEDED)
    ends = attempts.read(tmp_path)
    assert [attempt.ended in ("stopped", "taken") for attempt in ends] == [True, True, False, True, False]
    assert (ends[2].ended, ends[4].ended) == ("failed", "done")
    # Every one of them had come further, so none counts.
    assert attempts.failures_without_progress(ends) == 0
    assert counted(tmp_path) == list(range(1, 161))
    if job == "paced_trainer":
        _expect_losses(record, 160, unbroken)


def test_a_run_longer_than_the_time_limit_gets_to_its_end(limited: JobRecord, unbroken: dict[int, float]) -> None:
    _expect_a_row_of_allocations(limited, 2)
    _expect_losses(limited, STEPS, unbroken)


@pytest.mark.slow
def test_three_minutes_of_training_under_a_limit_of_one(cluster: Cluster, tmp_path: Path) -> None:
    record = _send_trainer(tmp_path / "run", MINUTES_3, options=["time=1", *APART])
    unbroken = losses(train(tmp_path / "unbroken", 2, *SETTINGS, f"max_steps={MINUTES_3}"))
    _expect_a_row_of_allocations(record, 3, timeout_s=900)
    _expect_losses(record, MINUTES_3, unbroken)


def _submit(run_dir: Path, *overrides: str) -> JobRecord:
    """Submit the demo, made small, as a user does."""
    size = ("--scheduler", "slurm", "--nodes", "2", "--procs-per-node", "1", "--option", "partition=main")
    command = [sys.executable, "-m", "launch", "submit", "kuairand_sample", *size, "--run-dir", str(run_dir)]
    command += ["--set", f"data.path={small_dataset()}", *SMALL, *overrides]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (record,) = filter(None, map(records.find_in, (run_dir / "jobs").iterdir()))
    assert done.stdout.strip() == record.handle
    return record


def _send_trainer(run_dir: Path, steps: int, options: list[str]) -> JobRecord:
    """The same with the paced trainer in its place."""
    settings = [f"data.path={small_dataset()}", *SMALL, *SETTINGS, f"max_steps={steps}"]
    command = ["-m", "tests.launch.paced_trainer", str(PACE_S), "train", "kuairand_sample", "--run-dir", str(run_dir)]
    return send(request(run_dir, options=options, max_retries=1), [*command, "--set", *settings])


def _until_further(record: JobRecord) -> None:
    """Wait for a checkpoint that is newer than what the last start left."""
    run = RunDir(Path(record.run_dir))
    before = max((attempt.step for attempt in attempts.read(run.path)), default=0)
    until(lambda: newest_checkpoint(run) > before, record)


def _until_ended(record: JobRecord) -> None:
    """Wait for the end of the start that is running."""
    run_dir = Path(record.run_dir)
    ended = len(attempts.read(run_dir))
    until(lambda: len(attempts.read(run_dir)) > ended, record)


def _worker(run_dir: Path, module: str, rank: int) -> int:
    """The process of a rank, by what it was told."""
    for process in Path("/proc").glob("[0-9]*"):
        try:
            command, told = (process / "cmdline").read_bytes(), (process / "environ").read_bytes().split(b"\0")
        except OSError:
            continue
        if module.encode() in command and str(run_dir).encode() in command and f"RANK={rank}".encode() in told:
            return int(process.name)
    raise AssertionError(f"no process of rank {rank}")


def _expect_a_row_of_allocations(record: JobRecord, least: int, timeout_s: float = TIMEOUT_S) -> None:
    expect(record, AppState.SUCCEEDED, timeout_s=timeout_s)
    ends = [attempt.ended for attempt in attempts.read(Path(record.run_dir))]
    assert len(ends) >= least, batch_output(record)
    assert ends[-1] == "done"
    assert set(ends[:-1]) == {"stopped"}, batch_output(record)


def _expect_losses(record: JobRecord, steps: int, unbroken: dict[int, float]) -> None:
    lines = read_lines(Path(record.run_dir) / "metrics.jsonl")
    assert {line["world_size"] for line in lines} == {2}
    assert losses(lines) == {step: loss for step, loss in unbroken.items() if step <= steps}
