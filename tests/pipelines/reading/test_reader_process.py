"""The process that reads: ends with its consumer however that ends, and with nothing else."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from contextlib import closing
from multiprocessing.queues import Queue
from pathlib import Path
from typing import Any

import pytest

from pipelines.config import DataConfig
from pipelines.reading.loader import LOOK_S, Loader, build_loader
from tests.pipelines.made_up import write_dataset
from tests.support.distributed import run_ranks

PATIENCE_S = 60
# Takes one batch, says which process reads, and goes on as told.
CONSUMER = """
import multiprocessing, os, sys, time
from pipelines.config import DataConfig
from pipelines.reading.loader import build_loader
config = DataConfig(path=sys.argv[1], global_batch_size=4, max_history_len=24, reader_threads=1, num_epochs=1000)
batches = iter(build_loader(config, split="train", rank=0, world_size=1))
next(batches)
print(multiprocessing.active_children()[0].pid, flush=True)
"""


def loader(folder: Path) -> Loader:
    write_dataset(folder)
    config = DataConfig(path=str(folder), global_batch_size=4, max_history_len=24, reader_threads=2)
    return build_loader(config, split="train", rank=0, world_size=1)


def reader() -> multiprocessing.process.BaseProcess:
    [process] = multiprocessing.active_children()
    return process


def consumer(folder: Path, then: str) -> "subprocess.Popen[str]":
    write_dataset(folder)
    command = [sys.executable, "-c", CONSUMER + then, str(folder)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def is_running(pid: int) -> bool:
    """Whether the process exists and has not ended."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state not in "ZX"


def wait_until_gone(pid: int) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while is_running(pid):
        assert time.monotonic() < deadline, f"process {pid} is still there"
        time.sleep(0.01)


def test_reader_ends_with_the_data_and_with_a_closed_iterator(tmp_path: Path) -> None:
    batches = loader(tmp_path / "data")
    assert len(list(batches)) == 26
    assert not multiprocessing.active_children()
    with closing(iter(batches)) as iterator:
        next(iterator)
        assert reader().is_alive()
    assert not multiprocessing.active_children()


def test_reading_begins_before_the_first_batch_is_asked_for(tmp_path: Path) -> None:
    with closing(iter(loader(tmp_path / "data"))):
        assert reader().is_alive()


def test_signals_for_all_processes_of_a_job_leave_the_reader_to_its_consumer(tmp_path: Path) -> None:
    """A scheduler's SIGTERM, its warning, and a terminal's SIGINT: the trainer still takes steps before it saves."""
    with closing(iter(loader(tmp_path / "data"))) as iterator:
        next(iterator)
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
            process = reader()
            assert process.pid is not None
            os.kill(process.pid, number)
        assert len(list(iterator)) == 25


def test_killed_reader_is_an_error_within_a_second_and_not_a_wait(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    get, waits = Queue.get, []

    def noted(queue: Any, block: bool = True, timeout: float | None = None) -> Any:
        waits.append(timeout)
        return get(queue, block, timeout)

    monkeypatch.setattr(Queue, "get", noted)
    with closing(iter(loader(tmp_path / "data"))) as iterator:
        next(iterator)
        reader().kill()
        with pytest.raises(OSError, match="process that reads the data ended unexpectedly with exit code -9"):
            list(iterator)
    assert set(waits) == {LOOK_S}


def test_consumer_that_fails_with_an_open_iterator_ends_at_once(tmp_path: Path) -> None:
    process = consumer(tmp_path / "data", "raise ValueError('something else')")
    output, errors = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 1
    assert "something else" in errors
    wait_until_gone(int(output))


def _fails_with_an_open_iterator(folder: str) -> None:
    batches = iter(loader(Path(folder)))
    next(batches)
    raise KeyError("made up")


def test_a_failing_process_of_a_test_ends_though_its_iterator_is_open(tmp_path: Path) -> None:
    """Of multiprocessing, which runs nothing of atexit."""
    with pytest.raises(Exception, match="made up"):
        run_ranks(1, _fails_with_an_open_iterator, str(tmp_path / "data"))


def test_killed_consumer_leaves_no_reader(tmp_path: Path) -> None:
    process = consumer(tmp_path / "data", "time.sleep(600)")
    assert process.stdout is not None
    pid = int(process.stdout.readline())
    assert is_running(pid)
    process.kill()
    process.communicate()
    wait_until_gone(pid)
