"""What a folder's files are read as, past the page cache or not."""

import errno
import mmap
import os
import random
from pathlib import Path

import pytest

from trainer.checkpoint.chunks import BLOCK
from trainer.checkpoint.store import LocalStore


@pytest.mark.parametrize("refused", [False, True])
@pytest.mark.parametrize("size", [0, 1, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK + 5])
def test_any_part_reads_as_it_is(refused: bool, size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = random.Random(size).randbytes(size)
    (tmp_path / "file").write_bytes(content)
    original = os.open

    def cannot(path: Path, flags: int) -> int:
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, "as of a file system that cannot")
        return original(path, flags)

    if refused:
        monkeypatch.setattr(os, "open", cannot)
    for start in (0, 1, BLOCK, 2 * BLOCK, 9 * BLOCK):
        for room in (0, 1, BLOCK, 2 * BLOCK, 5 * BLOCK):
            # The second is not aligned.
            for buffer in (memoryview(mmap.mmap(-1, 6 * BLOCK)), memoryview(mmap.mmap(-1, 6 * BLOCK))[1:]):
                count = LocalStore(tmp_path).read_into("file", start, buffer[:room])
                assert bytes(buffer[:count]) == content[start : start + room]
                assert not any(buffer[max(count, room) :])


def test_a_file_that_is_not_there_is_said(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="missing"):
        LocalStore(tmp_path).read_into("missing", 0, memoryview(mmap.mmap(-1, BLOCK)))
