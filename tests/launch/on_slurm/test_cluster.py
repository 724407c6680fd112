"""Jobs on a real Slurm of two nodes: a run that counts gets to its end, and what goes wrong is said."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from torchx.specs import AppState

from launch import attempts, logs, records
from launch.progress import newest_checkpoint
from launch.schedulers import slurm_queue
from launch.schedulers.slurm import Slurm
from launch.schedulers.slurm_queue import SlurmError
from launch.schedulers.slurm_reasons import NEVER
from launch.submit import check, connected
from launch.sweep import runs_of
from launch.workspace import ROOT
from tests.launch.test_new_user import BARE_PYTHON
from tests.support.slurm import Cluster
from tests.support.slurm_jobs import (
    batch_output,
    count,
    counted,
    expect,
    job_id,
    request,
    running,
    until,
    until_counting,
    warn,
)
from trainer.run.run_dir import RunDir

CLUSTER = """
import os, signal, subprocess, sys
from pathlib import Path
from tests.support.slurm import slurm_cluster
# Each looks for ports from the same one on.
os.getpid = lambda: 7
print("ready", flush=True)
sys.stdin.readline()
with slurm_cluster(Path(sys.argv[1])) as cluster:
    job = ["sbatch", "--output=/dev/null", "--wrap=sleep 1000"]
    subprocess.run(job, env={**os.environ, **cluster.environment}, check=True, stdout=sys.stderr)
    print(next(line for line in (cluster.folder / "slurm.conf").open() if "SlurmctldPort" in line), flush=True)
    signal.pause()
"""


def test_clusters_start_at_once_and_end_with_the_tests_that_started_them(cluster: Cluster, tmp_path: Path) -> None:
    ends = {tmp_path / "asked": signal.SIGTERM, tmp_path / "killed": signal.SIGKILL}
    commands = [[sys.executable, "-c", CLUSTER, str(folder)] for folder in ends]
    pipe = subprocess.PIPE
    started = [subprocess.Popen(words, cwd=ROOT, stdin=pipe, stdout=pipe, stderr=pipe, text=True) for words in commands]
    assert _told(started) == ["ready\n"] * 2
    for process in started:
        print(file=process.stdin, flush=True)
    ports = _told(started)
    for process, (folder, number) in zip(started, ends.items(), strict=True):
        programs = _processes_of(folder)
        process.send_signal(number)
        assert programs >= {"munged", "slurmctld", "slurmd"}, process.communicate()[1]
        process.communicate()
        # Of a killed one, what its job runs may go on for a while.
        left = {"slurmstepd", "sleep", "slurm_script"} if number == signal.SIGKILL else set()
        deadline = time.monotonic() + 20
        while _processes_of(folder) - left:
            assert time.monotonic() < deadline, _processes_of(folder)
    assert len(set(ports)) == 2


def _told(processes: "list[subprocess.Popen[str]]") -> list[str]:
    """A line of each."""
    return [process.stdout.readline() for process in processes if process.stdout is not None]


def _processes_of(folder: Path) -> set[str]:
    """The names of a cluster's processes, by what they were started with."""
    found = set()
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if str(folder).encode() in (process / "environ").read_bytes() + (process / "cmdline").read_bytes():
                found.add((process / "comm").read_text().strip())
        except OSError:
            continue
    return {name for name in found if not name.startswith("python")}


def test_a_run_that_always_fails_stops_with_the_reason(cluster: Cluster, tmp_path: Path) -> None:
    record = count(tmp_path, "30", "100", "1", "2", "always", max_retries=1)
    expect(record, AppState.FAILED)
    ends = [(attempt.ended, attempt.progress, attempt.reason[-11:]) for attempt in attempts.read(tmp_path)]
    assert ends == [("failed", False, "out of luck")] * 2
    assert "2 failures in a row without a new checkpoint, --max-retries is 1" in batch_output(record)
    fault = logs.first_failure(record, logs.last_start(record))
    assert fault is not None
    assert (fault.rank, "out of luck" in fault.words) == (1, True)


def test_a_failure_after_progress_costs_no_retry(cluster: Cluster, tmp_path: Path) -> None:
    expect(count(tmp_path, "10", "3", "1", "8"), AppState.SUCCEEDED)
    ends = [(attempt.ended, attempt.step) for attempt in attempts.read(tmp_path)]
    assert [ended for ended, _ in ends] == ["failed", "done"]
    # It began again after the last checkpoint before the failure; its partner had one step more or less.
    assert ends[0][1] >= 6


@pytest.mark.parametrize(
    ("option", "words"),
    [("partition=nope", "invalid partition specified: nope"), ("colour=red", "unrecognized option '--colour=red'")],
)
def test_what_slurm_refuses_is_said_in_its_words(cluster: Cluster, tmp_path: Path, option: str, words: str) -> None:
    with pytest.raises(SlurmError, match=f"sbatch failed: .*{words}"):
        count(tmp_path, "1", options=[option])
    assert list((tmp_path / "jobs").iterdir()) == []


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"procs_per_node": 64}, "PartitionConfig"),
        ({"nodes": 3}, "PartitionNodeLimit"),
        ({"options": ["partition=gpu", "time=13:00:00"]}, "PartitionTimeLimit"),
    ],
)
def test_what_slurm_takes_but_can_never_start_is_said_by_status(
    cluster: Cluster, tmp_path: Path, changes: dict[str, object], word: str
) -> None:
    record = count(tmp_path, "1", **changes)
    reason = f"can never start because {NEVER[word]} ({word})"
    until(lambda: reason in str(Slurm("test").status(job_id(record), record)), record)
    Slurm("test").cancel_job(job_id(record), record)


