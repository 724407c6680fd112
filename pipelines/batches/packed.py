"""Batches' arrays in one piece of memory: what a reader process hands over, what is pinned, what a device copies.

Knows torch, not TorchRec, whose import takes seconds that a reader process has no use for.

B samples, H events of all histories, C candidates in all.  Events lie sample by sample, each history oldest first;
candidates likewise; where an array holds both, all events come first, then all candidates.  A feature has N rows: B, H,
C or H + C.  The arrays by name:

    ids                 int64    ids of all features of ids, one feature after another
    bag_lens            int64    [features x bags] ids of each bag, likewise: see `bag_lens`
    lens/NAME           int64    [N] ids of each row of a feature of many ids
    number/NAME         float32  [N] a feature of numbers; NaN where missing
    user_id             int64    [B]
    history_lens        int64    [B]
    num_candidates      int64    [B]
    action              int32    [H] bit i set if action i was taken
    timestamp           int64    [H + C] seconds; -1 where unknown
    candidate_action    int32    [C] bit masks: the labels
    label/NAME          float64 or int64 [C] further labels
    loss_denominator    float32  [1] what sums over candidates are divided by
    next_denominator    float32  [1] what sums over events that another one follows are divided by
    drawn               int64    [drawn] ids drawn for the global batch, where a selection draws some; then, too:
    next_item_id        int64    [H] the item of what follows each event; -1 for nothing
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import DTypeLike
from torch import Tensor

from pipelines.storage.columns import AnyArray, IntArray
from pipelines.stream.position import DataPosition

LENS_PREFIX, NUMBER_PREFIX, LABEL_PREFIX = "lens/", "number/", "label/"
BAG_IDS = 32
"""Ids of a bag: a warp's lanes, which is how many the lookup kernels load at a time."""
ALIGNMENT = 128
"""Arrays start at multiples of this many bytes, as if each had been allocated alone: kernels compile for alignments."""


class Place(NamedTuple):
    """Where an array lies in the memory of its batch."""

    start: int
    """The array's first byte."""
    end: int
    """The byte after its last."""
    dtype: torch.dtype
    """Type of the values."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Contents:
    """What is known of one rank's share of a global batch besides its arrays."""

    size_bytes: int
    """Memory of all arrays together."""
    places: Mapping[str, Place]
    """The place of each array, by its name."""
    lookups: tuple[str, ...]
    """The features of ids, in the order of `ids`."""
    position: DataPosition
    """The training stream's state after this batch."""
    global_samples: int
    """Samples of the global batch."""
    global_tokens: int
    """History events and candidates of the global batch."""
    imbalance: float
    """Largest over mean modelled cost of the ranks' shares of this global batch; the same number on every rank."""
    padded: bool = False
    """The last sample is padding: see `pipelines.batches.padding`."""


@dataclass(frozen=True, slots=True)
class Packed:
    """One batch or several in host memory, one after another."""

    memory: Tensor
    """[bytes] uint8."""
    contents: tuple[Contents, ...]
    """What each batch holds."""

    def split(self) -> Iterator[tuple[Tensor, Contents]]:
        """Each batch's part of the memory, not copied, and what it holds."""
        parts = torch.split(self.memory, [each.size_bytes for each in self.contents])
        return zip(parts, self.contents, strict=True)

    def pin_memory(self) -> "Packed":
        """A copy in page-locked memory, from which a device copies asynchronously."""
        return Packed(self.memory.pin_memory(), self.contents)


def bag_lens(counts: Sequence[int]) -> IntArray:
    """[features x bags] lengths of the bags that the ids of jagged features are looked up in, so many ids of each.

    TorchRec takes a sample's ids for a bag, and FBGEMM's kernels go through a bag id by id, a warp a bag: 16 users with
    16,384 events each would keep 16 warps of a GPU busy.  As every id has its own row in the output, bags need not be
    samples.  Every feature has as many bags, at least one.
    """
    bags = max(1, -(-max(counts, default=0) // BAG_IDS))
    lens: IntArray = np.clip(np.array(counts, dtype=np.int64)[:, None] - BAG_IDS * np.arange(bags), 0, BAG_IDS)
    return lens.ravel()


def pack(arrays: Mapping[str, tuple[DTypeLike, Sequence[AnyArray]]]) -> tuple[Tensor, dict[str, Place]]:
    """Join each array's parts, converted to its type, in a piece of memory."""
    places, end = {}, 0
    kinds = {name: np.dtype(kind) for name, (kind, _) in arrays.items()}
    for name, (_, parts) in arrays.items():
        start = _aligned(end)
        end = start + kinds[name].itemsize * sum(len(part) for part in parts)
        places[name] = Place(start, end, torch.from_numpy(np.empty(0, kinds[name])).dtype)
    memory = np.empty(_aligned(end), dtype=np.uint8)
    for name, (_, parts) in arrays.items():
        if parts:
            place = places[name]
            np.concatenate(parts, out=memory[place.start : place.end].view(kinds[name]))
    return torch.from_numpy(memory), places


def unpack(memory: Tensor, place: Place) -> Tensor:
    """The array at `place` of a batch's memory, not copied."""
    return memory[place.start : place.end].view(place.dtype)


def share(batches: Sequence[Packed]) -> Packed:
    """A copy of all batches in memory that another process can map.

    Raises OSError if there is not enough of it.
    """
    memories = [batch.memory for batch in batches]
    size_bytes = sum(memory.numel() for memory in memories)
    try:
        shared = torch.empty(size_bytes, dtype=torch.uint8)
        shared.share_memory_()  # type: ignore[no-untyped-call]  # torch leaves it untyped
    except RuntimeError as error:
        raise OSError(
            f"{len(batches)} batches of {size_bytes / 2**20:.1f} MiB do not fit into shared memory: enlarge /dev/shm "
            f"(in Docker --shm-size): {error}"
        ) from error
    torch.cat(memories, out=shared)
    return Packed(shared, tuple(each for batch in batches for each in batch.contents))


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT
