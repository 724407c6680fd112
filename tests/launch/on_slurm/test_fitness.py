"""Faults of one of two real nodes: each is one line with the node's name before anything starts, and never a success.

The second node's daemon has a mount namespace of its own, in which a command on that node hides a file or a folder of
the machine behind another one.
"""

import importlib.metadata
import re
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from torchx.specs import AppState

from launch import attempts, logs
from launch.records import JobRecord
from launch.schedulers import slurm_queue
from tests.support.slurm import NODES, UNSHARED, Cluster
from tests.support.slurm_jobs import batch_output, count, expect, job_id, request, send, until

HOLD = ["hold="]
STOPPED_CLOCK = "import time\ntime.time = lambda: 1_700_000_000.0\n"


def _says(record: JobRecord, run_dir: Path, node: str, words: str) -> None:
    expect(record, AppState.FAILED)
    found = logs.first_failure(record, logs.span_of(record))
    assert found is not None
    assert re.match(f"error: node {node}:? {words}", found.words), found.words
    assert "Slurm takes no other job to go on with it" in batch_output(record)
    assert [attempt.ended for attempt in attempts.read(run_dir)] == ["unfit"]


def test_a_run_directory_that_is_not_shared(cluster: Cluster) -> None:
    run_dir = cluster.folder / UNSHARED / "run"
    _says(count(run_dir, "1"), run_dir, NODES[1], "has no folder .*put the run directory where all nodes see it")


def test_a_run_directory_that_is_shared_in_part(cluster: Cluster, tmp_path: Path) -> None:
    # The job's folder is there, and what the first node writes is not: a copy, or a cache that stands still.
    record = count(tmp_path, "1", options=HOLD)
    with _hidden(_copied(record.job_dir, tmp_path / "elsewhere"), Path(record.job_dir)):
        _release(record)
        _says(record, tmp_path, NODES[1], "it does not see what the first node has written in .*file system")


def test_data_that_one_node_cannot_read(cluster: Cluster, tmp_path: Path) -> None:
    # There on the first node and on this one, as on a login node.
    data = cluster.folder / UNSHARED / "data"
    data.mkdir()
    record = count(tmp_path, "1", overrides=[f"data.path={data}"])
    _says(record, tmp_path, NODES[1], f"it cannot read the data in {data}")


def test_an_interpreter_that_no_node_has(cluster: Cluster, tmp_path: Path) -> None:
    record = send(request(tmp_path), ["-m", "x"], interpreter="/nowhere/python")
    _says(record, tmp_path, NODES[0], "has no interpreter /nowhere/python")


def test_other_code(cluster: Cluster, tmp_path: Path) -> None:
    record = count(tmp_path, "1", options=HOLD)
    file = Path(record.job_dir, "trainer", "loop.py")
    (tmp_path / "jobs" / "other.py").write_text(f"{file.read_text()}\n# Edited on this node.\n")
    with _hidden(tmp_path / "jobs" / "other.py", file):
        _release(record)
        _says(record, tmp_path, NODES[1], "its code in .* is not the first node's")


def test_another_environment(cluster: Cluster, tmp_path: Path) -> None:
    (file,) = (path for path in importlib.metadata.files("torch") or () if path.match("torch-*/METADATA"))
    there = Path(str(file.locate()))
    (tmp_path / "jobs").mkdir()
    other = tmp_path / "jobs" / "METADATA"
    other.write_text(re.sub("^Version: .*", "Version: 1.0", there.read_text(), flags=re.MULTILINE))
    with _hidden(other, there):
        _says(count(tmp_path, "1"), tmp_path, NODES[1], r"its torch is 1\.0, the first node's .*one environment")


def test_nodes_may_run_in_a_container_and_the_batch_script_outside_of_it(cluster: Cluster, tmp_path: Path) -> None:
    """A stand-in for one: without Slurm's commands, and with a torch that the batch script's environment has not."""
    there = tmp_path / "image of all"
    (there / "torch-9.9.dist-info").mkdir(parents=True)
    (there / "torch-9.9.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: torch\nVersion: 9.9\n")
    python = there / "python"
    outside = f'case "$2" in launch.allocation) exec {sys.executable} "$@" ;; esac'
    inside = f'PATH=/nowhere PYTHONPATH="{there}:$PYTHONPATH" exec {sys.executable} "$@"'
    python.write_text(f"#!/bin/sh\n{outside}\n{inside}\n")
    python.chmod(0o755)
    expect(count(tmp_path / "run", "3", python=str(python)), AppState.SUCCEEDED)
    assert [attempt.ended for attempt in attempts.read(tmp_path / "run")] == ["done"]


def test_a_full_shared_memory(cluster: Cluster, tmp_path: Path) -> None:
    with _full_shared_memory():
        _says(count(tmp_path, "1"), tmp_path, NODES[1], "its /dev/shm /dev/shm has 1 MiB free, a run needs 256")


def test_a_stopped_clock(cluster: Cluster, tmp_path: Path) -> None:
    (tmp_path / "jobs").mkdir()
    module, stopped = tmp_path / "jobs" / "sitecustomize.py", tmp_path / "jobs" / "stopped.py"
    module.touch()
    stopped.write_text(STOPPED_CLOCK)
    with _hidden(stopped, module):
        record = send(request(tmp_path), ["-m", "x"], path=(module.parent,))
        _says(record, tmp_path, NODES[1], "its clock is [0-9]+ s behind the first node's: set it")


def test_a_bad_node_is_left_out_of_the_next_start(cluster: Cluster, tmp_path: Path) -> None:
    with ExitStack() as drained, _full_shared_memory():
        # So that the job begins on the bad node.
        slurm_queue.run(["scontrol", "update", f"nodename={NODES[0]}", "state=drain", "reason=test"])
        drained.callback(slurm_queue.run, ["scontrol", "update", f"nodename={NODES[0]}", "state=resume"])
        record = count(tmp_path, "3", nodes=1)
        until(lambda: bool(attempts.read(tmp_path)), record)
        drained.close()
        expect(record, AppState.SUCCEEDED)
    assert [attempt.ended for attempt in attempts.read(tmp_path)] == ["unfit", "done"]
    last = slurm_queue.find_job(job_id(record))
    assert last is not None
    assert (last.nodes, last.excluded) == NODES


@contextmanager
def _hidden(other: Path, original: Path) -> Iterator[None]:
    """Have the second node see `other` in the place of `original`."""
    with _mounted("--bind", str(other), over=original):
        yield


@contextmanager
def _full_shared_memory() -> Iterator[None]:
    with _mounted("-t", "tmpfs", "-o", "size=1m", "none", over=Path("/dev/shm")):
        yield


@contextmanager
def _mounted(*what: str, over: Path) -> Iterator[None]:
    there = ["srun", f"--nodelist={NODES[1]}", "--nodes=1", "--ntasks=1", "--chdir=/"]
    mounted = slurm_queue.run([*there, "mount", *what, str(over)])
    assert mounted.returncode == 0, mounted.stderr
    try:
        yield
    finally:
        slurm_queue.run([*there, "umount", "--lazy", str(over)])


def _copied(folder: str, to: Path) -> Path:
    done = slurm_queue.run(["cp", "-r", folder, str(to)])
    assert done.returncode == 0, done.stderr
    return to


def _release(record: JobRecord) -> None:
    released = slurm_queue.run(["scontrol", "release", job_id(record)])
    assert released.returncode == 0, released.stderr
