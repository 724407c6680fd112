"""The rank of each true item among all items, a chunk of them at a time.

Shapes: P predictions of this rank, I items of a chunk.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from trainer.models.heads.similarity import Similarity

PAIRS = 2**28
"""Numbers of a block of scores at most, 1 GiB."""


def join_seen(parts: Sequence[Tensor], sizes: Sequence[int]) -> Tensor:
    """Pairs (prediction, item) of several batches, [2, pairs] each with `sizes` predictions: each once, by item."""
    first = 0
    for part, size in zip(parts, sizes, strict=True):
        part[0] += first
        first += size
    pairs: Tensor = torch.unique(torch.cat(list(parts), dim=1).flip(0), dim=1)
    return pairs.flip(0)


@dataclass(frozen=True, kw_only=True, slots=True)
class Corpus:
    """All items, and how they are scored."""

    similarity: Similarity
    """Scores of queries and items."""
    items: Callable[[int, int], Tensor]
    """The items [first, last) as the similarity sees them; a collective, every rank asks for the same ones."""
    counts: Tensor
    """[items] how often each occurs in the training split."""
    chunk: int
    """Items at a time."""

    def ranks(self, queries: Tensor, targets: Tensor, seen: Tensor) -> tuple[Tensor, Tensor]:
        """Rank of each true item by the similarity and by popularity, [P], 1 for the best; ties count against it.

        Args:
            queries: [P, ...], as the similarity sees predictions.
            targets: [P] the true items.
            seen: [2, pairs] of (prediction, item) to leave out, ordered by item.
        """
        wanted = self._scores_of(queries, targets)
        wanted = wanted - self.similarity.rounding * (1 + wanted.abs())
        better, more_popular = (torch.zeros_like(targets) for _ in range(2))
        popularity = self.counts[targets]
        for first, last in self._chunks():
            start = last - self._width
            items, item_ids = self.items(start, last), torch.arange(start, last, device=targets.device)
            bounds = torch.searchsorted(seen[1].contiguous(), torch.tensor([first, last], device=targets.device))
            prediction, item = seen[:, bounds[0] : bounds[1]]
            for block in self._blocks(targets):
                counted = (item_ids >= first) & (item_ids != targets[block][:, None])
                mine = (prediction >= block.start) & (prediction < block.stop)
                counted[prediction[mine] - block.start, item[mine] - start] = False
                # Not ">=", which a score that is not a number would pass as the best.
                scores = self.similarity(queries[block], items)
                better[block] += (~(scores < wanted[block][:, None]) & counted).sum(1)
                more_popular[block] += ((self.counts[start:last] >= popularity[block][:, None]) & counted).sum(1)
        return better + 1, more_popular + 1

    def _scores_of(self, queries: Tensor, targets: Tensor) -> Tensor:
        """Scores of the true items, [P]: a pass of its own, so that a score is the same number here and where it is
        compared."""
        wanted = torch.full((targets.numel(),), -torch.inf, device=queries.device)
        for first, last in self._chunks():
            start = last - self._width
            items = self.items(start, last)
            for block in self._blocks(targets):
                here = (targets[block] >= first) & (targets[block] < last)
                place = (targets[block] - start).clamp(0, self._width - 1)
                mine = self.similarity(queries[block], items).gather(1, place[:, None])[:, 0]
                wanted[block] = torch.where(here, mine, wanted[block])
        return wanted

    @property
    def _width(self) -> int:
        """Items of every chunk: rounding depends on it, so equal items tie; the last may begin in the one before."""
        return min(self.chunk, self.counts.numel())

    def _chunks(self) -> list[tuple[int, int]]:
        num_items = self.counts.numel()
        return [(first, min(first + self._width, num_items)) for first in range(0, num_items, self._width)]

    def _blocks(self, targets: Tensor) -> list[slice]:
        step = max(1, PAIRS // (self._width * self.similarity.floats_per_pair))
        return [slice(first, first + step) for first in range(0, targets.numel(), step)]
