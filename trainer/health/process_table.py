"""What the system says of processes (Linux: /proc).  Standard library only."""

from dataclasses import dataclass
from pathlib import Path

STOPPED, TRACED, RUNNABLE, READING, ENDED = "T", "t", "R", "D", "Z"
"""States of a process: by a signal (SIGSTOP); by a debugger; it computes, or would if a core were free; it waits for a
disk or a file server; it is done, and whoever started it has not asked how."""


@dataclass(frozen=True, slots=True)
class Status:
    """A process at a moment."""

    state: str
    """The process's state, one letter."""
    ticks: int
    """Hundredths of a second for which its threads have computed so far."""
    page_reads: int
    """How often they have waited for a page of a file."""
    began: int
    """When it was started, in ticks since the system was, whatever clocks have been set to since: tells it from a later
    process of the same number."""
    parent: int
    """The process that it belongs to."""


def status_of(pid: int) -> Status | None:
    """None if there is no such process."""
    try:
        # After the command's name, which may hold anything, in parentheses; proc_pid_stat(5) counts from 1, and pid and
        # name are the first two.
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return Status(
        state=fields[0],
        parent=int(fields[1]),
        page_reads=int(fields[9]),
        ticks=int(fields[11]) + int(fields[12]),
        began=int(fields[19]),
    )


def children(pid: int) -> list[int]:
    """Processes that a process has started, from whichever thread, and that run."""
    found: list[int] = []
    for file in Path(f"/proc/{pid}/task").glob("*/children"):
        try:
            found += map(int, file.read_text().split())
        except (FileNotFoundError, ProcessLookupError):
            continue
    return found


def descendants(pid: int) -> list[int]:
    """The processes below a process, those nearer to it first."""
    found = children(pid)
    for child in found:
        found += children(child)
    return found


def rank_of(pid: int) -> str | None:
    """The place in its job that a process was started with; None if it has none, or has ended."""
    try:
        variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except (FileNotFoundError, ProcessLookupError):
        return None
    return next((entry[5:].decode() for entry in variables if entry.startswith(b"RANK=")), None)


def command_of(pid: int) -> str:
    """The command line of a process; empty if it has ended."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
    except (FileNotFoundError, ProcessLookupError):
        return ""
