"""The processes of a job on one node: started, told to stop, and the one that failed first named.

Each is told its place by torchrun's variables, so the trainer knows of no launcher.
"""

import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from launch import signals
from trainer.exit_status import FAILED, STOPPED
from trainer.health.fitness import node_name
from trainer.health.stop_signal import AGENT, OWN_AGENT
from trainer.health.stopped import LOOK_S, LOST, StoppedProcesses

MEMORY_EVENTS = Path("/proc/vmstat")
"""Where Linux counts processes that it ended because memory ran out: the machine's, or what a job may have of it."""
GRACE_S = 5.0
"""How long the others may take to end after one has failed, whose collectives fail at once, or never; or after one
has stopped in good order, as all do together once they take steps."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Place:
    """Where this node stands in the job."""

    nodes: int
    """Nodes of the job."""
    procs_per_node: int
    """Processes on each node."""
    node_rank: int
    """This machine's number, from 0."""
    first_host: str
    """Name of the first node, where its first process keeps the job's store."""
    port: int
    """The port of that node at which all processes meet."""

    def rank(self, local_rank: int) -> int:
        """The number in the job of a process of this node."""
        return self.node_rank * self.procs_per_node + local_rank

    def variables(self, local_rank: int, environment: Mapping[str, str]) -> dict[str, str]:
        """The environment of one process."""
        own = {
            "RANK": str(self.rank(local_rank)),
            "LOCAL_RANK": str(local_rank),
            "WORLD_SIZE": str(self.nodes * self.procs_per_node),
            "LOCAL_WORLD_SIZE": str(self.procs_per_node),
            "MASTER_ADDR": self.first_host,
            "MASTER_PORT": str(self.port),
            "PYTHONUNBUFFERED": "1",
            AGENT: OWN_AGENT,
        }
        if self.procs_per_node > 1:
            own["OMP_NUM_THREADS"] = environment.get("OMP_NUM_THREADS", "1")
        return {**environment, **own}


def run_processes(command: Sequence[str], place: Place) -> int:
    """Run `command` as every process of this node; returns when all have ended, with the job's exit status.

    To be called with signals held.  The first that asks to stop is passed on, and then waited for as long as saving
    takes; a second Ctrl-C ends the processes.  When one fails, the others are asked to end and, after GRACE_S, made to.
    One that a signal has stopped for good is ended, and counts as failed.  The end of the process that started this one
    asks to stop, and so does that of one which was asked alone, before ranks had met: others would wait for it.
    """
    running = {
        local_rank: subprocess.Popen(command, env=place.variables(local_rank, os.environ), start_new_session=True)
        for local_rank in range(place.procs_per_node)
    }
    status, deadline, stops_at = 0, None, math.inf
    asked: set[signal.Signals] = set()
    stopped, lost = StoppedProcesses(), set[int]()
    started_by, kills = os.getppid(), _memory_kills()
    while running:
        received = signals.next_signal(LOOK_S)
        if deadline is not None and time.monotonic() >= deadline:
            _send(signal.SIGKILL, running)
            deadline = None
        if received is None:
            kills = _memory_kills()
            lost |= set(stopped.look(process.pid for process in running.values()))
            _send(signal.SIGKILL, {rank: process for rank, process in running.items() if process.pid in lost})
            if (os.getppid() != started_by or time.monotonic() >= stops_at) and not asked:
                # The launcher that this job belongs to has ended, or a rank that was asked to stop.
                received = signal.SIGTERM
        if received not in (None, signal.SIGCHLD):
            if received == signal.SIGINT and received in asked:
                _send(signal.SIGKILL, running)
            elif not asked:
                _send(received, running)
            asked.add(received)
        for local_rank, process in list(running.items()):
            code = process.poll()
            if code is None:
                continue
            del running[local_rank]
            if status in (0, STOPPED) and code not in (0, STOPPED):
                how = LOST if process.pid in lost else _how_it_ended(code, out_of_memory=_memory_kills() > kills)
                print(_failure(place, local_rank, how), file=sys.stderr, flush=True)
                _send(signal.SIGTERM, running)
                deadline = time.monotonic() + GRACE_S
                status = code if code > 0 else FAILED
            elif status == 0:
                status = code
                stops_at = time.monotonic() + GRACE_S if code == STOPPED else math.inf
    return status


def _send(number: signal.Signals, running: Mapping[int, "subprocess.Popen[bytes]"]) -> None:
    for process in running.values():
        process.send_signal(number)


def _how_it_ended(code: int, *, out_of_memory: bool) -> str:
    if code >= 0:
        return f"ended with status {code}"
    by_whom = ""
    if -code == signal.SIGKILL:
        by_whom = " (by its guard, or by hand)"
        if out_of_memory:
            by_whom = " as memory ran out, the node's or what its job may have: ask for more, or for fewer processes"
    return f"was ended by {signal.Signals(-code).name}{by_whom}"


def _memory_kills() -> int:
    """How many processes of this machine have been ended so far because memory ran out."""
    lines = MEMORY_EVENTS.read_text().splitlines() if MEMORY_EVENTS.is_file() else []
    return sum(int(line.split()[1]) for line in lines if line.startswith("oom_kill "))


def _failure(place: Place, local_rank: int, how: str) -> str:
    """One line with a time, by which the first failure of all nodes is found."""
    moment = time.strftime("%Y-%m-%d %H:%M:%S")
    return f"{moment} rank {place.rank(local_rank)} failed: it {how} (node {place.node_rank}, {node_name()})"
