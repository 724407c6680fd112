"""Where checkpoints are stored: folders of files, each file written once, from its beginning to its end.

A store knows nothing of what is in a file.  What `writing` and `settle` have finished survives a power cut.
"""

import os
import shutil
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from io import FileIO
from pathlib import Path
from typing import BinaryIO, Protocol, cast

from typing_extensions import Buffer

from trainer.run.writing import sync

DRAIN_BYTES = 32 * 2**20
"""Bytes that are written while as many go to the disk."""


class Store(Protocol):
    """Folders of files under one address; paths are `FOLDER/FILE`."""

    @property
    def address(self) -> str:
        """How a person names the place, and how `open_store` opens it."""

    def folders(self) -> list[str]:
        """Names of all folders."""

    def size(self, path: str) -> int | None:
        """Bytes of a file; None if there is none."""

    def read(self, path: str) -> bytes:
        """A small file.  Raises OSError if there is none."""

    def read_into(self, path: str, start: int, buffer: memoryview) -> int:
        """Fill `buffer` from byte `start` of a file on; returns how many bytes there were.  Raises OSError if there is
        no such file."""

    def writing(self, path: str) -> AbstractContextManager[BinaryIO]:
        """A new file in place of any older one, which has reached the disk when the context ends without an error."""

    def settle(self, folder: str) -> None:
        """Let the folder and the names in it reach the disk."""

    def rename(self, folder: str, name: str) -> None:
        """Give a folder another name, which is free."""

    def remove_file(self, path: str) -> None:
        """Remove a file, if it is there; it stays removed after a power cut."""

    def remove(self, folder: str) -> None:
        """Remove a folder and what is in it."""


class DrainedFile(FileIO):
    """A new file whose bytes go to the disk while further ones are written, and leave the page cache then.

    So the disk works from the beginning, what is cached of the training's data stays, and few pages of memory are used
    again and again: new ones cost several times the copy where a hypervisor has to find them first.
    """

    def __init__(self, path: Path) -> None:
        self._beside = ThreadPoolExecutor(1, thread_name_prefix="drain")
        super().__init__(str(path), "wb")  # as errors show it
        self._under_way: Future[None] | None = None
        self._drained = self._written = 0

    def write(self, part: Buffer) -> int:
        """Write all of `part`.  Raises OSError if it, or what was written before, cannot be kept."""
        view = memoryview(part).cast("B")
        done = 0
        while done < len(view):
            done += super().write(view[done:])
        self._written += done
        if self._written - self._drained >= DRAIN_BYTES:
            self._wait()
            self._under_way = self._beside.submit(self._drain, self._drained, self._written)
            self._drained = self._written
        return done

    def settle(self) -> None:
        """Return when all of it has reached the disk.  Raises OSError if it cannot."""
        self._wait()
        os.fsync(self.fileno())
        os.posix_fadvise(self.fileno(), self._drained, 0, os.POSIX_FADV_DONTNEED)

    def _wait(self) -> None:
        if self._under_way is not None:
            self._under_way.result()

    def _drain(self, start: int, end: int) -> None:
        os.fdatasync(self.fileno())
        os.posix_fadvise(self.fileno(), start, end - start, os.POSIX_FADV_DONTNEED)

    def close(self) -> None:
        """Wait for the disk, then close."""
        self._beside.shutdown()
        super().close()


class LocalStore:
    """A folder of a mounted file system; several machines' ranks need one that they share."""

    def __init__(self, root: Path) -> None:
        self._root = root

    @property
    def address(self) -> str:
        """The folder's path."""
        return str(self._root)

    def folders(self) -> list[str]:
        """Names of all folders."""
        return sorted(entry.name for entry in self._root.iterdir() if entry.is_dir()) if self._root.is_dir() else []

    def size(self, path: str) -> int | None:
        """Bytes of a file; None if there is none."""
        file = self._root / path
        return file.stat().st_size if file.is_file() else None

    def read(self, path: str) -> bytes:
        """The content of a small file."""
        return (self._root / path).read_bytes()

    def read_into(self, path: str, start: int, buffer: memoryview) -> int:
        """Fill `buffer` from byte `start` of a file on; returns how many bytes there were."""
        done = 0
        with (self._root / path).open("rb", buffering=0) as file:
            file.seek(start)
            while done < len(buffer) and (count := file.readinto(buffer[done:])):
                done += count
        return done

    @contextmanager
    def writing(self, path: str) -> Iterator[BinaryIO]:
        """A new file in place of any older one."""
        target = self._root / path
        target.parent.mkdir(parents=True, exist_ok=True)
        with DrainedFile(target) as file:
            yield cast(BinaryIO, file)
            file.settle()

    def settle(self, folder: str) -> None:
        """Let the folder and the names in it reach the disk."""
        for path in (self._root / folder, self._root, self._root.parent):
            sync(path)

    def rename(self, folder: str, name: str) -> None:
        """Give a folder another name, which is free."""
        (self._root / folder).rename(self._root / name)
        sync(self._root)

    def remove_file(self, path: str) -> None:
        """Remove a file, if it is there."""
        (self._root / path).unlink(missing_ok=True)
        if (self._root / path).parent.is_dir():
            sync((self._root / path).parent)

    def remove(self, folder: str) -> None:
        """Remove a folder and what is in it."""
        path = self._root / folder
        if path.is_symlink():
            path.unlink()
        else:
            shutil.rmtree(path)


def open_store(address: str) -> Store:
    """The store at an address: a folder, or what pyarrow knows by its scheme, as s3://bucket/run.

    Raises:
        ValueError, OSError: there is no such kind of store, or it cannot be reached.
    """
    if "://" not in address:
        return LocalStore(Path(address))
    # It takes half a second to import, which the process that writes to a folder need not wait for.
    from trainer.checkpoint.object_store import ObjectStore

    return ObjectStore(address)
