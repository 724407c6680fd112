"""Watches over a job: finds a rank that is late, logs where every rank stands, and ends all, so that it can resume.

    every second, each rank's own thread:  beat (count, phase, step) -> store    look at the next rank's beat
    one is late:  verdict -> every rank leaves its stacks -> the judge names the culprit -> all ranks end

A rank judges its own phase, for its thread runs while its main thread hangs; the rank before it sees when even that
thread stands still (SIGSTOP, a dead machine), and so does its guard, where no rank is left.  A phase is late when it
takes longer than `watch.least_s` and than `FACTOR` times the longest so far; before the first few of a kind, when
compilers run, than `watch.first_s`.
"""

import contextlib
import json
import logging
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass
from typing import Any

from torch._C._distributed_c10d import Store

from trainer.config import WatchConfig
from trainer.health.guard import GUARD, IDLE_S
from trainer.health.stop_signal import STOP
from trainer.parallel.mesh import Mesh

logger = logging.getLogger(__name__)

Phase = Callable[[str], AbstractContextManager[Any]]
"""`Watchdog.phase`, or `nullcontext` where nobody watches."""

BEAT_S = 1.0
PAUSE_S = 5 * BEAT_S
"""Between two beats of a process that stood still as a whole."""
FACTOR = 10.0
"""Times the longest phase of its kind so far."""
FIRST = 5
"""Phases of a kind that have the longer limit."""
STACKS_S = 3.0
"""How long the judge waits for the others' stacks."""
SENTENCE_S = 10.0
"""How long a rank waits for the judge before it ends without his word."""
END_S = 120.0
"""What the end of a process may take after its watch, if it does something."""

_OVER = "over"
"""The phase of a rank whose watch has ended."""
_VERDICT, _SENTENCE = "watch/verdict", "watch/sentence"


@dataclass(frozen=True, slots=True)
class Beat:
    """What a rank says of itself."""

    count: int
    phase: str
    step: int
    seconds: float
    """Time that it has been in this phase."""
    host: str
    pid: int


class Clock:
    """How long a rank has been in which phase, and how long that may be."""

    def __init__(self, limits: WatchConfig) -> None:
        self._limits = limits
        self._phases = ["start"]
        self._since = time.monotonic()
        self._longest: dict[str, float] = {}
        self._number: dict[str, int] = {}
        self.step = 0

    @property
    def phase(self) -> str:
        """The phase that the rank is in, the innermost of nested ones."""
        return self._phases[-1]

    @property
    def seconds(self) -> float:
        """Time since that phase began."""
        return time.monotonic() - self._since

    def limit(self, phase: str) -> float:
        """Seconds that a phase may take now."""
        if self._number.get(phase, 0) < FIRST:
            return self._limits.first_s
        return max(self._limits.least_s, FACTOR * self._longest[phase])

    def forgive(self, seconds: float) -> None:
        """Take time out of the phase, for nothing of this process ran in it."""
        self._since += seconds

    def enter(self, phase: str) -> None:
        """A phase begins; the one around it stands still."""
        self._since = time.monotonic()
        self._phases.append(phase)

    def leave(self) -> None:
        """The innermost phase is over."""
        self._note(self._phases.pop())

    def stepped(self, step: int) -> None:
        """A step is done; whatever came before the first was the start."""
        self._phases[-1] = "step"
        self.step = step
        self._note("step")

    def _note(self, phase: str) -> None:
        self._longest[phase] = max(self._longest.get(phase, 0.0), self.seconds)
        self._number[phase] = self._number.get(phase, 0) + 1
        self._since = time.monotonic()


