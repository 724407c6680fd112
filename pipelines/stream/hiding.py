"""Some ids of training samples stand for the unknown one, so that the row of the unknown id is learnt.

Which ones is a function of seed, pass and sample: the same on any number of ranks and after a resume.
"""

import numpy as np
from numpy.typing import NDArray

from pipelines.features import UNKNOWN_ID
from pipelines.storage.columns import AnyArray, IntArray
from pipelines.stream.order import References
from pipelines.stream.randomness import random_bits

HIDE = 31


def sample_keys(samples: References, seed: int) -> IntArray:
    """[B] a number a sample and pass, from which its draws are made."""
    keys = np.zeros(len(samples), dtype=np.int64)
    for words in (samples.source, samples.epoch, samples.sample):
        keys = random_bits((seed, HIDE), keys + words).view(np.int64)
    return keys


def hidden(ids: AnyArray, bounds: IntArray, keys: IntArray, share: float, column: int) -> AnyArray:
    """The ids with about `share` of every stretch replaced.

    Args:
        ids: of one column.
        bounds: [stretches + 1] where each stretch begins in `ids`.
        keys: [stretches] numbers that its draws are made from.
        share: in [0, 1).
        column: a number of the column's own.
    """
    lens = np.diff(bounds)
    count = np.floor(share * lens + _uniform(keys, (HIDE, column))).astype(np.int64)
    owner = np.repeat(np.arange(len(lens)), count)
    draw = np.arange(len(owner)) - np.repeat(np.cumsum(count) - count, count)
    place = (_uniform(keys[owner] + draw, (HIDE, column, 1)) * lens[owner]).astype(np.int64)
    replaced = ids.copy()
    replaced[bounds[owner] + place] = UNKNOWN_ID
    return replaced


def _uniform(index: IntArray, key: tuple[int, ...]) -> NDArray[np.float64]:
    return (random_bits(key, index) >> np.uint64(11)).astype(np.float64) * 2.0**-53
