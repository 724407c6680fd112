"""Divides the samples of a global batch over ranks so that the modelled cost is even.

Every rank computes the same division from the lengths alone; nothing is communicated.
"""

from collections.abc import Callable
from heapq import heapify, heapreplace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from pipelines.storage.columns import IntArray

Cost = Callable[[IntArray, IntArray], NDArray[np.float64]]
"""From history lengths and candidate counts to a cost a sample, in any unit."""

GOOD_ENOUGH = 1.01
ATTENTION_TOKENS = 4096.0
"""Length at which the default cost counts attention like everything else of a token."""


def default_cost(history_lens: IntArray, num_candidates: IntArray) -> NDArray[np.float64]:
    """A cost for models of unknown size: linear in the tokens plus a quadratic share for attention."""
    tokens = (history_lens + num_candidates).astype(np.float64)
    return tokens + tokens * tokens / ATTENTION_TOKENS


def assign(
    cost: NDArray[np.float64],
    world_size: int,
    *,
    mode: Literal["none", "equal", "bounded"],
    slack: float = 0.0,
    keep_neighbours: bool = False,
) -> IntArray:
    """The rank of each sample.

    none: equal slices.  equal: counts differ by at most one.  bounded: no rank has more than (1 + slack) times the
    mean count.  keep_neighbours starts from the slices and moves few samples, so that neighbours stay together.
    """
    count = len(cost)
    slices = np.arange(count) * world_size // max(count, 1)
    if mode == "none" or world_size == 1 or count == 0:
        return slices
    if mode == "bounded":
        return _least_loaded_first(cost, world_size, int(np.ceil(count / world_size * (1 + slack))))
    return _swap(slices if keep_neighbours else _in_rounds(cost, world_size), cost, world_size)


def imbalance(cost: NDArray[np.float64], rank: IntArray, world_size: int) -> float:
    """Largest over mean cost of the ranks; 1 is perfect."""
    loads = np.bincount(rank, weights=cost, minlength=world_size)
    return float(loads.max() / loads.mean()) if loads.any() else 1.0


def _in_rounds(cost: NDArray[np.float64], world_size: int) -> IntArray:
    """Deal the samples out from the dearest down, a round at a time, each round's dearest to the lightest rank."""
    order = np.argsort(-cost, kind="stable")
    rank = np.empty(len(cost), dtype=np.int64)
    loads = np.zeros(world_size)
    for start in range(0, len(order), world_size):
        dealt = order[start : start + world_size]
        lightest = np.argsort(loads, kind="stable")[: len(dealt)]
        rank[dealt] = lightest
        loads[lightest] += cost[dealt]
    return rank


def _least_loaded_first(cost: NDArray[np.float64], world_size: int, most: int) -> IntArray:
    """Give each sample, from the dearest down, to the lightest rank that has room."""
    rank = np.empty(len(cost), dtype=np.int64)
    counts = [0] * world_size
    heap = [(0.0, each) for each in range(world_size)]
    heapify(heap)
    for sample in np.argsort(-cost, kind="stable").tolist():
        load, lightest = heap[0]
        rank[sample] = lightest
        counts[lightest] += 1
        full = counts[lightest] == most
        heapreplace(heap, (np.inf if full else load + float(cost[sample]), lightest))
    return rank


def _swap(rank: IntArray, cost: NDArray[np.float64], world_size: int) -> IntArray:
    """Swap samples between the dearest and the cheapest rank while that makes the dearest cheaper."""
    loads = np.bincount(rank, weights=cost, minlength=world_size)
    for _ in range(4 * world_size):
        high, low = int(np.argmax(loads)), int(np.argmin(loads))
        if loads[high] <= GOOD_ENOUGH * loads.mean():
            break
        ours, theirs = np.flatnonzero(rank == high), np.flatnonzero(rank == low)
        if not len(theirs):
            break
        theirs = theirs[np.argsort(cost[theirs], kind="stable")]
        wanted = cost[ours] - (loads[high] - loads[low]) / 2
        near = np.clip(np.searchsorted(cost[theirs], wanted), 0, len(theirs) - 1)
        gain = cost[ours] - cost[theirs[near]]
        best = int(np.argmin(np.abs(cost[ours] - gain - wanted)))
        if not 0 < gain[best] < loads[high] - loads[low]:
            break
        rank[ours[best]], rank[theirs[near[best]]] = low, high
        loads[high] -= gain[best]
        loads[low] += gain[best]
    return rank
