"""What a run still needs while it saves is not ended by what asks the run to stop."""

import os
import pty
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from trainer.exit_status import FAILED, STOPPED
from trainer.health.stop_signal import ASKING, kept_from_children

ROOT = Path(__file__).resolve().parents[3]

# Echoes its input, as a helper that serves requests does; by itself each of the signals would end it.
SERVING = "import signal, sys; signal.signal(signal.SIGINT, signal.SIG_DFL); print(sys.stdin.readline(), end='')"


@pytest.mark.parametrize("number", ASKING)
def test_a_helper_serves_after_every_signal_that_asks_to_stop(number: signal.Signals) -> None:
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    with kept_from_children():
        helper = subprocess.Popen(
            [sys.executable, "-c", SERVING], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
    assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == before
    helper.send_signal(number)
    output, _ = helper.communicate("still here\n")
    assert (output, helper.returncode) == ("still here\n", 0)


LISTENS = """
from trainer.health.output import outlive_output
from trainer.health.stop_signal import STOP
outlive_output()
STOP.listen()
"""


def _start(text: str, **options: object) -> "subprocess.Popen[str]":
    """A process that runs `text` and can be struck when its first line has come."""
    command = [sys.executable, "-c", f"{LISTENS}{text}"]
    return subprocess.Popen(command, cwd=ROOT, text=True, **options)


# As ranks wait for one another: in C++, where no handler of Python's runs.
WAITS_FOR_RANKS = """
from torch.distributed import TCPStore
store = TCPStore("localhost", 0, 1, True)
print("waits", flush=True)
store.wait(["never"])
"""


@pytest.mark.parametrize("number", ASKING)
def test_before_the_first_step_a_stop_ends_the_process_wherever_it_is(number: signal.Signals) -> None:
    process = _start(WAITS_FOR_RANKS, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None and process.stdout.readline() == "waits\n"
    process.send_signal(number)
    _, said = process.communicate(timeout=60)
    assert (process.returncode, said) == (
        STOPPED,
        "stopped before the first step: start the same command again to resume\n",
    )


def test_before_the_first_step_a_stop_ends_a_process_whose_words_nobody_reads() -> None:
    read, write = os.pipe()
    process = _start(WAITS_FOR_RANKS, stdout=subprocess.PIPE, stderr=write)
    os.close(read)
    os.close(write)
    assert process.stdout is not None and process.stdout.readline() == "waits\n"
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == STOPPED


STUCK = """
import ctypes
STOP.heeded = True
print("stuck", flush=True)
while True:
    ctypes.CDLL(None).pause()
"""


def test_a_second_interrupt_ends_a_run_at_once_wherever_it_is() -> None:
    process = _start(STUCK, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env={"PATH": os.environ["PATH"]})
    assert process.stdout is not None and process.stdout.readline() == "stuck\n"
    process.send_signal(signal.SIGINT)
    # Signals of one number that wait are one.
    while signal.SIGINT in signals_pending(process.pid):
        pass
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == FAILED
    assert said == "error: ended at once; the same command goes on from the newest checkpoint\n"


def signals_pending(pid: int) -> set[int]:
    bits = int(Path(f"/proc/{pid}/status").read_text().split("ShdPnd:")[1].split()[0], 16)
    return {number for number in range(1, 64) if bits >> (number - 1) & 1}


STEPS = """
import signal, sys, time
STOP.heeded = True
print("steps", flush=True)
while not STOP.requested:
    time.sleep(0.02)
print("what a terminal that is gone would refuse", flush=True)
sys.exit(3)
"""


def test_a_terminal_that_is_closed_stops_a_run_in_good_order() -> None:
    here, there = pty.openpty()
    with _start(STEPS, stdout=there, stderr=there, start_new_session=True) as process:
        os.close(there)
        said = b""
        while b"steps" not in said:
            said += os.read(here, 100)
        os.close(here)
        process.send_signal(signal.SIGHUP)
        assert process.wait(timeout=60) == STOPPED


def test_what_nohup_started_stays_when_its_terminal_goes() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        process = _start(STEPS, stdout=subprocess.PIPE)
    finally:
        signal.signal(signal.SIGHUP, before)
    assert process.stdout is not None and process.stdout.readline() == "steps\n"
    process.send_signal(signal.SIGHUP)
    ignored = int(Path(f"/proc/{process.pid}/status").read_text().split("SigIgn:")[1].split()[0], 16)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert ignored >> (signal.SIGHUP - 1) & 1 and process.returncode == STOPPED
