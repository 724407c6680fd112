"""What strikes a run in `python -m benchmarks.crash`: faults of its processes, damage to its files between starts."""

import json
import os
import random
import resource
import signal
from collections.abc import Callable
from pathlib import Path

from benchmarks.crash.small_disks import SmallDisk

ROOM = 300_000
"""Bytes that a file may have at most when files may grow no longer; less at random."""


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


def _command(pid: int) -> str:
    return text_of(Path(f"/proc/{pid}/cmdline")).replace("\0", " ")


def _send(number: signal.Signals, choose: Callable[[str], bool]) -> Callable[[int, random.Random], bool]:
    """A fault: a signal to one process of the job whose command line is chosen; false if there is none."""

    def strike(job: int, chance: random.Random) -> bool:
        chosen = [pid for pid in family(job) if choose(_command(pid))]
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
    """From now on no process of the job can make a file longer than that: a quota."""
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


def _is_reader(command: str) -> bool:
    return "forkserver" in command


def _is_writer(command: str) -> bool:
    return "checkpoint.writer" in command


def _is_guard(command: str) -> bool:
    return "trainer.health.guard" in command


def saves(job: int) -> bool:
    """Whether a job has come to its first checkpoint."""
    return any(_is_writer(_command(pid)) for pid in family(job))


def _stop_a_rank(job: int, chance: random.Random) -> bool:
    """Not before it has a guard, its first act, unless others or our own agent look after it."""
    commands = list(map(_command, family(job)))
    guarded = any(_is_guard(command) or " -m launch.node " in command for command in commands)
    return guarded and _send(signal.SIGSTOP, _is_rank)(job, chance)


FAULTS: dict[str, Callable[[int, random.Random], bool]] = {
    "kill a rank": _send(signal.SIGKILL, _is_rank),
    "stop a rank": _stop_a_rank,
    "terminate a rank": _send(signal.SIGTERM, _is_rank),
    "kill the agent": _send(signal.SIGKILL, _is_agent),
    "terminate the agent": _send(signal.SIGTERM, _is_agent),
    "interrupt the agent": _send(signal.SIGINT, _is_agent),
    "kill the launcher": _send(signal.SIGKILL, lambda command: " -m launch submit " in command),
    "close the launcher's terminal": _send(signal.SIGHUP, lambda command: " -m launch submit " in command),
    "kill a reader": _send(signal.SIGKILL, _is_reader),
    "stop a reader": _send(signal.SIGSTOP, _is_reader),
    "kill a writer": _send(signal.SIGKILL, _is_writer),
    "stop a writer": _send(signal.SIGSTOP, _is_writer),
    "kill a guard": _send(signal.SIGKILL, _is_guard),
    "stop a guard": _send(signal.SIGSTOP, _is_guard),
    "kill everything": _kill_all,
    "no longer files": _no_room,
}


UNFELT = {"kill a writer", "kill a guard"}
"""The job goes on."""
DISK_FAULTS = {"a full disk": SmallDisk.fill, "a read-only disk": SmallDisk.break_down}
"""Faults of the disk that the runs are on."""
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
