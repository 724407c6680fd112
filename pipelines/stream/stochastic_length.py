"""Stochastic length and its load-balanced form: how many events of each history a training batch keeps, and which.

Decided from lengths alone, before anything is looked up.  Evaluation does not use this module.
"""

import numpy as np
from numpy.typing import NDArray

from pipelines.config import StochasticLengthConfig
from pipelines.storage.columns import IntArray
from pipelines.stream.randomness import random_uniform

CUT, FILL, EVENTS = 11, 12, 13


def cut_len(max_history_len: int, alpha: float) -> int:
    """Events that a cut history keeps."""
    return max(int(max_history_len ** (alpha / 2)), 1)


def keep_probability(lens: IntArray, max_history_len: int, alpha: float) -> NDArray[np.float64]:
    """Probability that a history stays whole under the plain rule."""
    short = lens <= max_history_len ** (alpha / 2)
    return np.where(short, 1.0, np.minimum(1.0, max_history_len**alpha / np.maximum(lens, 1).astype(np.float64) ** 2))


def plain_lens(lens: IntArray, draws: NDArray[np.float64], max_history_len: int, alpha: float) -> IntArray:
    """Kept events of each history, cut where a uniform draw exceeds its keep probability."""
    keep = draws < keep_probability(lens, max_history_len, alpha)
    return np.where(keep, lens, np.minimum(lens, cut_len(max_history_len, alpha)))


def load(lens: IntArray, gamma: float) -> NDArray[np.float64]:
    """Modelled cost of histories."""
    return lens.astype(np.float64) ** gamma


def balanced_lens(
    lens: IntArray,
    draws: NDArray[np.float64],
    group: IntArray,
    budget: float,
    *,
    max_history_len: int,
    config: StochasticLengthConfig,
) -> IntArray:
    """Kept events of each history when every group may cost `budget` (Algorithm 1 of the ULTRA-HSTU paper).

    Each group's histories are visited in a weighted random order that favours those the plain rule would keep; a
    history stays whole while the group's cost, with all others cut, remains within the budget.
    """
    short = np.minimum(lens, cut_len(max_history_len, config.alpha))
    extra = load(lens, config.gamma) - load(short, config.gamma)
    room = (budget - np.bincount(group, weights=load(short, config.gamma))).tolist()
    # A weighted permutation without replacement is the order of log(u) / weight (Efraimidis and Spirakis).
    order = np.argsort(-np.log(draws) / keep_probability(lens, max_history_len, config.alpha), kind="stable")
    kept = np.zeros(len(lens), dtype=bool)
    costs, groups = extra.tolist(), group.tolist()
    for sample in order.tolist():
        if costs[sample] <= room[groups[sample]] or costs[sample] == 0:
            room[groups[sample]] -= costs[sample]
            kept[sample] = True
    return np.where(kept, lens, short)


def choose_events(length: int, kept: int, config: StochasticLengthConfig, key: tuple[int, ...]) -> IntArray:
    """Which events of one history stay, in order, for the selections other than the newest."""
    draws = random_uniform((*key, EVENTS), np.arange(length))
    # Age weighting: the newest event's weight is 1 and falls linearly to the oldest's 1 / length.
    weight = np.arange(1, length + 1) / length if config.selection == "age_weighted" else 1.0
    return np.sort(np.argpartition(-np.log(draws) / weight, kept - 1)[:kept])
