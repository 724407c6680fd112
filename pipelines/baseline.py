"""The score to beat: an item's rate combined with a user's rate, both counted on the training candidates alone.

    logit(score) = logit(item's rate) + logit(user's rate) - logit(overall rate)

Rates are smoothed towards the overall rate by a number of imagined observations, so unseen ids score neutrally.
Candidates with a weight of 0 do not exist here, as in metrics; all others count alike.
"""

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pipelines.config import DataConfig
from pipelines.features import Column, DatasetInfo
from pipelines.reading.loader import open_source
from pipelines.selection import Selection
from pipelines.storage.columns import IntArray, Samples
from pipelines.storage.source import Source

ITEM_PRIOR = 20.0
"""Imagined observations of an item at the overall rate."""
USER_PRIOR = 10.0
"""Imagined observations of a user at the overall rate."""

FloatArray = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True, slots=True)
class Baseline:
    """Scores of the evaluation candidates, in stored order: the order in which a single rank meets them."""

    logits: FloatArray
    """[C, tasks] the formula above."""
    labels: FloatArray
    """[C, tasks] 0 or 1."""
    user_id: IntArray
    """[C]"""


def count_rates(
    config: DataConfig,
    info: DatasetInfo,
    tasks: Sequence[str],
    share: int = 0,
    shares: int = 1,
    *,
    unseen: int | None = None,
) -> "TrainingRates":
    """Count a share of the training split of `config.path`: units `share`, `share + shares`, ...

    `info` describes the data as a run knows it; parts that were added since do not count.

    `unseen` counts the parts of the data before that one.  Memory grows with the numbers of items and users only.
    """
    bits = _bits(info, tasks)
    items = Rates(num_ids=info.num_items, num_tasks=len(tasks))
    users = UserRates(np.zeros(0, dtype=np.int64), Rates(num_ids=0, num_tasks=len(tasks)))
    found = []
    for user_id, item_id, labels in _candidates(
        _training_units(config, info, share, shares, unseen), config, info, bits
    ):
        items.add(item_id, labels)
        ids, place = np.unique(user_id, return_inverse=True)
        rates = Rates(num_ids=len(ids), num_tasks=len(tasks))
        rates.add(place, labels)
        found.append(UserRates(ids, rates))
    return TrainingRates(items, join_users([users, *found]))


def baseline_scores(
    config: DataConfig,
    info: DatasetInfo,
    tasks: Sequence[str],
    rates: "TrainingRates | None" = None,
    *,
    unseen: int | None = None,
) -> Baseline:
    """Score the evaluation split of `config.path` by the `rates` of its training split, counted here if None.

    `unseen` scores the training samples of that part of the data instead, by the parts before it.
    """
    rates = rates or count_rates(config, info, tasks, unseen=unseen)
    items, users = rates.items, rates.users.ids
    overall = (items.positive.sum(axis=0) + 1) / (items.count.sum() + 2)
    item_logit = _logit(items.smoothed(overall, ITEM_PRIOR))
    # Users without training candidates share the last, empty entry.
    by_user = Rates(num_ids=len(users) + 1, num_tasks=len(tasks))
    by_user.merge(np.arange(len(users)), rates.users.rates)
    user_logit = _logit(by_user.smoothed(overall, USER_PRIOR))

    if unseen is None:
        scored = open_source(config, info, "eval", _weights(info))
    else:
        scored = open_source(config, info, "train", _weights(info), part=info.parts[unseen])
    units = ((scored, unit) for unit in range(len(scored.unit_rows)))
    found = list(_candidates(units, config, info, _bits(info, tasks)))
    user_id = np.concatenate([part[0] for part in found])
    place = np.searchsorted(users, user_id)
    known = np.append(users, -1)[place] == user_id
    place = np.where(known, place, len(users))
    logit = item_logit[np.concatenate([part[1] for part in found])] + user_logit[place] - _logit(overall)
    return Baseline(logits=logit, labels=np.concatenate([part[2] for part in found]), user_id=user_id)


def item_counts(
    config: DataConfig, info: DatasetInfo, share: int = 0, shares: int = 1, *, unseen: int | None = None
) -> IntArray:
    """How often each item stands in the histories and candidates of a share of the training split of `config.path`,
    [items]; shares as in `count_rates`."""
    counts = np.zeros(info.num_items, dtype=np.int64)
    for source, unit in _training_units(config, info, share, shares, unseen):
        samples: Samples = source.read(unit)
        for column in (samples.history["item_id"], samples.candidate["item_id"]):
            np.add.at(counts, column.array, 1)
    return counts