class Watchdog:
    """This rank's part of the watch; `phase` and `stepped` are called by its main thread."""

    def __init__(self, store: Store, mesh: Mesh, limits: WatchConfig) -> None:
        # A connection of its own: a store serves one call at a time, and a call may wait.
        self._store: Store = store.clone()  # type: ignore[attr-defined]  # missing in the stubs
        self._mesh = mesh
        self.clock = Clock(limits)
        self._limits = limits
        self._main = threading.main_thread().ident
        self._over = threading.Event()
        # From now on the others know which process this rank is, should it be lost.
        self._tell(0)
        self._thread = threading.Thread(target=self._run, name="watchdog", daemon=True)
        self._thread.start()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """What happens here is a phase of its own kind, with its own limit."""
        self.clock.enter(name)
        try:
            yield
        finally:
            self.clock.leave()

    def stepped(self, step: int) -> None:
        """Take note that a further step is done."""
        self.clock.stepped(step)

    def close(self) -> None:
        """This rank's watch is over; the rank before it no longer expects to hear of it."""
        self._over.set()
        self._thread.join()
        self.clock.enter(_OVER)
        GUARD.expect("its end", END_S, idle_s=IDLE_S)
        # The store may have ended with the first node's agent.
        with contextlib.suppress(RuntimeError):
            self._tell(-1)

    def _run(self) -> None:
        count, seen, seen_at = 0, -1, time.monotonic()
        looked_at = seen_at
        following = (self._mesh.rank + 1) % self._mesh.world_size
        try:
            while not self._over.wait(BEAT_S):
                # Later than the other ranks, which can name a culprit.
                GUARD.expect("a sign of life", self._limits.least_s + STACKS_S + SENTENCE_S)
                pause, looked_at = time.monotonic() - looked_at, time.monotonic()
                if pause > PAUSE_S:
                    # A job that is suspended, with its machine or by its scheduler, goes on where it was.
                    self.clock.forgive(pause)
                    seen_at += pause
                count += 1
                self._tell(count)
                if self._store.check([_VERDICT]):
                    self._end()
                late = self._late()
                other = self._read_beat(following)
                # Every rank has joined the job before one watches, so one that never said anything is silent too.
                if other is not None and (other.phase == _OVER or other.count != seen):
                    seen, seen_at = other.count, time.monotonic()
                silent = time.monotonic() - seen_at
                if late is None and silent > self._limits.least_s:
                    late = f"rank {following} has been silent for {silent:.0f} s"
                if late is not None:
                    self._judge(late)
        except RuntimeError as error:
            # The store's process, the first node's agent, has gone: so will this job.
            GUARD.expect("its last save", self._limits.first_s)
            if not self._over.is_set():
                STOP.ask(f"the job's store is gone ({str(error).splitlines()[0]})")

    def _tell(self, count: int) -> None:
        clock = self.clock
        beat = Beat(count, clock.phase, clock.step, clock.seconds, socket.gethostname(), os.getpid())
        self._store.set(_beat_key(self._mesh.rank), json.dumps(asdict(beat)))

    def _late(self) -> str | None:
        phase, seconds = self.clock.phase, self.clock.seconds
        limit = self.clock.limit(phase)
        if seconds <= limit:
            return None
        return f"rank {self._mesh.rank} has been in phase {phase} for {seconds:.0f} s (limit {limit:.0f} s)"

    def _read_beat(self, rank: int) -> Beat | None:
        key = _beat_key(rank)
        return Beat(**json.loads(self._store.get(key))) if self._store.check([key]) else None

    def _judge(self, late: str) -> None:
        """End the job as its judge, unless another rank is faster."""
        mine = f"{self._mesh.rank}: {late}"
        if self._store.compare_set(_VERDICT, "", mine).decode() != mine:
            self._end()
        self._leave_stack()
        deadline = time.monotonic() + STACKS_S
        while time.monotonic() < deadline and not self._store.check(list(map(_stack_key, self._ranks()))):
            time.sleep(BEAT_S / 10)
        stacks = {rank: self._read_stack(rank) for rank in self._ranks()}
        beats = {rank: self._read_beat(rank) for rank in self._ranks()}
        sentence = f"{late}; {describe_culprits(stacks, beats)}; every rank's stacks are in its log"
        self._store.set(_SENTENCE, sentence)
        for rank, stack in stacks.items():
            beat = beats[rank]
            if stack is None and beat is not None and beat.host == socket.gethostname():
                # A stopped process cannot end itself, and its agent would wait for it.
                with contextlib.suppress(ProcessLookupError):
                    os.kill(beat.pid, signal.SIGKILL)
        print(f"error: {sentence}", file=sys.stderr, flush=True)
        self._exit(sentence)

    def _end(self) -> None:
        """End as the judge says."""
        self._leave_stack()
        deadline = time.monotonic() + SENTENCE_S
        while time.monotonic() < deadline and not self._store.check([_SENTENCE]):
            time.sleep(BEAT_S / 10)
        known = self._store.check([_SENTENCE])
        self._exit(self._store.get(_SENTENCE).decode() if known else self._store.get(_VERDICT).decode())

    def _exit(self, why: str) -> None:
        logger.error("%s", why)
        logging.shutdown()
        os._exit(1)

    def _ranks(self) -> range:
        return range(self._mesh.world_size)

    def _leave_stack(self) -> None:
        """All threads' stacks into the log, the main thread's to the judge."""
        frames = sys._current_frames()
        for thread in threading.enumerate():
            if thread.ident in frames:
                logger.error("thread %s:\n%s", thread.name, "".join(traceback.format_stack(frames[thread.ident])))
        assert self._main is not None
        stack = traceback.extract_stack(frames[self._main])
        self._store.set(
            _stack_key(self._mesh.rank), json.dumps([(frame.filename, frame.lineno, frame.name) for frame in stack])
        )

    def _read_stack(self, rank: int) -> list[tuple[str, int, str]] | None:
        key = _stack_key(rank)
        return [tuple(frame) for frame in json.loads(self._store.get(key))] if self._store.check([key]) else None


