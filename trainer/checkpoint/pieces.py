"""Which parts of which tensors a rank holds: the live state, cut into regions."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed._shard.sharded_tensor.api import ShardedTensor

from trainer.checkpoint.region import Region

Tensors = dict[str, Tensor | ShardedTensor]
"""Flat state: a name independent of the plan -> tensor or ShardedTensor, sharing memory with the live model."""


@dataclass(frozen=True, slots=True)
class LivePiece:
    """A region of a tensor as this rank holds it."""

    name: str
    """Of the tensor."""
    shape: tuple[int, ...]
    """Of the whole tensor."""
    region: Region
    """Which part this is."""
    tensor: Tensor
    """Its live values, [*region.sizes]."""

    @property
    def num_bytes(self) -> int:
        """Size of the values."""
        return self.tensor.numel() * self.tensor.element_size()


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
    """Of the tensor, not of this rank's part."""
    return tuple(value.metadata().size if isinstance(value, ShardedTensor) else value.shape)


def written_pieces(tensors: Tensors, rank: int, world_size: int) -> list[LivePiece]:
    """What this rank writes of its pieces: all its shards, and its share of the tensors that every rank holds."""
    replicated = sorted(name for name, value in tensors.items() if not isinstance(value, ShardedTensor))
    mine = set(replicated[rank::world_size])
    return [
        piece for piece in local_pieces(tensors) if piece.name in mine or isinstance(tensors[piece.name], ShardedTensor)
    ]


def narrowed(tensor: Tensor, held: Region, part: Region) -> Tensor:
    """View of `part` in `tensor`, which holds the region `held`."""
    for dim, (offset, size) in enumerate(zip(part.offsets, part.sizes, strict=True)):
        tensor = tensor.narrow(dim, offset - held.offsets[dim], size)
    return tensor


def not_finite(pieces: list[LivePiece]) -> list[str]:
    """Names of the tensors that hold a NaN or an infinity.  Reads each value once and waits for the device once."""
    checked = [piece for piece in pieces if piece.tensor.is_floating_point()]
    if not checked:
        return []
    # The extremes take no memory beside the tensor, and NaN is both of them.
    extremes = [torch.stack(torch.aminmax(piece.tensor)).isfinite().all() for piece in checked]
    finite = torch.stack(extremes).tolist()
    return sorted({piece.name for piece, fine in zip(checked, finite, strict=True) if not fine})