def class_counts(
    config: DataConfig,
    info: DatasetInfo,
    label: Column,
    share: int = 0,
    shares: int = 1,
    *,
    thinned: bool,
    unseen: int | None = None,
) -> FloatArray:
    """What the candidates of each id of a label of classes count in a share of the training split, [rows of its space];
    shares as in `count_rates`.

    A candidate counts as its weight says and, where they are `thinned`, stands for 1 / keep rate of them.
    """
    assert label.space is not None
    rows = info.spaces[label.space].rows
    counts = np.zeros(rows)
    factors = [column for column in info.of("label") if column.name in (info.weight, thinned and info.keep_rate)]
    read = Selection(labels=tuple(dict.fromkeys([label, *factors])))
    for source, unit in _training_units(config, info, share, shares, unseen, read):
        samples: Samples = source.read(unit)
        kept, each = _kept(samples, config), np.ones(len(samples.candidate["item_id"].array))
        for column in factors:
            values = samples.candidate[column.stored].array.astype(np.float64)
            each = each * values if column.name == info.weight else each / values
        ids = samples.candidate[label.stored].array
        counts += np.bincount(ids[kept], weights=each[kept], minlength=rows)
    return counts


class Rates:
    """Positive labels and observations of each id."""

    def __init__(self, *, num_ids: int, num_tasks: int) -> None:
        self.positive = np.zeros((num_ids, num_tasks))
        self.count = np.zeros((num_ids, 1))

    def add(self, ids: IntArray, labels: FloatArray) -> None:
        """Count further observations."""
        # In time that grows with the observations alone: units are small, and items may be millions.
        np.add.at(self.count[:, 0], ids, 1)
        np.add.at(self.positive, ids, labels)

    def merge(self, ids: IntArray, other: "Rates") -> None:
        """Add another count, whose entries have these distinct ids."""
        self.count[ids] += other.count
        self.positive[ids] += other.positive

    def smoothed(self, overall: FloatArray, prior: float) -> FloatArray:
        """[ids, tasks] rates, pulled towards the overall ones."""
        return (self.positive + prior * overall) / (self.count + prior)


@dataclass(frozen=True, slots=True)
class UserRates:
    """How often some users were seen, and what they did."""

    ids: IntArray
    """The users' ids, ascending, each once."""
    rates: Rates


@dataclass(frozen=True, slots=True)
class TrainingRates:
    """What the training split, or a share of it, says of items and users."""

    items: Rates
    users: UserRates


def join_users(parts: Sequence[UserRates]) -> UserRates:
    """The counts of several shares together."""
    ids = np.unique(np.concatenate([part.ids for part in parts]))
    rates = Rates(num_ids=len(ids), num_tasks=parts[0].rates.positive.shape[1])
    for part in parts:
        rates.merge(np.searchsorted(ids, part.ids), part.rates)
    return UserRates(ids, rates)


def _bits(info: DatasetInfo, tasks: Sequence[str]) -> IntArray:
    return np.array([info.action_bit(task) for task in tasks])


def _weights(info: DatasetInfo) -> Selection:
    """The column of weights, if the data set has one; of columns that not every data set has, nothing else is read."""
    return Selection(labels=tuple(column for column in info.of("label") if column.name == info.weight))


def _training_units(
    config: DataConfig, info: DatasetInfo, share: int, shares: int, unseen: int | None, read: Selection | None = None
) -> Iterator[tuple[Source, int]]:
    """A share of the units of all parts of the training split, or of those before the unseen one."""
    read = read or _weights(info)
    sources = [open_source(config, info, "train", read, part=part) for part in info.parts[:unseen]]
    units = ((source, unit) for source in sources for unit in range(len(source.unit_rows)))
    return itertools.islice(units, share, None, shares)


def _candidates(
    units: Iterable[tuple[Source, int]], config: DataConfig, info: DatasetInfo, bits: IntArray
) -> Iterator[tuple[IntArray, IntArray, FloatArray]]:
    """User, item and labels of each candidate that `config` keeps, unit by unit.

    Unbounded items share counts, as if their ids were a hash.
    """
    for source, unit in units:
        samples: Samples = source.read(unit)
        column, kept = samples.candidate["item_id"], _kept(samples, config)
        for weight in _weights(info).labels:
            # In the precision of the loss, in which the smallest are 0, too.
            kept &= samples.candidate[weight.stored].array.astype(np.float32) > 0
        labels = (samples.candidate["action"].array[kept, None] >> bits) & 1
        yield (
            np.repeat(np.asarray(samples.scalars["user_id"]), column.lens())[kept],
            column.array[kept] % info.num_items,
            labels.astype(np.float64),
        )


def _kept(samples: Samples, config: DataConfig) -> NDArray[np.bool_]:
    """Which candidates `config` keeps: the first ones of each sample."""
    column = samples.candidate["item_id"]
    place = np.arange(len(column.array)) - np.repeat(column.offsets[:-1], column.lens())
    kept: NDArray[np.bool_] = place < (config.max_candidates or np.inf)
    return kept


def _logit(rate: FloatArray) -> FloatArray:
    result: FloatArray = np.log(rate / (1 - rate))
    return result