def describe_culprits(stacks: dict[int, list[tuple[str, int, str]] | None], beats: dict[int, Beat | None]) -> str:
    """Which ranks the others wait for, by the first of these that tells them apart: no answer, fewer steps, another
    phase than step, a main thread outside collectives."""
    silent = [rank for rank, stack in stacks.items() if stack is None]
    if silent:
        return f"{_listed(silent)} not answer, stopped or gone"
    alive = {rank: (stack, beats[rank]) for rank, stack in stacks.items() if stack is not None}
    steps = {rank: 0 if beat is None else beat.step for rank, (_, beat) in alive.items()}
    phases = {rank: "start" if beat is None else beat.phase for rank, (_, beat) in alive.items()}
    behind = [rank for rank in alive if steps[rank] < max(steps.values())]
    elsewhere = [rank for rank in alive if phases[rank] != "step"]
    busy = [rank for rank, (stack, _) in alive.items() if not _in_collective(stack)]
    for suspects in (behind, elsewhere, busy):
        if suspects and len(suspects) < len(alive):
            places = ", ".join(
                f"rank {rank} in phase {phases[rank]} after step {steps[rank]} at {_place(alive[rank][0])}"
                for rank in suspects[:4]
            )
            return f"the others wait for {places}"
    where = _place(next(iter(alive.values()))[0])
    return f"no rank differs from the others, which are at {where}"


def _listed(ranks: list[int]) -> str:
    return f"rank {ranks[0]} does" if len(ranks) == 1 else f"ranks {', '.join(map(str, ranks))} do"


def _in_collective(stack: list[tuple[str, int, str]]) -> bool:
    """Whether the innermost call is one of libraries that wait for other ranks."""
    file = stack[-1][0]
    return any(part in file for part in ("torch/distributed/", "torch/autograd/", "torchrec/distributed/"))


def _place(stack: list[tuple[str, int, str]]) -> str:
    file, line, function = stack[-1]
    return f"{file}:{line} ({function})"


def _beat_key(rank: int) -> str:
    return f"watch/beat/{rank}"


def _stack_key(rank: int) -> str:
    return f"watch/stack/{rank}"
