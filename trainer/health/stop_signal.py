"""Requests to stop (signals): before the first step they end the process; later all ranks stop at the same step.

Standard library only: the signals are heard before torch is imported, which takes seconds.
"""

import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Thread

from trainer.exit_status import FAILED, STOPPED
from trainer.health.stopped import LOOK_S

AGENT, OWN_AGENT = "TORCHELASTIC_RUN_ID", "launch"
"""The variable by which a process knows that an agent started it, whose end is the job's; its value from ours."""

ASKING = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)
"""What asks a run to save and stop: a scheduler's end, its early warning, Ctrl-C, a terminal that is closed."""


def asking() -> set[signal.Signals]:
    """The signals that ask this process to stop: one that nohup started stays when its terminal goes."""
    return {number for number in ASKING if signal.getsignal(number) != signal.SIG_IGN}


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
    """Notes what asks to stop.  A second Ctrl-C stops the process at once."""

    def __init__(self) -> None:
        self.requested = False
        self.heeded = False
        """Whether the training loop looks at it: once there is a step to save.  Until then a stop ends the process."""

    def listen(self) -> None:
        """From now on, in the main thread; what the process's launcher held back for it arrives here."""
        heard, arrives = os.pipe()
        os.set_blocking(arrives, False)
        for number in asking():
            signal.signal(number, self._note)
        # Handlers wait until the main thread is back from C, where imports and meetings of ranks spend minutes.
        signal.set_wakeup_fd(arrives, warn_on_full_buffer=False)
        os.register_at_fork(after_in_child=lambda: signal.set_wakeup_fd(-1))
        Thread(target=self._hear, args=(heard,), name="stop-signal", daemon=True).start()
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {*ASKING, signal.SIGCHLD})
        if AGENT in os.environ:
            Thread(target=self._follow, args=(os.getppid(),), name="follow-agent", daemon=True).start()

    def _follow(self, agent: int) -> None:
        """Stop when the agent that started this process dies."""
        # Processes whose parent has died are given to the first of the machine, which is an agent in containers only.
        orphaned = agent == 1 and b"python" not in Path("/proc/1/cmdline").read_bytes()
        while not orphaned and os.getppid() == agent:
            time.sleep(LOOK_S)
        self.ask("the agent that started this rank has died")

    def ask(self, why: str) -> None:
        """Stop, because something has gone on which the job depends; saves what there is to save.  From any thread."""
        print(f"error: {why}; stopping", file=sys.stderr, flush=True)
        if not self.heeded:
            os._exit(1)
        self.requested = True

    def _hear(self, heard: int) -> None:
        interrupts = 0
        while number := os.read(heard, 1):
            interrupts += number[0] == signal.SIGINT
            # torchrun passes Ctrl-C on to processes that the terminal has told already.
            if interrupts > 1 and AGENT not in os.environ:
                _say(b"error: ended at once; the same command goes on from the newest checkpoint\n")
                os._exit(FAILED)
            if number[0] in ASKING and not self.heeded:
                if os.environ.get("RANK", "0") == "0":
                    _say(b"stopped before the first step: start the same command again to resume\n")
                os._exit(STOPPED)

    def _note(self, signum: int, frame: object) -> None:
        self.requested = True
        if signum != signal.SIGINT:
            self.ignore()

    @staticmethod
    def ignore() -> None:
        """From now on: the process stops or is done, and must not be ended by another signal while Python clears up."""
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)


def _say(line: bytes) -> None:
    """Past what Python holds back, whose lock the main thread may have."""
    with suppress(OSError):
        os.write(2, line)


STOP = StopSignal()
"""The stop signal of this process."""
