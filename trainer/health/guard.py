"""A small process beside each rank that ends the rank when it hangs, which the rank itself could not notice.

    rank --- "hear from me within 45 s" ---> guard: every second, did it keep its word?  is it, or a helper, stopped?

From a process's first moments to its last: in its imports, before ranks have met, alone, after its siblings have ended.
The watchdog, which knows steps and other ranks, keeps this word while it watches.  A rank that is suspended together
with its guard (Ctrl-Z, a suspended job) goes on where it was.  Standard library only: this begins before torch is
imported.
"""

import contextlib
import ctypes
import faulthandler
import fcntl
import os
import select
import signal
import subprocess
import sys
import time
from dataclasses import dataclass

from trainer.health import stopped
from trainer.health.process_table import (
    ENDED,
    READING,
    RUNNABLE,
    TRACED,
    Status,
    children,
    command_of,
    descendants,
    rank_of,
    status_of,
)
from trainer.health.stop_signal import AGENT, OWN_AGENT, kept_from_children
from trainer.health.stopped import LOST, StoppedProcesses, is_stopped

IMPORTS_S = 600.0
"""Imports take 5 to 20 s from a local disk, minutes where a thousand ranks read one file server."""
IDLE_S = 30.0
"""Seconds without computing or reading after which a process that does not wait for others counts as hung."""
SHOW_STACKS = signal.SIGUSR2
"""Lets a rank write the stacks of its threads to its standard error, whatever holds its interpreter."""
STACKS_S = 1.0
"""Seconds that writing the stacks may take."""
IDLE_TICKS = 1
"""Hundredths of a second that the threads of an idle process compute in a second at most: they look around."""
PR_SET_PDEATHSIG = 1
"""Asks the system for a signal when the process that started this one ends (prctl(2))."""
LEFT_S = 5.0
"""How long what a rank has started may outlive it."""
SIBLINGS_LOOKS = 5
"""Looks by which a stopped rank's own guard comes first.  It has none before it starts it, its first act."""