@pytest.mark.parametrize(
    ("python", "words"),
    [
        ("/nowhere/python", "error: .* has no interpreter /nowhere/python: name one with --python that all nodes have"),
        (str(BARE_PYTHON), f"error: {BARE_PYTHON} on .* has no .*torch, .*: name an interpreter with --python"),
    ],
)
def test_an_environment_that_is_none_is_said(cluster: Cluster, tmp_path: Path, python: str, words: str) -> None:
    record = count(tmp_path, "1", python=python)
    expect(record, AppState.FAILED)
    found = logs.first_failure(record, logs.span_of(record))
    assert found is not None
    assert re.fullmatch(words + ".*", found.words)


@pytest.mark.parametrize("options", [[], ["no-requeue="]])
def test_a_sweep_is_one_array_of_runs_that_go_on_apart(cluster: Cluster, tmp_path: Path, options: list[str]) -> None:
    base = request(tmp_path / "sweep", nodes=1, overrides=["seed=0..1", "max_steps=40"], options=options)
    runs = runs_of(base)
    with (
        running(lambda asked: ["-m", "tests.launch.counting_job", str(asked.run_dir), "40"]),
        connected("slurm") as connection,
    ):
        sent = connection.sweep(runs, base, check(connection.scheduler, runs[0]))
    assert [Path(record.run_dir).name for record in sent] == ["seed=0", "seed=1"]
    assert len({record.handle.rpartition("_")[0] for record in sent}) == 1
    # Slurm gives the last one the array's own number.
    warn(sent[1])
    ends = (["done"], ["stopped", "done"])
    for record, ended in zip(sent, ends, strict=True):
        expect(record, AppState.SUCCEEDED)
        assert counted(Path(record.run_dir)) == list(range(1, 41))
        assert [attempt.ended for attempt in attempts.read(Path(record.run_dir))] == ended
        assert "the job ends with status 0" in batch_output(record)


def test_a_cancelled_job_has_saved_and_stays_cancelled(cluster: Cluster, tmp_path: Path) -> None:
    record = count(tmp_path, "100000")
    until_counting(record)
    Slurm("test").cancel_job(job_id(record), record)
    expect(record, AppState.CANCELLED)
    step = newest_checkpoint(RunDir(tmp_path))
    assert step > 0
    assert counted(tmp_path) == list(range(1, step + 1))
    assert [attempt.ended for attempt in attempts.read(tmp_path)] == ["taken"]


def test_a_job_whose_own_process_is_killed_goes_on(cluster: Cluster, tmp_path: Path) -> None:
    """As its first node's memory killer does it; Slurm itself gives such a job up."""
    record = count(tmp_path, "40", "5")
    until(lambda: newest_checkpoint(RunDir(tmp_path)) > 0, record)
    words = (b"launch.allocation", record.job_dir.encode())
    commands = {process.parent.name: process.read_bytes() for process in Path("/proc").glob("[0-9]*/cmdline")}
    (number,) = [name for name, command in commands.items() if all(word in command for word in words)]
    os.kill(int(number), signal.SIGKILL)
    expect(record, AppState.SUCCEEDED)
    assert counted(tmp_path) == list(range(1, 41))
    ends = [(attempt.ended, attempt.reason) for attempt in attempts.read(tmp_path)]
    assert ends == [("failed", "launch.allocation was killed by signal 9"), ("done", "")]


def test_a_node_that_goes_down_costs_no_retry(cluster: Cluster, tmp_path: Path) -> None:
    record = count(tmp_path, "40", "5")
    until_counting(record)
    node = ["scontrol", "update", "nodename=longview-n2"]
    assert slurm_queue.run([*node, "state=down", "reason=test"]).returncode == 0
    until(lambda: "running" not in str(Slurm("test").status(job_id(record), record)).lower(), record)
    # It may have come back by itself.
    slurm_queue.run([*node, "state=resume"])
    expect(record, AppState.SUCCEEDED)
    assert counted(tmp_path) == list(range(1, 41))
    assert "failed" not in [attempt.ended for attempt in attempts.read(tmp_path)]


def test_where_requeueing_is_forbidden_a_successor_goes_on(cluster: Cluster, tmp_path: Path) -> None:
    record = count(tmp_path, "40", options=["no-requeue="])
    # As a site does it.
    warn(record)
    expect(record, AppState.SUCCEEDED)
    assert [attempt.ended for attempt in attempts.read(tmp_path)] == ["stopped", "done"]
    successor = records.find(record.handle)
    assert successor is not None
    assert successor.handle != record.handle
