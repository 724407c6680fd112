"""Jobs of a test on the cluster of `tests.support.slurm`: sent, waited for, and what they left."""

import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from torchx.specs import AppState, Role

from launch import component, records
from launch.records import JobRecord
from launch.request import Request
from launch.schedulers import slurm_queue
from launch.schedulers.slurm import Slurm
from launch.schedulers.slurm_script import SlurmRequest
from launch.submit import check, connected
from launch.workspace import ROOT
from tests.support.training import read_lines
from trainer.run.run_dir import RunDir

TIMEOUT_S = 300
ENDED = (AppState.SUCCEEDED, AppState.FAILED, AppState.CANCELLED)


def request(run_dir: Path, **changes: object) -> Request:
    """The demo on both nodes, a process each, but for `changes`."""
    values: dict[str, object] = {"recipe": "kuairand_sample", "scheduler": "slurm", "nodes": 2, "procs_per_node": 1}
    return Request(**(values | {"run_dir": run_dir} | changes))  # type: ignore[arg-type]


def count(run_dir: Path, *arguments: str, **changes: object) -> JobRecord:
    """Send a counting job, which keeps the trainer's side of the bargain."""
    command = ["-m", "tests.launch.counting_job", str(run_dir), *arguments]
    return send(request(run_dir, **changes), command)


def send(
    request: Request, command: list[str], *, interpreter: str | None = None, path: tuple[Path, ...] = ()
) -> JobRecord:
    """Submit a job that runs `command` on every process instead of the trainer; the nodes' interpreter may be another
    than the batch script's, and `path` comes before all else on their module path."""
    with running(lambda asked: command, path) as patch, connected("slurm") as connection:
        if interpreter is not None:
            script, node = SlurmRequest.script, " -m launch.node "
            patch.setattr(
                SlurmRequest, "script", lambda self: script(self).replace(sys.executable + node, interpreter + node)
            )
        return connection.submit(request, check(connection.scheduler, request))


@contextmanager
def running(command: Callable[[Request], list[str]], path: tuple[Path, ...] = ()) -> Iterator[pytest.MonkeyPatch]:
    """Let jobs run another command than the trainer's for the duration of the block."""
    real = component._role

    def role_of(asked: Request) -> Role:
        role = real(asked)
        role.args = [*role.args[: role.args.index("--")], "--", *command(asked)]
        # The job's copy of the code leaves the tests out.
        role.env["PYTHONPATH"] = os.pathsep.join(map(str, (*path, ROOT)))
        return role

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(component, "_role", role_of)
        yield patch


def job_id(record: JobRecord) -> str:
    """Of the job, or of the one that goes on from it."""
    newest = records.find(record.handle) or record
    return newest.handle.rpartition("/")[2]


def expect(record: JobRecord, state: AppState, *, timeout_s: float = TIMEOUT_S) -> None:
    """Wait for the end of a job, or of the one that goes on from it, and fail if it is another one."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        found = Slurm("test").status(job_id(record), record)
        if found is not None and found.state in ENDED:
            if found.state == state:
                return
            if not (found.state == AppState.FAILED and job_id(record) != record.handle.rpartition("/")[2]):
                pytest.fail(f"{record.handle} {found}\n{batch_output(record)}\n{node_output(record)}")
        signal.sigtimedwait([], 0.3)
    Slurm("test").cancel_job(job_id(record), record)
    pytest.fail(f"{record.handle} has not ended after {timeout_s} s\n{batch_output(record)}\n{node_output(record)}")


def until_counting(record: JobRecord) -> None:
    """Wait for the first step."""
    until(RunDir(Path(record.run_dir)).metrics_file.exists, record)


def until(true: Callable[[], bool], record: JobRecord, *, timeout_s: float = TIMEOUT_S) -> None:
    """Wait until something about the job is true."""
    deadline = time.monotonic() + timeout_s
    while not true():
        assert time.monotonic() < deadline, batch_output(record)
        signal.sigtimedwait([], 0.1)


def warn(record: JobRecord) -> None:
    """What a site's own early warning, --signal=USR1@..., does."""
    until_counting(record)
    assert slurm_queue.run(["scancel", "--signal=USR1", job_id(record)]).returncode == 0


def counted(run_dir: Path) -> list[int]:
    """The steps that were taken, each once."""
    return sorted({line["step"] for line in read_lines(run_dir / "metrics.jsonl")})


def batch_output(record: JobRecord) -> str:
    """What the batch script has said so far."""
    path = Path(record.job_dir, "job.out")
    return path.read_text() if path.exists() else "no output"


def node_output(record: JobRecord) -> str:
    """The last words of each node."""
    return "".join(path.read_text()[-2000:] for path in sorted(Path(record.job_dir).glob("node-*.out")))
