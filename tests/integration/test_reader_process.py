"""A run whose batches come from a reader process trains like one that reads them itself, also when it is stopped."""

import os
import signal
import time
from pathlib import Path

import pytest

from tests.support.training import TIMEOUT_S, losses, read_lines, start_training, train
from trainer.exit_status import STOPPED

STEPS = "max_steps=16"
READER = "data.reader_threads=2"


@pytest.mark.parametrize(("number", "ranks"), [(signal.SIGTERM, 1), (signal.SIGUSR1, 1), (signal.SIGINT, 2)])
def test_a_signal_to_all_processes_stops_the_run_in_good_order(
    number: signal.Signals, ranks: int, tmp_path: Path
) -> None:
    """As Slurm sends SIGTERM and SIGUSR1, and a terminal SIGINT; the trainer notes it, takes its step on a batch from
    the reader, saves, and goes on."""
    run = tmp_path / "run"
    process = start_training(run, ranks, STEPS, READER)
    deadline = time.monotonic() + TIMEOUT_S
    while not read_lines(run / "metrics.jsonl"):
        assert time.monotonic() < deadline
        assert process.poll() is None, process.communicate()[0][-6000:]
        time.sleep(0.01)
    os.killpg(process.pid, number)
    output, _ = process.communicate(timeout=TIMEOUT_S)
    # torchrun has a status of its own.
    assert process.returncode == (STOPPED if ranks == 1 else 1)
    assert "stopped after step" in output
    stopped = losses(read_lines(run / "metrics.jsonl"))
    assert 1 <= len(stopped) < 16
    if ranks > 1:
        return
    # Also evaluates with a reader, between steps and at the end.
    resumed = losses(train(run, 1, STEPS, READER, "evaluation.every_steps=5"))
    assert resumed == losses(train(tmp_path / "alone", 1, STEPS))
    assert resumed.items() >= stopped.items()
