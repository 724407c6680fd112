"""Files of a checkpoint as chunks, each with a CRC-32: what is read of a file is checked without reading the rest.

CRC-32 (IEEE 802.3, `zlib.crc32`) finds every flipped bit and every burst of up to 32 bits in a chunk.
"""

import zlib
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import BinaryIO

CHUNK_BYTES = 4 * 2**20
"""Bytes of a chunk; the last one of a file may be shorter."""


class ChunkError(ValueError):
    """A file is shorter than it was, or some bytes of it have changed."""


@dataclass(frozen=True, slots=True)
class FileRecord:
    """What must be true of a file."""

    num_bytes: int
    """Its size."""
    crc32: tuple[int, ...]
    """Of each chunk."""

    def __post_init__(self) -> None:
        chunks = -(-self.num_bytes // CHUNK_BYTES)
        if self.num_bytes < 0 or len(self.crc32) != chunks:
            raise ValueError(f"{self.num_bytes} bytes have {chunks} chunks, not {len(self.crc32)} checksums")


def write_chunks(file: BinaryIO, blocks: Iterable[memoryview]) -> FileRecord:
    """Write `blocks` one after another; checksums are computed beside the writing.

    Raises:
        OSError: the file cannot take them.
    """
    crcs: list[int] = []
    crc = filled = num_bytes = 0
    with ThreadPoolExecutor(1) as beside:
        for block in blocks:
            while block.nbytes:
                part, block = block[: CHUNK_BYTES - filled], block[CHUNK_BYTES - filled :]
                sum_of_part = beside.submit(zlib.crc32, part, crc)
                file.write(part)
                crc, filled = sum_of_part.result(), filled + part.nbytes
                num_bytes += part.nbytes
                if filled == CHUNK_BYTES:
                    crcs.append(crc)
                    crc = filled = 0
    if filled:
        crcs.append(crc)
    return FileRecord(num_bytes, tuple(crcs))


class ChunkReader:
    """Reads a file's bytes, checking every chunk that it touches; one thread a reader."""

    def __init__(self, name: str, record: FileRecord, read: Callable[[int, int], bytearray]) -> None:
        """`read(start, end)` returns those bytes of the file, or what there is of them; `name` is for errors."""
        self._name, self._record, self._read = name, record, read
        self._first, self._checked = 0, bytearray()

    def bytes(self, start: int, end: int) -> memoryview:
        """Bytes [start, end); valid until the next call.

        Raises:
            ChunkError: a chunk that holds some of them is not what was written.
            OSError: they cannot be read.
        """
        if not self._first <= start <= end <= self._first + len(self._checked):
            self._fetch(start - start % CHUNK_BYTES, min(-(-end // CHUNK_BYTES) * CHUNK_BYTES, self._record.num_bytes))
        return memoryview(self._checked)[start - self._first : end - self._first]

    def _fetch(self, first: int, last: int) -> None:
        data = self._read(first, last)
        if len(data) != last - first:
            raise ChunkError(f"{self._name} ends at byte {first + len(data)}, not at {self._record.num_bytes}")
        view = memoryview(data)
        for begin in range(first, last, CHUNK_BYTES):
            crc = zlib.crc32(view[begin - first : begin - first + CHUNK_BYTES])
            if crc != self._record.crc32[begin // CHUNK_BYTES]:
                raise ChunkError(
                    f"{self._name} has changed since it was written, between bytes {begin} and "
                    f"{min(begin + CHUNK_BYTES, last)}"
                )
        self._first, self._checked = first, data
