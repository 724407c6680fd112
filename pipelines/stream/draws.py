"""Ids drawn uniformly: what a sampled softmax compares the true id with.

A draw is a function of its key and an index, so it depends neither on the number of ranks nor on where a run was
resumed.
"""

import numpy as np

from pipelines.selection import Draw
from pipelines.storage.columns import IntArray
from pipelines.stream.randomness import random_bits

DRAWN = 41
"""Keeps these random numbers apart from others under the same seed."""


def draw_ids(key: tuple[int, ...], index: IntArray, num_ids: int) -> IntArray:
    """Ids below `num_ids`, of the shape of `index`, each a function of (key, its index)."""
    drawn: IntArray = (random_bits((key[0], DRAWN, *key[1:]), index) % np.uint64(num_ids)).astype(np.int64)
    return drawn


def draw_for_batch(draw: Draw, seed: int, batch: int) -> IntArray:
    """[`draw.count`] ids for a global batch of this number, the same on every rank; all ids for a count of None."""
    if draw.count is None:
        return np.arange(draw.num_ids)
    return draw_ids((seed, batch), np.arange(draw.count), draw.num_ids)
