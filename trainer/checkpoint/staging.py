"""A copy of a rank's state in memory, which a separate process writes out while the training continues.

    live tensors -> staging memory (anonymous, shared; page-locked beside a GPU) -> writer process -> store

The memory holds the state as the newest full checkpoint has it, and where there are deltas, behind it the rows of the
last one.  These folded into that are the next full checkpoint: the whole state is copied once a run.

Anonymous (memfd_create), because nothing of it must stay behind a SIGKILL, and /dev/shm is small in containers.
"""

import contextlib
import json
import logging
import mmap
import os
import socket
import subprocess
import sys
from dataclasses import asdict
from typing import Any, BinaryIO

import torch
from torch import Tensor

from embeddings.measuring.host import free_memory
from trainer.checkpoint.chunks import FileRecord
from trainer.checkpoint.layout import Layout, moves
from trainer.checkpoint.pieces import aligned
from trainer.checkpoint.store import Store
from trainer.health.stop_signal import kept_from_children

logger = logging.getLogger(__name__)

PART_BYTES = {"cuda": 64 * 2**20, "cpu": 2**20}
"""Bytes of one copy, by the device: rows that are gathered first take this much memory beside the state.  A device has
many copies to overlap; a CPU copies what is still in its cache, and new memory costs it more than the copy."""


class WriterGone(OSError):
    """The writer process has ended by itself."""


class Staging:
    """The memory and the process that writes from it."""

    def __init__(self, state_bytes: int, delta_bytes: int, device: torch.device) -> None:
        """Takes the memory, for the state and for a delta beside it, and starts the process; both are needed until
        `close`.

        Raises:
            ValueError: the memory cannot be had, or not be page-locked.
            OSError: the process cannot be started.
        """
        self._delta_start = aligned(state_bytes)
        self._num_bytes = num_bytes = self._delta_start + delta_bytes
        self._device = device
        try:
            self._file = os.memfd_create("checkpoint")
            # Allocate the memory now, not page by page during the first save.
            os.posix_fallocate(self._file, 0, max(1, num_bytes))
            self._map = mmap.mmap(self._file, max(1, num_bytes), flags=mmap.MAP_SHARED | mmap.MAP_POPULATE)
        except OSError as error:
            raise ValueError(
                f"{num_bytes / 2**30:.1f} GiB for copies of the state cannot be had ({error.strerror}): raise what "
                "limits this process's memory and files, or set checkpoint.asynchronous=false"
            ) from None
        self._memory = torch.frombuffer(self._map, dtype=torch.uint8)
        if device.type == "cuda":
            # Copies from the device run at the link's speed, and beside one another, into page-locked memory only.
            code = int(_cuda_runtime().cudaHostRegister(self._memory.data_ptr(), self._memory.numel(), 0))
            if code:
                raise ValueError(
                    f"{num_bytes / 2**30:.1f} GiB for copies of the state cannot be page-locked (CUDA error {code}): "
                    "raise the limit of locked memory (ulimit -l), or set checkpoint.asynchronous=false"
                )
        self._process = self._start()

    def _start(self) -> "subprocess.Popen[bytes]":
        # Signals that a terminal or a launcher sends to the ranks are not for it: it ends with its rank.
        command = [sys.executable, "-m", "trainer.checkpoint.writer", str(self._file), str(self._num_bytes)]
        try:
            with kept_from_children():
                return subprocess.Popen(
                    command,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    pass_fds=[self._file],
                    start_new_session=True,
                )
        except OSError as error:
            raise OSError(
                f"the process that writes checkpoints cannot be started on {socket.gethostname()} ({error.strerror}): "
                "raise what limits this user's processes and memory, or set checkpoint.asynchronous=false"
            ) from None

    def fill(self, layout: Layout, *, as_delta: bool = False) -> None:
        """Copy the live tensors; when this returns, they may change."""
        first, end = self._delta_start if as_delta else 0, self._num_bytes if as_delta else self._delta_start
        assert layout.num_bytes <= end - first, "the state has grown since the run began"
        for start, content in layout.content(PART_BYTES[self._device.type]):
            self._memory[first + start : first + start + content.numel()].copy_(content, non_blocking=True)
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)

    @property
    def state(self) -> Tensor:
        """[bytes] uint8, the state as the last full checkpoint has it; nothing may be under way."""
        return self._memory[: self._delta_start]

    def fold(self, delta: Layout, whole: Layout) -> None:
        """Let the delta's rows take their places in the state, which is `whole` then.

        Raises:
            WriterGone: as `write`.
        """
        self._served({"moves": [asdict(move) for move in moves(delta, self._delta_start, whole)]})

    def write(self, store: Store, path: str, num_bytes: int, *, as_delta: bool = False) -> FileRecord:
        """Write so many bytes of the state, or of the delta, as a file; waits until they have reached the disk.

        Raises:
            OSError: they cannot be written.
            WriterGone: the process has gone, and the one that took its place too.
        """
        start = self._delta_start if as_delta else 0
        reply = self._served({"store": store.address, "path": path, "start": start, "bytes": num_bytes})
        if "error" in reply:
            raise OSError(reply["error"])
        return FileRecord(reply["bytes"], tuple(reply["crc32"]))

    def _served(self, request: dict[str, Any]) -> dict[str, Any]:
        """The reply; where the process has gone another one takes its place, once: the copy is here."""
        try:
            return self._ask(request)
        except WriterGone as gone:
            logger.warning("%s; another one continues the checkpoint", gone)
            self._close_pipes()
            self._process = self._start()
            return self._ask(request)

    def _ask(self, request: dict[str, Any]) -> dict[str, Any]:
        requests, replies = self._pipes()
        try:
            requests.write(json.dumps(request).encode() + b"\n")
            requests.flush()
            line = replies.readline()
        except BrokenPipeError:
            line = b""
        if not line.endswith(b"\n"):
            raise WriterGone(f"the process that writes checkpoints ended with status {self._process.wait()}")
        reply: dict[str, Any] = json.loads(line)
        return reply

    def _pipes(self) -> tuple[BinaryIO, BinaryIO]:
        assert self._process.stdin is not None and self._process.stdout is not None
        return self._process.stdin, self._process.stdout  # type: ignore[return-value]  # typeshed: IO[bytes]

    def _close_pipes(self) -> None:
        for pipe in self._pipes():
            # A request that nobody has read is lost with the process.
            with contextlib.suppress(BrokenPipeError):
                pipe.close()

    def close(self) -> None:
        """End the process, which has nothing left to write, and give the memory back."""
        self._close_pipes()
        self._process.wait()
        if self._device.type == "cuda":
            _cuda_runtime().cudaHostUnregister(self._memory.data_ptr())
        os.close(self._file)


def _cuda_runtime() -> Any:
    return torch.cuda.cudart()  # type: ignore[no-untyped-call]  # torch leaves it untyped


def check_memory(num_bytes: int, ranks_here: int) -> None:
    """Refuse copies of the state that this machine's free memory does not hold.

    Raises:
        ValueError: with both numbers and what to set.
    """
    free = free_memory()
    if num_bytes * ranks_here > free:
        raise ValueError(
            f"asynchronous checkpoints keep a copy of the state in memory: {ranks_here} x {num_bytes / 2**30:.1f} GiB, "
            f"{free / 2**30:.1f} GiB are free here; set checkpoint.asynchronous=false"
        )
