"""Random numbers that are pure functions of what they are for, so that no order of execution can change them."""

import numpy as np
from numpy.typing import NDArray

UINT64_MASK = (1 << 64) - 1


def random_bits(key: tuple[int, ...], index: NDArray[np.int64]) -> NDArray[np.uint64]:
    """64 pseudo-random bits for each entry of `index`, under a key of whole numbers (splitmix64, chained)."""
    state = np.uint64(0)
    for word in key:
        state = _mix(np.array([(int(state) + word + 0x9E3779B97F4A7C15) & UINT64_MASK], dtype=np.uint64))[0]
    return _mix(index.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15) + state)


def random_uniform(key: tuple[int, ...], index: NDArray[np.int64]) -> NDArray[np.float64]:
    """Uniform numbers in (0, 1), one for each entry of `index`."""
    return ((random_bits(key, index) >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53


def permutation(key: tuple[int, ...], size: int) -> NDArray[np.int64]:
    """A pseudo-random order of range(size)."""
    return np.argsort(random_bits(key, np.arange(size)), kind="stable")


def _mix(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The finaliser of splitmix64."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
