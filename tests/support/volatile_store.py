"""A store whose power can go at any operation; what had not reached the disk by then is lost."""

import io
from collections.abc import Iterator
from contextlib import contextmanager
from typing import BinaryIO


class PowerCut(BaseException):
    """The machine is off."""


class VolatileStore:
    """In memory.  A new file survives once its folder is settled; a removal or a new name at once, the worst case."""

    address = "memory"

    def __init__(self, files: dict[str, bytes] | None = None, lives: int | None = None) -> None:
        """Holds `files`, and is off after `lives` operations that write."""
        self._seen = dict(files or {})
        self.survives = dict(files or {})
        self._lives = lives
        self.operations = 0

    def _live(self) -> None:
        if self.operations == self._lives:
            raise PowerCut
        self.operations += 1

    def folders(self) -> list[str]:
        return sorted({path.split("/")[0] for path in self._seen})

    def size(self, path: str) -> int | None:
        return len(self._seen[path]) if path in self._seen else None

    def read(self, path: str) -> bytes:
        if path not in self._seen:
            raise FileNotFoundError(path)
        return self._seen[path]

    def read_into(self, path: str, start: int, buffer: memoryview) -> int:
        content = self.read(path)[start : start + len(buffer)]
        buffer[: len(content)] = content
        return len(content)

    @contextmanager
    def writing(self, path: str) -> Iterator[BinaryIO]:
        self._live()
        file = io.BytesIO()
        self._seen[path] = b""
        yield file
        self._live()
        self._seen[path] = file.getvalue()
        if path in self.survives:
            self.survives[path] = file.getvalue()

    def settle(self, folder: str) -> None:
        self._live()
        self.survives |= {path: content for path, content in self._seen.items() if path.startswith(folder + "/")}

    def rename(self, folder: str, name: str) -> None:
        self._live()
        for files in (self._seen, self.survives):
            for path in [path for path in files if path.startswith(folder + "/")]:
                files[name + path.removeprefix(folder)] = files.pop(path)

    def remove_file(self, path: str) -> None:
        self._live()
        self._seen.pop(path, None)
        self.survives.pop(path, None)

    def remove(self, folder: str) -> None:
        for path in [path for path in self._seen if path.startswith(folder + "/")]:
            self.remove_file(path)
