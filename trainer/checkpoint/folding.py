"""Fold the rows that were touched since a full checkpoint into its copy in memory: it is the next full one then.

NumPy alone, for the process that writes.  To fold once more changes nothing, so a process that dies on the way is
replaced by one that begins again.
"""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, slots=True)
class Move:
    """Rows of a delta that take the place of older ones; all places are bytes of one memory."""

    source: int
    """Byte at which the new rows begin; they lie one after another."""
    target: int
    """Byte at which row 0 of their piece begins."""
    row_bytes: int
    """Size of a row."""
    count: int
    """Rows."""
    numbers: int | None = None
    """Byte at which their row numbers in the whole tensor begin, int64; None: they are all rows of the piece."""
    first_row: int = 0
    """Number of the piece's row 0."""


def fold(memory: memoryview, move: Move) -> None:
    """Let the rows stand in their places."""
    if move.numbers is None:
        num_bytes = move.count * move.row_bytes
        memory[move.target : move.target + num_bytes] = memory[move.source : move.source + num_bytes]
        return
    row = np.dtype((np.void, move.row_bytes))
    values = np.frombuffer(memory, row, move.count, move.source)
    places = np.frombuffer(memory, np.int64, move.count, move.numbers) - move.first_row
    num_rows = int(places[-1]) + 1 if move.count else 0  # they ascend
    np.frombuffer(memory, row, num_rows, move.target)[places] = values
