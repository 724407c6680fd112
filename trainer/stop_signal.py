"""Being asked to stop: noted at any time, obeyed by the training loop where all ranks can agree.

Standard library only: the signals are heard before torch is imported, which takes seconds.
"""

import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Thread

ASKING = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
"""What asks a run to save and stop."""


@contextmanager
def kept_from_children() -> Iterator[None]:
    """What is started within the block never hears of a stop: schedulers and terminals signal every process of a job,
    and a run needs its helpers until it has saved its state."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ASKING)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class StoppedEarly(InterruptedError):
    """The run was asked to stop, and did so in good order; the command line says so in a line."""


class StopSignal:
    """Notes SIGTERM, which schedulers send before they take a machine back, SIGUSR1, by which they warn in time, and
    Ctrl-C.  A second Ctrl-C stops the process at once."""

    def __init__(self) -> None:
        self.requested = False
        self.heeded = False
        """Whether the training loop looks at it: from its first step on."""

    def listen(self) -> None:
        """From now on, in the main thread; what the process's launcher held back for it arrives here."""
        for number in ASKING:
            signal.signal(number, self._note)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {*ASKING, signal.SIGCHLD})
        if "TORCHELASTIC_RUN_ID" in os.environ:
            Thread(target=self._follow, args=(os.getppid(),), name="follow-agent", daemon=True).start()

    def _follow(self, agent: int) -> None:
        """Stop when the agent that started this process dies; at once where nothing has been trained, for the ranks
        that it would have started may never come."""
        # Processes whose parent has died are given to the first of the machine, which is an agent in containers only.
        orphaned = agent == 1 and b"python" not in Path("/proc/1/cmdline").read_bytes()
        while not orphaned and os.getppid() == agent:
            time.sleep(1.0)
        print("error: the agent that started this rank has died; stopping", file=sys.stderr, flush=True)
        if not self.heeded:
            os._exit(1)
        self.requested = True

    def _note(self, signum: int, frame: object) -> None:
        self.requested = True
        if signum != signal.SIGINT:
            self.ignore()
        # torchrun passes Ctrl-C on to processes that the terminal has told already.
        if signum == signal.SIGINT and "TORCHELASTIC_RUN_ID" not in os.environ:
            signal.signal(signal.SIGINT, signal.default_int_handler)

    @staticmethod
    def ignore() -> None:
        """From now on: the process stops or is done, and must not be ended by another signal while Python clears up."""
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, signal.SIG_IGN)


STOP = StopSignal()
"""This process's."""
