"""Output of a process whose terminal, pipe or file takes no more is lost; the process continues.

Standard library only: this comes before all that might say something.
"""

import io
import os
import sys
from contextlib import suppress
from threading import Thread
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from typing_extensions import Buffer


class _Outlet(io.FileIO):
    """Standard output or error; words that cannot be written are lost, which the log says once."""

    def __init__(self, descriptor: int) -> None:
        super().__init__(descriptor, "wb", closefd=False)
        self._told = False

    def write(self, part: "Buffer") -> int:
        """Write a part, or lose it."""
        size = memoryview(part).nbytes
        try:
            written = super().write(part)
        except OSError as error:
            if not self._told:
                self._told = True
                # Not from within a write: a log speaks to a terminal, too.
                with suppress(RuntimeError):  # Python ends, and starts no threads.
                    Thread(target=_tell, args=(self.fileno(), error), daemon=True).start()
            return size
        # None: somebody has made it one that does not wait, and it is full.
        return size if written is None else written


def _tell(descriptor: int, error: OSError) -> None:
    import logging  # here alone, for it is not needed otherwise

    name = {1: "output", 2: "error"}[descriptor]
    words = "the standard %s of this process takes no more words (%s): they are lost, and the work goes on"
    logging.getLogger(__name__).warning(words, name, error.strerror)


def outlive_output() -> None:
    """From now on this process outlives whoever reads what it says: a closed terminal, `| head`, a full disk."""
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            # Closed by who started this process: the next file that is opened would have its number, and all that
            # libraries say would be written into it.
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
    for descriptor, name in ((1, "stdout"), (2, "stderr")):
        before = getattr(sys, name)
        encoding, errors = ("utf-8", "backslashreplace") if before is None else (before.encoding, before.errors)
        by_line = descriptor == 2 or os.isatty(descriptor) or "PYTHONUNBUFFERED" in os.environ
        text = io.TextIOWrapper(io.BufferedWriter(_Outlet(descriptor)), encoding, errors, line_buffering=by_line)
        setattr(sys, name, text)
