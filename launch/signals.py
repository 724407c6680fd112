"""Signals held back and taken one by one, by processes that wait for others: no handler runs in the middle of anything,
and none is lost between two lines.

A child inherits that its signals are held until it asks for them, as the trainer does in its first lines: a signal that
comes while it is still importing waits instead of killing it.
"""

import math
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager

from trainer.health.stop_signal import asking

OF_SCHEDULERS = (signal.SIGTERM, signal.SIGUSR1)
"""What a scheduler asks with, as no terminal does."""
_LOOK_S = 1.0
"""How often a wait looks at the children themselves."""


def _held() -> set[signal.Signals]:
    return {*asking(), signal.SIGCHLD}


def hold() -> None:
    """Hold back the signals that ask to stop, and the end of a child, until this process ends: one that comes in its
    last moments does not change how it ends.

    A scheduler's own are held back where a job's script had them ignored, too: so that none kills what cannot hear it
    yet.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, OF_SCHEDULERS)
    for number in OF_SCHEDULERS:
        if signal.getsignal(number) == signal.SIG_IGN:
            signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_BLOCK, _held())


@contextmanager
def held() -> Iterator[None]:
    """As `hold`, until the block ends; within another such block, until that one ends."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _held())
    try:
        yield
    finally:
        # What came and was not taken has been dealt with by what came before it: a second Ctrl-C, the last child's end.
        while not before >= _held() and signal.sigtimedwait(_held(), 0) is not None:
            pass
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def next_signal(timeout_s: float | None) -> signal.Signals | None:
    """Wait for a signal that is held back; None after `timeout_s` seconds without one (None: wait for ever).

    A child that has ended counts even if its signal is lost: where this process has other threads, one of them that
    does not hold signals back may take it.
    """
    end = math.inf if timeout_s is None else time.monotonic() + timeout_s
    while True:
        taken = signal.sigtimedwait(_held(), max(0.0, min(_LOOK_S, end - time.monotonic())))
        # Stopped and continued (SIGCONT, as a scheduler does that suspends jobs) past its end, Python's wait answers
        # with whatever lies in its memory.
        if taken is not None and taken.si_signo in _held():
            return signal.Signals(taken.si_signo)
        if time.monotonic() >= end:
            return None
        if _child_has_ended():
            return signal.SIGCHLD


def _child_has_ended() -> bool:
    """Whether a child waits to be asked how it ended; leaves it waiting."""
    try:
        return os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None
    except ChildProcessError:
        return False
