"""A process that stands still is ended by its guard, whoever else is left."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from trainer.health.guard import Word
from trainer.health.process_table import READING, RUNNABLE, TRACED, Status

ROOT = Path(__file__).resolve().parents[3]

# A second of the guard's takes a twentieth.
GUARDED = """
import ctypes, os, signal, subprocess, sys, threading
from trainer.health import stopped
stopped.LOOK_S = 0.05
from trainer.health.guard import GUARD
GUARD.start()
helper = [sys.executable, "-c", "input()"]
def stop(pid):
    os.kill(pid, signal.SIGSTOP)
    os.waitid(os.P_PID, pid, os.WSTOPPED | os.WNOWAIT)
"""

STOPPED = "has been stopped by a signal (SIGSTOP) for 20 s; ending it"


def _run(text: str) -> "subprocess.CompletedProcess[str]":
    """Returns when the process and all that it has started have ended: they hold its output."""
    command = [sys.executable, "-c", GUARDED + text]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)


def test_one_that_is_stopped_alone() -> None:
    done = _run("os.kill(os.getpid(), signal.SIGSTOP)")
    assert (done.returncode, done.stderr) == (-signal.SIGKILL, f"error: rank 0 {STOPPED}\n")


@pytest.mark.parametrize(
    ("promise", "said"),
    [
        ('"its imports", 1000.0, idle_s=6.0', "has done nothing for 6 s in its imports (limit 6 s)"),
        ('"its checks", 7.0', "has taken 7 s for its checks (limit 7 s)"),
    ],
)
@pytest.mark.parametrize("hang", ["threading.Event().wait()", "while True: ctypes.PyDLL(None).pause()"])
def test_one_that_hangs_leaves_its_stacks_even_where_it_holds_the_interpreter(
    hang: str, promise: str, said: str
) -> None:
    done = _run(f"def never_comes():\n    {hang}\nGUARD.expect({promise})\nnever_comes()")
    assert done.returncode == -signal.SIGKILL
    assert done.stderr.startswith(f"error: rank 0 {said}; ending it; where it stands:\n")
    assert "never_comes" in done.stderr


def test_a_helper_that_is_stopped_is_ended_and_its_process_goes_on() -> None:
    done = _run(
        "helper = subprocess.Popen(helper, stdin=subprocess.PIPE)\nstop(helper.pid)\nprint(helper.wait(), end='')"
    )
    assert (done.returncode, done.stdout) == (0, str(-signal.SIGKILL))
    assert f"a helper of rank 0 ({sys.executable} -c input()) {STOPPED}" in done.stderr


def test_helpers_do_not_outlive_it_though_they_are_stopped() -> None:
    """The guard has seen them when it ends another one."""
    two = "first, second = (subprocess.Popen(helper, stdin=subprocess.PIPE) for _ in range(2))\n"
    done = _run(f"{two}stop(first.pid)\nfirst.wait()\nstop(second.pid)")
    assert done.returncode == 0


@pytest.mark.parametrize("end", ["pass", "os.kill(os.getpid(), signal.SIGKILL)"])
def test_a_guard_that_is_stopped_ends_with_its_process_all_the_same(end: str) -> None:
    """And does its work: the helper, stopped too, ends as well."""
    said = "GUARD.expect('its checks', 1000.0)\n"
    # What the guard has ended by its own look, it has seen.
    helpers = (
        "first, second = (subprocess.Popen(helper, stdin=subprocess.PIPE) for _ in range(2))\nstop(first.pid)\n"
        "first.wait()\nstop(second.pid)\n"
    )
    done = _run(f"{said}{helpers}stop(GUARD._process.pid)\n{end}")
    assert done.returncode in (0, -signal.SIGKILL)


def test_a_guard_whose_process_has_ended_before_it_looks_ends() -> None:
    assert _run("os._exit(0)").returncode == 0


def test_nothing_that_takes_long_to_import_comes_before_the_guard() -> None:
    """A process that is stopped before it has a guard is ended by nobody."""
    text = "import sys, trainer.__main__\nprint({'numpy', 'pydantic', 'torch', 'typer'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", text], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


def test_a_guard_that_has_gone_is_replaced() -> None:
    done = _run(
        "os.kill(GUARD._process.pid, signal.SIGKILL)\nGUARD._process.wait()\n"
        "GUARD.expect('its checks', 1000.0)\nos.kill(os.getpid(), signal.SIGSTOP)"
    )
    assert (done.returncode, done.stderr) == (-signal.SIGKILL, f"error: rank 0 {STOPPED}\n")


def test_a_guard_that_is_stopped_is_replaced_when_it_has_missed_many_words() -> None:
    done = _run(
        "first = GUARD._process.pid\nstop(first)\n"
        "while GUARD._process.pid == first:\n    GUARD.expect('its checks', 1000.0)"
    )
    assert (done.returncode, done.stderr) == (0, "")


IDLE = Status(state="S", ticks=500, page_reads=3, began=9, parent=1)


@pytest.mark.parametrize(
    "busy",
    [
        Status(state="S", ticks=502, page_reads=3, began=9, parent=1),
        Status(state="S", ticks=500, page_reads=4, began=9, parent=1),
        # A file server has not answered yet.
        Status(state=READING, ticks=500, page_reads=3, began=9, parent=1),
        # It would compute if other processes let it.
        Status(state=RUNNABLE, ticks=500, page_reads=3, began=9, parent=1),
    ],
)
def test_what_computes_or_reads_is_not_idle(busy: Status) -> None:
    word = Word(seconds=100.0, idle_s=3.0, what="its imports")
    seen = [word.broken(IDLE, now) for now in (IDLE, IDLE, busy, IDLE, IDLE, IDLE)]
    assert seen == [None] * 5 + ["has done nothing for 3 s in its imports (limit 3 s)"]
    word = Word(seconds=3.0, idle_s=3.0, what="its imports")
    seen = [word.broken(IDLE, busy) for _ in range(3)]
    assert seen == [None, None, "has taken 3 s for its imports (limit 3 s)"]


def test_a_debugger_may_look_at_it_for_as_long_as_it_likes() -> None:
    word = Word(seconds=1.0, idle_s=1.0, what="a sign of life")
    traced = Status(state=TRACED, ticks=500, page_reads=3, began=9, parent=1)
    assert [word.broken(IDLE, traced) for _ in range(9)] == [None] * 9
