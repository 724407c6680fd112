"""Where the pieces that a rank writes lie in its file."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from trainer.checkpoint.chunks import CHUNK_BYTES
from trainer.checkpoint.manifest import DTYPE_BYTES
from trainer.checkpoint.pieces import LivePiece

ALIGNMENT = 64
"""Every piece starts at a multiple, so that its bytes can be read as numbers where they lie."""


@dataclass(frozen=True, slots=True)
class Layout:
    """A rank's file."""

    places: tuple[tuple[LivePiece, int], ...]
    """(piece, its first byte), one after another."""
    num_bytes: int
    """Size of the file."""

    def blocks(self) -> Iterator[memoryview]:
        """The file's content, from the live tensors, a few MiB at a time."""
        written = 0
        for piece, start in self.places:
            yield memoryview(bytes(start - written))
            flat = piece.tensor.contiguous().reshape(-1).view(torch.uint8)
            for first in range(0, piece.num_bytes, CHUNK_BYTES):
                yield flat[first : first + CHUNK_BYTES].cpu().numpy().data
            written = start + piece.num_bytes


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
        start = -(-end // ALIGNMENT) * ALIGNMENT
        places.append((piece, start))
        end = start + piece.num_bytes
    return Layout(tuple(places), end)


def dtype_name(dtype: torch.dtype) -> str:
    """torch.float32 -> float32."""
    return str(dtype).removeprefix("torch.")
