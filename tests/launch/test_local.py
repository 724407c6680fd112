"""Jobs on this machine: real processes through TorchX, and what is known about them afterwards."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from torchx.specs import AppState

from launch import component, logs, records, signals
from launch.records import JobRecord
from launch.request import Request
from launch.schedulers.local import Local
from launch.submit import check, connected
from launch.workspace import ROOT
from trainer.health.process_table import status_of

TINY = ("-m", "tests.launch.tiny_job")


@pytest.fixture(autouse=True)
def _own_records(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(records, "FILE", tmp_path / "jobs.jsonl")
    monkeypatch.chdir(ROOT)


def run(folder: Path, *, nodes: int, procs_per_node: int, command: list[str]) -> tuple[JobRecord, int]:
    """Run `command` as a local job to its end; returns its record and exit status."""
    request = Request(
        recipe="kuairand_sample", scheduler="local_cwd", nodes=nodes, procs_per_node=procs_per_node, run_dir=folder
    )
    real = component.job

    def job(request: Request) -> component.AppDef:
        app = real(request)
        (role,) = app.roles
        role.args = [*role.args[: role.args.index("--")], "--", *command]
        return app

    with pytest.MonkeyPatch.context() as patch, connected("local_cwd") as connection, signals.held():
        patch.setattr(component, "job", job)
        assert isinstance(connection.scheduler, Local)
        record = connection.submit(request, check(connection.scheduler, request))
        return record, connection.scheduler.wait(record.handle.rpartition("/")[2], record)


def _state(record: JobRecord) -> AppState:
    found = Local("test").status(record.handle.rpartition("/")[2], record)
    assert found is not None
    return found.state


@pytest.mark.parametrize(("nodes", "procs_per_node"), [(1, 2), (2, 1)])
def test_processes_find_each_other_and_show_on_this_terminal(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], nodes: int, procs_per_node: int
) -> None:
    record, status = run(tmp_path, nodes=nodes, procs_per_node=procs_per_node, command=[*TINY, str(tmp_path)])
    assert status == 0
    assert [(tmp_path / f"rank-{rank}").read_text() for rank in (0, 1)] == ["2 1", "2 1"]
    assert "rank 0 is here" in capfd.readouterr().out
    assert records.find(record.handle) == record
    status_here = status_of(os.getpid())
    assert status_here is not None
    assert (record.run_dir, record.pid, record.began) == (str(tmp_path), os.getpid(), status_here.began)
    assert _state(record) == AppState.SUCCEEDED


@pytest.mark.parametrize("nodes", [1, 2])
def test_a_failing_rank_fails_the_job_and_is_named(tmp_path: Path, nodes: int) -> None:
    fails = ["-m", "tests.launch.counting_job", str(tmp_path), "10", "10", "1", "2"]
    record, status = run(tmp_path, nodes=nodes, procs_per_node=2 // nodes, command=fails)
    assert status == 1
    assert _state(record) == AppState.FAILED
    fault = logs.first_failure(record, logs.span_of(record))
    assert fault is not None
    assert (fault.rank, "out of luck" in fault.words) == (1, True)


def _record(folder: Path, pid: int) -> JobRecord:
    status = status_of(pid)
    assert status is not None
    return JobRecord(
        handle="local_cwd://longview/x",
        recipe="r",
        run_dir=str(folder),
        job_dir=str(folder),
        pid=pid,
        time=time.time(),
        began=status.began,
    )


# Says when it runs, and ends with its standard input.
WAITING = "import sys; print('here', flush=True); sys.stdin.read()"


def test_a_job_lives_as_long_as_its_launcher(tmp_path: Path) -> None:
    # A process whose command line says "launch", as a real one's does.
    with _waiting("launch") as process:
        # Whatever a clock says that was set right meanwhile.
        record = replace(_record(tmp_path, process.pid), time=time.time() - 3600)
        assert _state(record) == AppState.RUNNING
        Local("test").cancel_job("x", record)
        assert process.wait(timeout=30) != 0
    # A full disk leaves an empty note.
    for torn in (None, "", '{"state": '):
        if torn is not None:
            (tmp_path / "ended.json").write_text(torn)
        assert _state(record) == AppState.FAILED
    (tmp_path / "ended.json").write_text(json.dumps({"state": "CANCELLED"}))
    assert _state(record) == AppState.CANCELLED


def test_a_job_ends_as_it_ended_though_nothing_can_be_noted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    scheduler = Local("test")
    scheduler._nodes["x"] = [subprocess.Popen(["true"])]
    with signals.held():
        assert scheduler.wait("x", _record(tmp_path / "nowhere", os.getpid())) == 0
    assert f"{tmp_path}/nowhere/ended.json cannot be written: No such file or directory" in caplog.text


def test_another_process_of_the_same_number_is_not_the_launcher(tmp_path: Path) -> None:
    with _waiting() as process:
        assert _state(_record(tmp_path, process.pid)) == AppState.FAILED
        process.kill()
    # In a container that is started again the launcher has the number that the one before had.
    before = _record(tmp_path, os.getpid())
    with _waiting("launch") as process:
        assert _state(replace(before, pid=process.pid)) == AppState.FAILED
        process.kill()


def _waiting(*arguments: str) -> "subprocess.Popen[str]":
    command = [sys.executable, "-c", WAITING, *arguments]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    process.stdout.readline()
    return process


INTERRUPTIBLE = """
import sys
from pathlib import Path
from launch import records
from tests.launch.test_local import run
folder = Path(sys.argv[1])
records.FILE = folder / "jobs.jsonl"
run_dir = folder / "run"
command = ["-m", "tests.launch.counting_job", str(run_dir), "100000"]
print(run(run_dir, nodes=2, procs_per_node=1, command=command)[1])
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGUSR1])
def test_a_stopped_job_saves_and_says_that_it_goes_on(tmp_path: Path, number: signal.Signals) -> None:
    command = [sys.executable, "-c", INTERRUPTIBLE, str(tmp_path)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        # Both ranks listen, and steps are taken.
        begun = (tmp_path / "run" / "logs" / "rank-1.log", tmp_path / "run" / "metrics.jsonl")
        while not all(file.exists() for file in begun):
            assert process.poll() is None
        process.send_signal(number)
        output, _ = process.communicate(timeout=60)
    assert output.splitlines()[-1] == "3"
    assert len(list((tmp_path / "run" / "checkpoints").glob("*/COMPLETE"))) == 1
    record = records.find_in(next((tmp_path / "run" / "jobs").iterdir()))
    assert record is not None
    assert _state(record) == AppState.CANCELLED
