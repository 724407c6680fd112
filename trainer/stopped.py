"""Processes that a signal has stopped (SIGSTOP): they live, do nothing, and hear of nothing until SIGCONT or SIGKILL.

A rank can be watched over the job's store once it has joined the job; before that only from the outside, by the agent
that started it and by its siblings.  Standard library only.
"""

from collections.abc import Iterable
from pathlib import Path

LOOK_S = 1.0
"""Between two looks."""
LOOKS = 20
"""Looks in a row that find a process stopped before it counts as lost.  Looks, not seconds: where a whole job is
suspended, those who look are so too."""
LOST = f"has been stopped by a signal (SIGSTOP) for {LOOKS * LOOK_S:.0f} s"
"""What is said of such a process."""


class StoppedProcesses:
    """How long which processes have been stopped, as far as they were looked at."""

    def __init__(self) -> None:
        self._looks: dict[int, int] = {}

    def look(self, pids: Iterable[int]) -> list[int]:
        """Those that have been stopped too long.  To be called every LOOK_S."""
        self._looks = {pid: self._looks.get(pid, 0) + 1 for pid in pids if _is_stopped(pid)}
        return [pid for pid, looks in self._looks.items() if looks >= LOOKS]


def children(pid: int) -> list[int]:
    """Processes that a process has started, and that run."""
    try:
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except FileNotFoundError:
        return []


def rank_of(pid: int) -> str | None:
    """The place in its job that a process was started with; None if it has none, or has ended."""
    try:
        variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except (FileNotFoundError, ProcessLookupError):
        return None
    return next((entry[5:].decode() for entry in variables if entry.startswith(b"RANK=")), None)


def _is_stopped(pid: int) -> bool:
    try:
        # After the command's name, which may hold anything, in parentheses.
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"
    except (FileNotFoundError, ProcessLookupError):
        return False
