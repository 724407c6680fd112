"""Where the pieces that a rank writes lie in its file."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from trainer.checkpoint.chunks import CHUNK_BYTES
from trainer.checkpoint.folding import Move
from trainer.checkpoint.manifest import DTYPE_BYTES
from trainer.checkpoint.pieces import LivePiece, aligned


@dataclass(frozen=True, slots=True)
class Place:
    """Where a piece lies."""

    piece: LivePiece
    rows_start: int
    """Byte at which the numbers of its rows begin, int64, if not all are stored."""
    start: int
    """Byte at which its values begin."""


@dataclass(frozen=True, slots=True)
class Layout:
    """How a rank's file is laid out."""

    places: tuple[Place, ...]
    """The place of each piece, one after another."""
    num_bytes: int
    """Size of the file."""

    def blocks(self) -> Iterator[memoryview]:
        """The file's content, from the live tensors, a few MiB at a time."""
        written = 0
        for start, content in self.content(CHUNK_BYTES):
            block = content.cpu().numpy().data
            yield memoryview(bytes(start - written))
            yield block
            written = start + block.nbytes

    def content(self, max_bytes: int) -> Iterator[tuple[int, Tensor]]:
        """(first byte in the file, [at most about `max_bytes`] uint8 on the device) of all that is in it."""
        for place in self.places:
            piece, start = place.piece, place.start
            if piece.rows is not None:
                rows = piece.rows + piece.region.offsets[0]
                yield place.rows_start, rows.view(torch.uint8)
            for part in piece.parts(max_bytes):
                yield start, part
                start += part.numel()


def lay_out(pieces: list[LivePiece]) -> Layout:
    """One after another, aligned.

    Raises:
        ValueError: a tensor is of a type that the format does not know.
    """
    places, end = [], 0
    for piece in pieces:
        dtype = dtype_name(piece.tensor.dtype)
        if dtype not in DTYPE_BYTES:
            raise ValueError(f"{piece.name!r} is of type {dtype}, which checkpoints do not know")
        rows_start = aligned(end)
        start = rows_start if piece.rows is None else rows_start + aligned(piece.rows.nbytes)
        places.append(Place(piece, rows_start, start))
        end = start + piece.num_bytes
    return Layout(tuple(places), end)


def moves(delta: Layout, start: int, whole: Layout) -> list[Move]:
    """What makes the state that `whole` lays out, from byte 0 on, of an older one and of `delta`, which begins at byte
    `start`; both have the same pieces in the same order."""
    found = []
    for new, old in zip(delta.places, whole.places, strict=True):
        piece = new.piece
        if piece.rows is None:
            found.append(Move(start + new.start, old.start, row_bytes=1, count=piece.num_bytes))
        else:
            first = piece.region.offsets[0]
            numbers = start + new.rows_start
            found.append(Move(start + new.start, old.start, piece.row_bytes, len(piece.rows), numbers, first))
    return found


def dtype_name(dtype: torch.dtype) -> str:
    """torch.float32 -> float32."""
    return str(dtype).removeprefix("torch.")
