"""Where checkpoints lie: folders of files, each file written once, from its beginning to its end.

A store knows nothing of what is in a file.  What `writing` and `settle` have finished survives a power cut.
"""

import os
import shutil
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import BinaryIO, Protocol

from trainer.run_dir import sync

COMPLETE = "COMPLETE"
"""The file that is written last, and without which a folder is no checkpoint."""


class Store(Protocol):
    """Folders of files under one address; paths are `FOLDER/FILE`."""

    @property
    def address(self) -> str:
        """How a person names the place, and how `open_store` opens it."""

    def folders(self) -> list[str]:
        """Names of all folders."""

    def size(self, path: str) -> int | None:
        """Bytes of a file; None if there is none."""

    def read(self, path: str, start: int = 0, end: int | None = None) -> bytearray:
        """Bytes [start, end) of a file, or as many as there are.  Raises OSError if there is no such file."""

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

    def read(self, path: str, start: int = 0, end: int | None = None) -> bytearray:
        """Bytes [start, end) of a file, or as many as there are."""
        with (self._root / path).open("rb", buffering=0) as file:
            size = os.fstat(file.fileno()).st_size
            content = bytearray(max(0, min(size, size if end is None else end) - start))
            file.seek(start)
            view = memoryview(content)
            done = 0
            while done < len(content) and (count := file.readinto(view[done:])):
                done += count
            view.release()
        return content[:done] if done < len(content) else content

    @contextmanager
    def writing(self, path: str) -> Iterator[BinaryIO]:
        """A new file in place of any older one."""
        target = self._root / path
        target.parent.mkdir(parents=True, exist_ok=True)
        with target.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())

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
        shutil.rmtree(self._root / folder)


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
