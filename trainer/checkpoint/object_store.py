"""Checkpoints on an object store: s3://, gs:// or hdfs://, through pyarrow, as the data.

An object appears when its stream is closed, whole, and has then been kept; there is nothing else to flush.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import PurePosixPath
from typing import BinaryIO

from pyarrow import fs

from trainer.checkpoint.manifest import COMPLETE


class ObjectStore:
    """Everything under one address."""

    def __init__(self, address: str) -> None:
        """Raises ValueError or OSError if there is no such kind of store, or it cannot be reached."""
        self._address = address
        self._filesystem, root = fs.FileSystem.from_uri(address)
        self._root = PurePosixPath(root)

    @property
    def address(self) -> str:
        """The address as the user gave it."""
        return self._address

    def folders(self) -> list[str]:
        """Names of all folders."""
        found = self._filesystem.get_file_info(fs.FileSelector(str(self._root), allow_not_found=True))
        return sorted(info.base_name for info in found if info.type == fs.FileType.Directory)

    def size(self, path: str) -> int | None:
        """Bytes of a file; None if there is none."""
        info = self._filesystem.get_file_info(self._path(path))
        return int(info.size) if info.type == fs.FileType.File else None

    def read(self, path: str) -> bytes:
        """The content of a small file."""
        with self._filesystem.open_input_file(self._path(path)) as file:
            return bytes(file.read())

    def read_into(self, path: str, start: int, buffer: memoryview) -> int:
        """Fill `buffer` from byte `start` of a file on; returns how many bytes there were."""
        done = 0
        with self._filesystem.open_input_file(self._path(path)) as file:
            file.seek(min(start, file.size()))
            while done < len(buffer) and (count := file.readinto(buffer[done:])):
                done += count
        return done

    @contextmanager
    def writing(self, path: str) -> Iterator[BinaryIO]:
        """A new file in place of any older one."""
        target = self._path(path)
        self._filesystem.create_dir(str(PurePosixPath(target).parent))
        with self._filesystem.open_output_stream(target) as stream:
            yield stream

    def settle(self, folder: str) -> None:
        """Nothing is left to do."""

    def rename(self, folder: str, name: str) -> None:
        """Move what is in a folder; COMPLETE first, so that a half-moved checkpoint is never taken for whole."""
        found = self._filesystem.get_file_info(fs.FileSelector(self._path(folder)))
        self._filesystem.create_dir(self._path(name))
        for info in sorted(found, key=lambda info: info.base_name != COMPLETE):
            self._filesystem.move(info.path, self._path(f"{name}/{info.base_name}"))
        self._filesystem.delete_dir(self._path(folder))

    def remove_file(self, path: str) -> None:
        """Remove a file, if it is there."""
        if self.size(path) is not None:
            self._filesystem.delete_file(self._path(path))

    def remove(self, folder: str) -> None:
        """Remove a folder and what is in it."""
        self._filesystem.delete_dir(self._path(folder))

    def _path(self, path: str) -> str:
        return str(self._root / path)
