"""What is read of a chunked file is what was written, or the reading fails."""

import io
import zlib
from functools import partial

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.checkpoint import chunks
from trainer.checkpoint.chunks import ChunkError, ChunkReader, FileRecord, ThreadMemory, write_chunks

SMALL = 16
"""Bytes of a chunk here, so that small files have many."""


@pytest.fixture(autouse=True, scope="module")
def small_chunks() -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chunks, "CHUNK_BYTES", SMALL)
        yield


def read(content: bytes, start: int, buffer: memoryview) -> int:
    part = content[start : start + len(buffer)]
    buffer[: len(part)] = part
    return len(part)


@given(blocks=st.lists(st.binary(max_size=40), max_size=6))
def test_a_file_is_its_blocks_and_each_chunk_has_its_checksum(blocks: list[bytes]) -> None:
    file, whole = io.BytesIO(), b"".join(blocks)
    record = write_chunks(file, map(memoryview, blocks))
    assert file.getvalue() == whole and record.num_bytes == len(whole)
    assert list(record.crc32) == [zlib.crc32(whole[i : i + SMALL]) for i in range(0, len(whole), SMALL)]


@given(content=st.binary(min_size=1, max_size=90), reads=st.lists(st.tuples(st.integers(0, 90), st.integers(0, 90))))
def test_any_range_reads_as_written(content: bytes, reads: list[tuple[int, int]]) -> None:
    record = write_chunks(io.BytesIO(), [memoryview(content)])
    reader = ChunkReader("file", record, partial(read, content), ThreadMemory())
    for a, b in reads:
        start, end = sorted((min(a, len(content)), min(b, len(content))))
        assert bytes(reader.bytes(start, end)) == content[start:end]


@settings(max_examples=200)
@given(content=st.binary(min_size=1, max_size=90), data=st.data())
def test_a_changed_bit_or_a_missing_end_is_noticed_where_its_chunk_is_read(content: bytes, data: st.DataObject) -> None:
    record = write_chunks(io.BytesIO(), [memoryview(content)])
    bit = data.draw(st.integers(0, 8 * len(content) - 1))
    flipped = bytearray(content)
    flipped[bit // 8] ^= 1 << bit % 8
    with pytest.raises(ChunkError, match="has changed since it was written"):
        ChunkReader("file", record, partial(read, bytes(flipped))).bytes(bit // 8, bit // 8 + 1)
    with pytest.raises(ChunkError, match=f"ends at byte {len(content) - 1}, not at {len(content)}"):
        ChunkReader("file", record, partial(read, content[:-1])).bytes(len(content) - 1, len(content))


def test_a_record_needs_a_checksum_a_chunk() -> None:
    with pytest.raises(ValueError, match="17 bytes have 2 chunks, not 1"):
        FileRecord(17, (1,))
