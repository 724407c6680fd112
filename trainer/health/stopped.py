"""Processes that a signal has stopped (SIGSTOP): they live, do nothing and hear nothing until SIGCONT or SIGKILL."""

from collections.abc import Iterable

from trainer.health.process_table import STOPPED, status_of

LOOK_S = 1.0
"""Seconds between two looks."""
LOOKS = 20
"""Looks in a row that find a process stopped before it counts as lost.  Looks, not seconds: where a whole job is
suspended, those who look are so too."""
LOST = f"has been stopped by a signal (SIGSTOP) for {LOOKS * LOOK_S:.0f} s"
"""What is said of such a process."""


class StoppedProcesses:
    """How long which processes have been stopped, as far as they were looked at."""

    def __init__(self, more_looks: int = 0) -> None:
        """A process counts as lost after `more_looks` looks more than LOOKS."""
        self._more_looks = more_looks
        self._looks: dict[int, int] = {}

    def look(self, pids: Iterable[int]) -> list[int]:
        """The processes that have been stopped too long.  To be called every LOOK_S."""
        self._looks = {pid: self._looks.get(pid, 0) + 1 for pid in pids if is_stopped(pid)}
        return [pid for pid, looks in self._looks.items() if looks >= LOOKS + self._more_looks]


def is_stopped(pid: int) -> bool:
    """Whether a signal has stopped the process."""
    status = status_of(pid)
    return status is not None and status.state == STOPPED
