"""Jobs on this machine: real processes through TorchX, and what is known about them afterwards."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from torchx.specs import AppState

from launch import local, records
from launch.submit import Request, runner, submit
from launch.workspace import ROOT

TINY = ("-m", "tests.launch.tiny_job")


@pytest.fixture(autouse=True)
def _own_records(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(records, "FILE", tmp_path / "jobs.jsonl")
    monkeypatch.chdir(ROOT)


def run(folder: Path, *, nodes: int, procs_per_node: int, command: list[str]) -> tuple[str, AppState]:
    """Run `command` as a local job to its end; returns its handle and final state."""
    request = Request(
        recipe="kuairand_sample", scheduler="local_cwd", nodes=nodes, procs_per_node=procs_per_node, run_dir=folder
    )
    app = request.app()
    (role,) = app.roles
    role.args = [*role.args[: role.args.index("--")], "--", *command]
    with runner("local_cwd") as torchx:
        handle = submit(torchx, request, app)
        return handle, local.wait(torchx, handle)


@pytest.mark.parametrize(("nodes", "procs_per_node"), [(1, 2), (2, 1)])
def test_processes_find_each_other_and_show_on_this_terminal(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], nodes: int, procs_per_node: int
) -> None:
    handle, state = run(tmp_path, nodes=nodes, procs_per_node=procs_per_node, command=[*TINY, str(tmp_path)])
    assert state == AppState.SUCCEEDED
    assert [(tmp_path / f"rank-{rank}").read_text() for rank in (0, 1)] == ["2 1", "2 1"]
    assert "rank 0 is here" in capfd.readouterr().out
    record = records.find(handle)
    assert record is not None
    assert (record.run_dir, record.pid) == (str(tmp_path), os.getpid())
    assert local.state(record) == AppState.SUCCEEDED


def test_a_failing_rank_fails_the_job_and_its_log_is_found(tmp_path: Path) -> None:
    started = time.time()
    handle, state = run(tmp_path, nodes=1, procs_per_node=2, command=[*TINY, str(tmp_path), "1"])
    assert state == AppState.FAILED
    assert local.failing_log(tmp_path, since=started) == tmp_path / "logs" / "rank-1.log"
    record = records.find(handle)
    assert record is not None
    assert local.state(record) == AppState.FAILED


def test_old_faults_are_not_taken_for_new_ones(tmp_path: Path) -> None:
    (tmp_path / "logs").mkdir()
    log = tmp_path / "logs" / "rank-0.log"
    log.write_text("Traceback (most recent call last):\n")
    assert local.failing_log(tmp_path, since=log.stat().st_mtime) == log
    assert local.failing_log(tmp_path, since=log.stat().st_mtime + 1) is None


def _record(folder: Path, pid: int) -> records.JobRecord:
    return records.JobRecord(
        handle="local_cwd://longview/x", recipe="r", run_dir=str(folder), job_dir=str(folder), pid=pid, time=0.0
    )


# Says when it runs, and ends with its standard input.
WAITING = "import sys; print('here', flush=True); sys.stdin.read()"


def test_a_job_lives_as_long_as_its_launcher(tmp_path: Path) -> None:
    # A process whose command line says "launch", as a real one's does.
    with _waiting("launch") as process:
        record = _record(tmp_path, process.pid)
        assert local.state(record) == AppState.RUNNING
        local.cancel(record)
        assert process.wait(timeout=30) != 0
    assert local.state(record) == AppState.FAILED
    (tmp_path / "SUCCESS").write_text(json.dumps({"final_state": "CANCELLED"}))
    assert local.state(record) == AppState.CANCELLED


def test_another_process_of_the_same_number_is_not_the_launcher(tmp_path: Path) -> None:
    with _waiting() as process:
        assert local.state(_record(tmp_path, process.pid)) == AppState.FAILED
        process.kill()


def _waiting(*arguments: str) -> "subprocess.Popen[str]":
    command = [sys.executable, "-c", WAITING, *arguments]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    process.stdout.readline()
    return process


# Notes SIGTERM, and needs longer than TorchX's 10 s to write its state.
SLOW_TO_STOP = """
import signal, sys, time
from pathlib import Path
stop = []
signal.signal(signal.SIGTERM, lambda *_: stop.append(True))
Path(sys.argv[1], "started").touch()
while not stop:
    time.sleep(0.1)
time.sleep(11)
Path(sys.argv[1], "saved").touch()
"""

INTERRUPTIBLE = """
import sys
from pathlib import Path
from launch import local, records
from tests.launch.test_local import run
folder = Path(sys.argv[1])
records.FILE = folder / "jobs.jsonl"
print(run(folder, nodes=1, procs_per_node=1, command=[str(folder / "slow.py"), str(folder)])[1].name)
"""


def test_an_interrupted_job_may_save_its_state_first(tmp_path: Path) -> None:
    (tmp_path / "slow.py").write_text(SLOW_TO_STOP)
    command = [sys.executable, "-c", INTERRUPTIBLE, str(tmp_path)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        deadline = time.monotonic() + 60
        while not (tmp_path / "started").exists():
            assert time.monotonic() < deadline
            time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        output, _ = process.communicate(timeout=60)
    assert output.splitlines()[-1] == "CANCELLED"
    assert (tmp_path / "saved").exists()
    record = records.JobRecord(**json.loads((tmp_path / "jobs.jsonl").read_text()))
    assert local.state(record) == AppState.CANCELLED
