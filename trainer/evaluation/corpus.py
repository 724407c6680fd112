"""Items scored against predictions, a chunk of all items at a time: ranks of true items, and the best ones.

Shapes: P predictions of this rank, I items of a chunk.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pipelines.features import UNKNOWN_ID
from trainer.models.heads.similarity import Similarity

FIRST = UNKNOWN_ID + 1
"""The first item: the unknown one stands for no item, so it is ranked beside none and recommended to nobody."""
MISSED = 1 << 62
"""The rank of what is no item: of no worth to any metric."""
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
    """All items, from `FIRST` on, and how they are scored."""

    similarity: Similarity
    """Scores of queries and items."""
    items: Callable[[int, int], Tensor]
    """The items [first, last) as the similarity sees them; a collective, every rank asks for the same ones."""
    counts: Tensor
    """[items + FIRST] how often each id occurs in the training split; there are items for so many ids."""
    chunk: int
    """How many items are scored at a time."""

    def ranks(self, queries: Tensor, targets: Tensor, seen: Tensor) -> tuple[Tensor, Tensor]:
        """Rank of each true item by the similarity and by popularity, [P], 1 for the best; ties count against it.

        A true item that is none of these, such as the unknown one, is `MISSED`, however few items there are.

        Args:
            queries: [P, ...], as the similarity sees predictions.
            targets: [P] the true items.
            seen: [2, pairs] of (prediction, item) to leave out, ordered by item.
        """
        wanted = self._scores_of(queries, targets)
        wanted = wanted - self.similarity.rounding * (1 + wanted.abs())
        better, more_popular = (torch.zeros_like(targets) for _ in range(2))
        popularity = self._popularity(targets)
        for block, item_ids, scores, counted in self._scored(queries, seen):
            others = counted & (item_ids != targets[block][:, None])
            # Not ">=", which a score that is not a number would pass as the best.
            better[block] += (~(scores < wanted[block][:, None]) & others).sum(1)
            more_popular[block] += ((self.counts[item_ids] >= popularity[block][:, None]) & others).sum(1)
        is_item = self._are_items(targets)
        return torch.where(is_item, better + 1, MISSED), torch.where(is_item, more_popular + 1, MISSED)

    def best(self, queries: Tensor, seen: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """(scores, items) of the `count` best of each query, [P, count] each, best first.

        Arguments as for `ranks`.  Where fewer are left, the last scores are -inf.
        """
        total = len(queries)
        best = torch.full((total, count), -torch.inf, device=queries.device)
        which = torch.zeros(total, count, dtype=torch.long, device=queries.device)
        for block, item_ids, scores, counted in self._scored(queries, seen):
            joined = torch.cat([best[block], scores.float().masked_fill(~counted, -torch.inf)], dim=1)
            items = torch.cat([which[block], item_ids.expand(len(joined), -1)], dim=1)
            best[block], places = joined.topk(count, dim=1)
            which[block] = items.gather(1, places)
        return best, which

    def _scored(self, queries: Tensor, seen: Tensor) -> Iterator[tuple[slice, Tensor, Tensor, Tensor]]:
        """Block by block, (which queries, [I] which items, [queries, I] scores, [queries, I] whether they count: each
        item once, and not where it was `seen`)."""
        for first, last in self._chunks():
            start = last - self._width
            items, item_ids = self.items(start, last), torch.arange(start, last, device=queries.device)
            bounds = torch.searchsorted(seen[1].contiguous(), torch.tensor([first, last], device=queries.device))
            prediction, item = seen[:, bounds[0] : bounds[1]]
            for block in self._blocks(len(queries)):
                counted = (item_ids >= first).repeat(len(queries[block]), 1)
                mine = (prediction >= block.start) & (prediction < block.stop)
                counted[prediction[mine] - block.start, item[mine] - start] = False
                yield block, item_ids, self.similarity(queries[block], items), counted

    def _scores_of(self, queries: Tensor, targets: Tensor) -> Tensor:
        """Scores of the true items, [P]: a pass of its own, so that a score is the same number here and where it is
        compared."""
        wanted = torch.full((targets.numel(),), -torch.inf, device=queries.device)
        for first, last in self._chunks():
            start = last - self._width
            items = self.items(start, last)
            for block in self._blocks(targets.numel()):
                here = (targets[block] >= first) & (targets[block] < last)
                place = (targets[block] - start).clamp(0, self._width - 1)
                mine = self.similarity(queries[block], items).gather(1, place[:, None])[:, 0]
                wanted[block] = torch.where(here, mine, wanted[block])
        return wanted

    def _popularity(self, targets: Tensor) -> Tensor:
        """How often the true items occur, [P]; of what is none, that of the unknown one."""
        return self.counts[torch.where(self._are_items(targets), targets, UNKNOWN_ID)]

    def _are_items(self, targets: Tensor) -> Tensor:
        return (targets >= FIRST) & (targets < self.counts.numel())

    @property
    def _width(self) -> int:
        """Items of every chunk: rounding depends on it, so equal items tie; the last may begin in the one before."""
        return min(self.chunk, self.counts.numel() - FIRST)

    def _chunks(self) -> list[tuple[int, int]]:
        last = self.counts.numel()
        return [(first, min(first + self._width, last)) for first in range(FIRST, last, max(1, self._width))]

    def _blocks(self, count: int) -> list[slice]:
        step = max(1, PAIRS // (self._width * self.similarity.floats_per_pair))
        return [slice(first, first + step) for first in range(0, count, step)]
