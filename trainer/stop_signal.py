"""Being asked to stop: noted at any time, obeyed by the training loop where all ranks can agree.

Standard library only: the signals are heard before torch is imported, which takes seconds.
"""

import os
import signal


class StoppedEarly(InterruptedError):
    """The run was asked to stop, and did so in good order; the command line says so in a line."""


class StopSignal:
    """Notes SIGTERM, which schedulers send before they take a machine back, SIGUSR1, by which they warn in time, and
    Ctrl-C.  A second Ctrl-C stops the process at once."""

    def __init__(self) -> None:
        self.requested = False

    def listen(self) -> None:
        """From now on, in the main thread; what the process's launcher held back for it arrives here."""
        numbers = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
        for number in numbers:
            signal.signal(number, self._note)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {*numbers, signal.SIGCHLD})

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
