"""What strikes a run in `python -m benchmarks.crash`: faults of its processes, damage to its files between starts."""

import json
import os
import random
import resource
import signal
from collections.abc import Callable
from pathlib import Path

ROOM = 300_000
"""Bytes that a file may have at most when room runs out; less at random."""


def family(pid: int) -> list[int]:
    """A process and all below it, parents first."""
    found = [pid]
    for parent in found:
        for children in Path(f"/proc/{parent}/task").glob("*/children"):
            found += [int(child) for child in text_of(children).split()]
    return found


def text_of(path: Path) -> str:
    """What a file of /proc holds; nothing, if its process has ended."""
    try:
        return path.read_text()
    except (FileNotFoundError, ProcessLookupError):
        return ""


def _send(number: signal.Signals, choose: Callable[[str], bool]) -> Callable[[int, random.Random], bool]:
    """A fault: a signal to one process of the job whose command line is chosen; false if there is none."""

    def strike(job: int, chance: random.Random) -> bool:
        commands = {pid: text_of(Path(f"/proc/{pid}/cmdline")).replace("\0", " ") for pid in family(job)}
        chosen = [pid for pid, command in commands.items() if choose(command)]
        if not chosen:
            return False
        try:
            os.kill(chance.choice(chosen), number)
        except ProcessLookupError:
            return False
        return True

    return strike


def _kill_all(job: int, chance: random.Random) -> bool:
    """The machine is gone: every process at once."""
    for pid in family(job):
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
    return True


def _no_room(job: int, chance: random.Random) -> bool:
    """From now on no process of the job can make a file longer than that: a disk without room."""
    limit = chance.randrange(ROOM)
    for pid in family(job):
        try:
            resource.prlimit(pid, resource.RLIMIT_FSIZE, (limit, limit))
        except ProcessLookupError:
            continue
    return True


def _is_agent(command: str) -> bool:
    return "distributed.run" in command or " -m launch.node " in command


def _is_rank(command: str) -> bool:
    return " -m trainer train " in command and not _is_agent(command)


STOP_A_RANK = "stop a rank"


FAULTS: dict[str, Callable[[int, random.Random], bool]] = {
    "kill a rank": _send(signal.SIGKILL, _is_rank),
    STOP_A_RANK: _send(signal.SIGSTOP, _is_rank),
    "kill the agent": _send(signal.SIGKILL, _is_agent),
    "terminate the agent": _send(signal.SIGTERM, _is_agent),
    "kill the launcher": _send(signal.SIGKILL, lambda command: " -m launch submit " in command),
    "close the launcher's terminal": _send(signal.SIGHUP, lambda command: " -m launch submit " in command),
    "kill a reader": _send(signal.SIGKILL, lambda command: "forkserver" in command),
    "kill a writer": _send(signal.SIGKILL, lambda command: "checkpoint.writer" in command),
    "kill everything": _kill_all,
    "no room on the disk": _no_room,
}
TEAR = "tear the last line of the metrics"
DAMAGES = ("flip a bit", "cut a file", "delete a file", TEAR)
"""While nothing runs: to the newest checkpoint, where there is another one; to a line of a later step."""


def damage(run_dir: Path, kind: str, chance: random.Random) -> bool:
    """Harm a file; false if there is none that a run can do without."""
    complete = sorted(file.parent for file in run_dir.glob("checkpoints/step-*/COMPLETE"))
    if kind == TEAR:
        return _tear(run_dir / "metrics.jsonl", int(complete[-1].name.rpartition("-")[2]) if complete else 0, chance)
    if len(complete) < 2:
        return False
    file = chance.choice(sorted(path for path in complete[-1].iterdir() if path.name != "COMPLETE"))
    content = bytearray(file.read_bytes())
    if kind == "delete a file":
        file.unlink()
    elif kind == "cut a file":
        file.write_bytes(content[: chance.randrange(len(content))])
    else:
        content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
        file.write_bytes(content)
    return True


def _tear(file: Path, saved: int, chance: random.Random) -> bool:
    """Cut the last line somewhere, if it is of a step after the one that is saved: such a line need not be there."""
    lines = file.read_bytes().splitlines(keepends=True) if file.exists() else []
    if not lines or not lines[-1].endswith(b"\n") or json.loads(lines[-1])["step"] <= saved:
        return False
    file.write_bytes(b"".join(lines[:-1]) + lines[-1][: chance.randrange(len(lines[-1]))])
    return True
