"""Writes files that a crash never leaves half written, and reports those that cannot be written."""

import errno
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

MEND = "make room or give access, then start the same command again, which resumes from the newest checkpoint"
"""What is said where something cannot be written."""
PARTIAL = ".partial"
"""Ends the name of a file that is being written, until it takes the place of the one that was there."""


@contextmanager
def written(path: Path) -> Iterator[None]:
    """What happens here is written to `path`.

    Raises:
        OSError: it cannot be; in one line that says what to do.
    """
    try:
        yield
    except OSError as error:
        raise OSError(f"{path} cannot be written: {error.strerror or error}; {MEND}") from error


def write_json(path: Path, values: dict[str, Any]) -> None:
    """Replace the file as a whole: a reader never sees half of it."""
    replace_text(path, json.dumps(values, indent=2) + "\n")


def append_line(path: Path, line: str) -> None:
    """Add a line to a file, its own even where a crash left the one before it torn."""
    with path.open("a+b") as file:
        torn = file.tell() > 0 and path.read_bytes()[-1:] != b"\n"
        file.write(b"\n" * torn + line.encode() + b"\n")


def sync(path: Path) -> None:
    """Let a file, or the names in a folder, reach the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # What some file systems of network shares and virtual machines answer for every folder: they know no such call,
        # and keep names in their own way.
        if error.errno not in (errno.EINVAL, errno.EBADF) or not path.is_dir():
            raise
    finally:
        os.close(descriptor)


def whole_name(name: str) -> str:
    """The name of the file that one of this name becomes, or is: a process that ends while it replaces a file leaves a
    part of the new one behind."""
    return name.removesuffix(PARTIAL)


def replace_text(path: Path, text: str) -> None:
    """Replace the file as a whole, and let it reach the disk."""
    partial = path.with_name(path.name + PARTIAL)
    with written(path):
        try:
            partial.write_text(text, encoding="utf-8")
            # Before the rename: after a power cut there is the old file or the new one, never an empty one.
            sync(partial)
            os.replace(partial, path)
        except OSError:
            partial.unlink(missing_ok=True)
            raise
        sync(path.parent)
