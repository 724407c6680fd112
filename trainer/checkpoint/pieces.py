"""Which parts of which tensors a rank holds: the live state, cut into regions."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor
from torch.distributed._shard.sharded_tensor.api import ShardedTensor

from trainer.checkpoint.region import Region

Tensors = dict[str, Tensor | ShardedTensor]
"""Flat state: a name independent of the plan -> tensor or ShardedTensor, sharing memory with the live model."""


ALIGNMENT = 64
"""Everything in a file starts at a multiple, so that its bytes can be read as numbers where they lie."""


@dataclass(frozen=True, slots=True)
class LivePiece:
    """A region of a tensor as this rank holds it."""

    name: str
    """Name of the tensor."""
    shape: tuple[int, ...]
    """Shape of the whole tensor."""
    region: Region
    """The part of the tensor that this is."""
    tensor: Tensor
    """Its live values, [*region.sizes]."""
    rows: Tensor | None = None
    """[touched] int64 the rows, counted from the region's first, that are stored; None for all of the region."""

    @property
    def row_bytes(self) -> int:
        """Size of a row; a scalar has none."""
        return self.tensor.nbytes // len(self.tensor)

    @property
    def num_bytes(self) -> int:
        """Size of the values that are stored."""
        return self.tensor.nbytes if self.rows is None else len(self.rows) * self.row_bytes

    @property
    def room(self) -> int:
        """Size of what is stored, with the numbers of the rows where they stand before the values."""
        return self.num_bytes if self.rows is None else aligned(self.rows.nbytes) + self.num_bytes

    def parts(self, max_bytes: int) -> Iterator[Tensor]:
        """The stored values as bytes, [at most about `max_bytes`] uint8 each, on the tensor's device."""
        if self.rows is None:
            yield from torch.split(self.tensor.contiguous().reshape(-1).view(torch.uint8), max_bytes)
            return
        for rows in torch.split(self.rows.to(self.tensor.device), max(1, max_bytes // self.row_bytes)):
            yield self.tensor.index_select(0, rows).reshape(-1).view(torch.uint8)


def aligned(num_bytes: int) -> int:
    """The next multiple of `ALIGNMENT`."""
    return -(-num_bytes // ALIGNMENT) * ALIGNMENT


class Touched(Protocol):
    """Which rows may differ from what they were when `clear` was called."""

    def rows(self, table: str, first_row: int) -> Tensor | None:
        """[touched] int64, ascending, of the shard that begins with `first_row`, counted from there; None if nobody
        knows."""

    def clear(self) -> None:
        """Forget what was touched: `rows` tells of what comes from now on."""


def local_pieces(tensors: Tensors) -> list[LivePiece]:
    """All that this rank holds, by name; empty shards left out."""
    pieces = []
    for name, value in sorted(tensors.items()):
        shape = whole_shape(value)
        if isinstance(value, ShardedTensor):
            parts = [
                (Region(tuple(shard.metadata.shard_offsets), tuple(shard.metadata.shard_sizes)), shard.tensor)
                for shard in value.local_shards()
            ]
        else:
            parts = [(Region((0,) * len(shape), shape), value)]
        # Shards of optimizer state come without their last dimension or with it, as FBGEMM shapes them.
        pieces += [
            LivePiece(name, shape, region, part.detach().view(region.sizes)) for region, part in parts if region.numel
        ]
    return pieces


def whole_shape(value: Tensor | ShardedTensor) -> tuple[int, ...]:
    """Shape of the tensor, not of this rank's part."""
    return tuple(value.metadata().size if isinstance(value, ShardedTensor) else value.shape)


def written_pieces(tensors: Tensors, rank: int, world_size: int) -> list[LivePiece]:
    """What this rank writes of its pieces: all its shards, and its share of the tensors that every rank holds."""
    replicated = sorted(name for name, value in tensors.items() if not isinstance(value, ShardedTensor))
    mine = set(replicated[rank::world_size])
    return [
        piece for piece in local_pieces(tensors) if piece.name in mine or isinstance(tensors[piece.name], ShardedTensor)
    ]


def touched_pieces(pieces: list[LivePiece], tensors: Tensors, touched: Touched) -> list[LivePiece]:
    """The same pieces, those of sharded tables and their optimizers' state with the rows that were touched alone, where
    that takes less space."""
    found: dict[tuple[str, int], Tensor | None] = {}

    def of(piece: LivePiece) -> Tensor | None:
        if not _has_rows(piece, tensors):
            return None
        key = piece.name.split("/")[1], piece.region.offsets[0]
        if key not in found:
            found[key] = touched.rows(*key)
        return found[key]

    shorter = [replace(piece, rows=of(piece)) for piece in pieces]
    return [min(pair, key=lambda piece: piece.room) for pair in zip(pieces, shorter, strict=True)]


def delta_room(pieces: list[LivePiece], tensors: Tensors) -> int:
    """Bytes of memory for what changes between full checkpoints: half of the sharded tables, and all else."""
    return sum(aligned(piece.num_bytes) // (2 if _has_rows(piece, tensors) else 1) for piece in pieces)


def _has_rows(piece: LivePiece, tensors: Tensors) -> bool:
    """Whether a delta may leave rows of it out."""
    sharded = isinstance(tensors[piece.name], ShardedTensor)
    return sharded and piece.name.split("/")[0] in ("tables", "tables_optimizer")


def narrowed(tensor: Tensor, held: Region, part: Region) -> Tensor:
    """View of `part` in `tensor`, which holds the region `held`."""
    for dim, (offset, size) in enumerate(zip(part.offsets, part.sizes, strict=True)):
        tensor = tensor.narrow(dim, offset - held.offsets[dim], size)
    return tensor


def not_finite(pieces: list[LivePiece]) -> list[str]:
    """Names of the tensors that hold a NaN or an infinity.  Where there is none, reads each value once and waits for
    the device once."""
    checked = [piece for piece in pieces if piece.tensor.is_floating_point()]
    # A sum of finite numbers may be too large, so it acquits alone; it goes at the memory's speed.
    suspects = _broken(checked, torch.sum)
    return sorted({piece.name for piece in _broken(suspects, _extremes)})


def _extremes(values: Tensor) -> Tensor:
    """They take no memory beside the tensor, and NaN is both of them."""
    return torch.stack(torch.aminmax(values))


def _broken(pieces: list[LivePiece], reduce: Callable[[Tensor], Tensor]) -> list[LivePiece]:
    """The pieces of which `reduce` makes something that is not finite; waits for the device once."""
    if not pieces:
        return []
    finite = torch.stack([reduce(piece.tensor).isfinite().all() for piece in pieces]).tolist()
    return [piece for piece, fine in zip(pieces, finite, strict=True) if not fine]