class Guard:
    """What a rank holds of its guard: starts it, and tells it what to expect."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """From now on, in the main thread."""
        faulthandler.register(SHOW_STACKS)
        self._begin()

    def expect(self, what: str, seconds: float, idle_s: float | None = None) -> None:
        """Let this process be ended if it is not heard of again for so long, or does nothing at all for `idle_s`;
        `what` takes place until then.  By one thread at a time; without effect before `start`."""
        if self._process is None:
            return
        words = f"{seconds} {idle_s or seconds} {what}\n".encode()
        try:
            self._tell(words)
        except (BrokenPipeError, BlockingIOError):
            # It is gone, or has been stopped for so long that the pipe is full.
            self._process.kill()
            self._process.wait()
            self._begin()
            self._tell(words)

    def _begin(self) -> None:
        # In the group of this process, whose terminal suspends both; what asks to stop is not for it.
        with kept_from_children():
            self._process = subprocess.Popen(
                [sys.executable, "-m", "trainer.health.guard", *map(str, (os.getpid(), stopped.LOOK_S, stopped.LOOKS))],
                stdin=subprocess.PIPE,
            )
        assert self._process.stdin is not None
        pipe = self._process.stdin.fileno()
        os.set_blocking(pipe, False)
        # The smallest pipe: if the guard stops reading, it is full after minutes, not after an hour.
        fcntl.fcntl(pipe, fcntl.F_SETPIPE_SZ, 4096)

    def _tell(self, words: bytes) -> None:
        assert self._process is not None and self._process.stdin is not None
        os.write(self._process.stdin.fileno(), words)


GUARD = Guard()
"""The guard of this process."""


@dataclass(slots=True)
class Word:
    """What a rank has said last, and what was seen of it since."""

    seconds: float
    idle_s: float
    what: str
    looks: int = 0
    """Looks at the rank since it gave its word."""
    idle_looks: int = 0
    """In a row, to the last one, that found nothing done since the one before."""

    def broken(self, before: Status, now: Status) -> str | None:
        """Another look at the rank; how it has broken its word, if it has."""
        if now.state == TRACED:
            return None
        busy = now.ticks - before.ticks > IDLE_TICKS or now.page_reads > before.page_reads
        busy = busy or now.state in (RUNNABLE, READING)
        self.idle_looks = 0 if busy else self.idle_looks + 1
        self.looks += 1
        if self.looks >= self.seconds:
            return f"has taken {self.looks} s for {self.what} (limit {self.seconds:.0f} s)"
        if self.idle_looks >= self.idle_s:
            return f"has done nothing for {self.idle_looks} s in {self.what} (limit {self.idle_s:.0f} s)"
        return None


class _Watch:
    """The guard's side: over the process that started this one, over its helpers, and over siblings without a guard."""

    def __init__(self, rank: int) -> None:
        self._rank = rank
        self._seen = status_of(rank)
        # Our own agent looks for stopped ranks itself, torchrun does not.
        self._own_agent = os.environ.get(AGENT) == OWN_AGENT
        self._agent = None if self._own_agent or AGENT not in os.environ or self._seen is None else self._seen.parent
        self._stopped, self._stopped_siblings = StoppedProcesses(), StoppedProcesses(more_looks=SIBLINGS_LOOKS)
        self._word: Word | None = None
        self._helpers: dict[int, Status] = {}

    def hear(self, words: str) -> None:
        """Take note of what the rank says it does next."""
        seconds, idle_s, what = words.split(" ", 2)
        self._word = Word(float(seconds), float(idle_s), what)

    def look(self) -> bool:
        """Once a second; false if the rank has ended."""
        now = status_of(self._rank)
        if os.getppid() != self._rank or now is None or now.state == ENDED:
            return False
        self._end_stopped()
        if self._word is not None and self._seen is not None:
            broken = self._word.broken(self._seen, now)
            if broken is not None:
                _say(f"rank {_own_rank()} {broken}; ending it; where it stands:")
                os.kill(self._rank, SHOW_STACKS)
                time.sleep(STACKS_S)
                _kill(self._rank)
        self._seen = now
        return True

    def _end_stopped(self) -> None:
        helpers = [pid for pid in descendants(self._rank) if pid != os.getpid()]
        self._helpers = {pid: status for pid in helpers if (status := status_of(pid)) is not None}
        for pid in self._stopped.look(helpers if self._own_agent else [self._rank, *helpers]):
            whose = f"rank {_own_rank()}"
            _say(f"{whose if pid == self._rank else f'a helper of {whose} ({command_of(pid)})'} {LOST}; ending it")
            _kill(pid)
        ranks = [] if self._agent is None else [pid for pid in children(self._agent) if rank_of(pid) is not None]
        for pid in self._stopped_siblings.look(ranks):
            _say(f"rank {rank_of(pid)} {LOST}; ending it")
            _kill(pid)

    def clear(self) -> None:
        """The rank has ended: so must its helpers, which may be stopped as well."""
        deadline = time.monotonic() + LEFT_S
        while left := [pid for pid, status in self._helpers.items() if _runs(pid, status)]:
            for pid in left:
                if is_stopped(pid) or time.monotonic() > deadline:
                    _kill(pid)
            time.sleep(0.05)


def _runs(pid: int, seen: Status) -> bool:
    now = status_of(pid)
    return now is not None and now.began == seen.began and now.state != ENDED


def _kill(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def _own_rank() -> str:
    return os.environ.get("RANK", "0")


def _say(what: str) -> None:
    # The terminal or pipe may have gone before the rank does.
    with contextlib.suppress(OSError):
        print(f"error: {what}", file=sys.stderr, flush=True)


def main(rank: int, look_s: float, looks: int) -> None:
    """Watch over a process until it has ended."""
    # A guard that is stopped when its rank ends must go on to see it.
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGCONT)
    stopped.LOOKS = looks
    watch, told, text = _Watch(rank), True, ""
    next_look = time.monotonic() + look_s
    while True:
        heard, _, _ = select.select([0] if told else [], [], [], max(0.0, next_look - time.monotonic()))
        if heard:
            # Nothing is read at the rank's end, or at that of its pipe alone.
            told = bool(content := os.read(0, 4096))
            *lines, text = (text + content.decode()).split("\n")
            if lines:
                watch.hear(lines[-1])
            next_look = next_look if told else time.monotonic()
        if time.monotonic() >= next_look:
            if not watch.look():
                break
            # From now, not from when it was due: time in which this process stood still is none.
            next_look = time.monotonic() + (look_s if told else 0.05)
    watch.clear()


if __name__ == "__main__":
    main(int(sys.argv[1]), float(sys.argv[2]), int(sys.argv[3]))
