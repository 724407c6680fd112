"""Files of a checkpoint as chunks, each with a CRC-32: what is read of a file is checked without reading the rest.

CRC-32 (IEEE 802.3, that of `zlib.crc32`) finds every flipped bit and every burst of up to 32 bits in a chunk.  ISA-L
computes it with the processor's carry-less products, at 20 GB/s and more.
"""

import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import BinaryIO

from isal.isal_zlib import crc32

CHUNK_BYTES = 4 * 2**20
"""Bytes of a chunk; the last one of a file may be shorter."""


class ChunkError(ValueError):
    """A file is shorter than it was, or some bytes of it have changed."""


@dataclass(frozen=True, slots=True)
class FileRecord:
    """What must be true of a file."""

    num_bytes: int
    """The file's size."""
    crc32: tuple[int, ...]
    """The checksum of each chunk."""

    def __post_init__(self) -> None:
        chunks = -(-self.num_bytes // CHUNK_BYTES)
        if self.num_bytes < 0 or len(self.crc32) != chunks:
            raise ValueError(f"{self.num_bytes} bytes have {chunks} chunks, not {len(self.crc32)} checksums")


def write_chunks(file: BinaryIO, blocks: Iterable[memoryview]) -> FileRecord:
    """Write `blocks` one after another.

    Raises:
        OSError: the file cannot take them.
    """
    crcs: list[int] = []
    crc = filled = num_bytes = 0
    for block in blocks:
        while block.nbytes:
            part, block = block[: CHUNK_BYTES - filled], block[CHUNK_BYTES - filled :]
            # A fraction of what the copy into the page cache takes: no thread beside it is worth its changes.
            crc, filled = crc32(part, crc), filled + part.nbytes
            file.write(part)
            num_bytes += part.nbytes
            if filled == CHUNK_BYTES:
                crcs.append(crc)
                crc = filled = 0
    if filled:
        crcs.append(crc)
    return FileRecord(num_bytes, tuple(crcs))


class ThreadMemory(threading.local):
    """What each thread reads into, again and again: new memory is faulted in page by page every time."""

    def __init__(self) -> None:
        self._content = bytearray()

    def take(self, num_bytes: int) -> memoryview:
        """`num_bytes` of this thread's memory, the same memory at each call."""
        if len(self._content) < num_bytes:
            self._content = bytearray(num_bytes)
        return memoryview(self._content)[:num_bytes]


class ChunkReader:
    """Reads a file's bytes, checking every chunk that it touches; one thread a reader."""

    def __init__(
        self,
        name: str,
        record: FileRecord,
        read_into: Callable[[int, memoryview], int],
        memory: "ThreadMemory | None" = None,
    ) -> None:
        """`read_into(start, buffer)` reads that many bytes of the file, or what there is of them, and returns how many;
        `name` is for errors.  Readers of one thread may share a `memory`, of which the last one to read has the use."""
        self._name, self._record, self._read_into = name, record, read_into
        self._memory = ThreadMemory() if memory is None else memory
        self._first, self._checked = 0, memoryview(b"")

    def bytes(self, start: int, end: int) -> memoryview:
        """Bytes [start, end); valid until the next call.

        Raises:
            ChunkError: a chunk that holds some of them is not what was written.
            OSError: they cannot be read.
        """
        if not self._first <= start <= end <= self._first + len(self._checked):
            self._fetch(start - start % CHUNK_BYTES, min(-(-end // CHUNK_BYTES) * CHUNK_BYTES, self._record.num_bytes))
        return self._checked[start - self._first : end - self._first]

    def _fetch(self, first: int, last: int) -> None:
        self._first, self._checked = first, memoryview(b"")
        view = self._memory.take(last - first)
        count = self._read_into(first, view)
        if count != last - first:
            raise ChunkError(f"{self._name} ends at byte {first + count}, not at {self._record.num_bytes}")
        for begin in range(first, last, CHUNK_BYTES):
            if crc32(view[begin - first : begin - first + CHUNK_BYTES]) != self._record.crc32[begin // CHUNK_BYTES]:
                raise ChunkError(
                    f"{self._name} has changed since it was written, between bytes {begin} and "
                    f"{min(begin + CHUNK_BYTES, last)}"
                )
        self._checked = view
