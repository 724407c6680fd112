"""A process that writes staged state and is killed in the midst of folding or writing, alone or with its rank."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from trainer.checkpoint import writer
from trainer.checkpoint.folding import Move, fold

BLOCK_BYTES = 2048
"""What this one writes at a time."""


def start_dying_writer(staging: Any, acts: int, spared: int, victim: str) -> "subprocess.Popen[bytes]":
    """In place of `Staging._start`; the process is killed before act number `acts` of folding and of what it writes
    then, counted after so many moves, with its rank if `victim` is that."""
    arguments = [str(staging._file), str(staging._num_bytes), str(acts), str(spared), victim]
    return subprocess.Popen(
        [sys.executable, "-m", "tests.trainer.checkpoint.dying_writer", *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        pass_fds=[staging._file],
    )


class Life:
    """So many acts, counted after so many moves."""

    def __init__(self, acts: int, spared: int, victim: str) -> None:
        self._left, self._spared, self._victim = acts, spared, victim
        self._counts = False

    def fold(self, memory: memoryview, move: Move) -> None:
        """In two acts: half of the rows, then all."""
        self._counts, self._spared = self._spared <= 0, self._spared - 1
        for part in (replace(move, count=move.count // 2), move):
            self._act()
            fold(memory, part)

    def blocks(self, memory: memoryview) -> Iterator[memoryview]:
        """An act before each, and one when all are written but have not reached the disk."""
        for start in range(0, len(memory), BLOCK_BYTES):
            self._act()
            yield memory[start : start + BLOCK_BYTES]
        self._act()

    def _act(self) -> None:
        if self._counts and self._left == 0:
            if self._victim == "rank":
                os.kill(os.getppid(), signal.SIGKILL)
            os.kill(os.getpid(), signal.SIGKILL)
        self._left -= self._counts


if __name__ == "__main__":
    life = Life(int(sys.argv[3]), int(sys.argv[4]), sys.argv[5])
    writer.fold, writer._blocks = life.fold, life.blocks
    writer.main(int(sys.argv[1]), int(sys.argv[2]))
