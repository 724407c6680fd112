"""Made-up histories with planted long-range structure, generated as they are read and never stored.

Each user has a favourite cluster of items.  It shows only in a short stretch of liked events about `lag` events back;
events since then, liked or not, come from all clusters alike.  A candidate's label says whether it belongs to the
favourite cluster.  So a model that sees fewer than `lag` events can do no better than the base rate.

Ids count from 1, as prepared data's do: 0 is the unknown one.

With `lag_until` users differ in their lag, and each one's stretch is as long as his lag.  So every doubling of what a
model sees shows it the favourites of about as many users more.
"""

import functools
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from pipelines.config import SyntheticConfig
from pipelines.features import ITEM_ID, ITEM_SPACE, UNKNOWN_ID, Column, DatasetInfo, Space, SplitInfo
from pipelines.storage.columns import AnyArray, IntArray, Lengths, ListColumn, Samples, Values
from pipelines.storage.source import Split
from pipelines.stream.randomness import random_uniform

NUM_CLUSTERS = 8
"""Clusters: item number n, counted from 0, belongs to cluster n % NUM_CLUSTERS."""
STRETCH = 16
"""Liked events of the favourite cluster, the newest of them `lag` events back."""
NUM_SEGMENTS = 10
FIRST_ID = UNKNOWN_ID + 1
MATCH, LIKE = 1, 2
ROWS_PER_UNIT = 64
UNITS_PER_FILE = 64
START_TIME, SECONDS_BETWEEN_EVENTS = 1_600_000_000, 60
LENGTHS, CONTENT, LAGS = 31, 32, 34  # 33 draws lengths, too.
SPLITS: tuple[Split, Split] = ("train", "eval")
COUNTED_SAMPLES = 65_536


class SyntheticSource:
    """One split of generated samples; any unit can be generated at any time, always the same."""

    def __init__(self, config: SyntheticConfig, split: Split) -> None:
        if config.num_items < 2 * NUM_CLUSTERS:
            raise ValueError(f"data.synthetic.num_items must be at least {2 * NUM_CLUSTERS}, got {config.num_items}")
        self._config = config
        self._part = SPLITS.index(split)
        self._first_user = config.num_users * self._part
        self._rows = num_samples(config, split)
        starts = np.arange(0, self._rows, ROWS_PER_UNIT)
        self._unit_rows: IntArray = np.minimum(self._rows - starts, ROWS_PER_UNIT)
        self._info = synthetic_info(config)

    @property
    def info(self) -> DatasetInfo:
        """The description of the data."""
        return self._info

    @property
    def contents(self) -> str:
        """Nothing is stored."""
        return ""

    @property
    def unit_rows(self) -> IntArray:
        """[units] samples of each block."""
        return self._unit_rows

    @property
    def unit_file(self) -> IntArray:
        """[units] blocks belong to imagined files."""
        return np.arange(len(self._unit_rows)) // UNITS_PER_FILE

    def file_lengths(self, file: int) -> Lengths:
        """Lengths of the samples of a file."""
        size = ROWS_PER_UNIT * UNITS_PER_FILE
        return self._lengths(np.arange(file * size, min((file + 1) * size, self._rows)))

    def read(self, unit: int) -> Samples:
        """Generate a block."""
        config = self._config
        rows = np.arange(unit * ROWS_PER_UNIT, unit * ROWS_PER_UNIT + self._unit_rows[unit])
        lengths = self._lengths(rows)
        generator = np.random.Generator(np.random.PCG64([config.seed, CONTENT, self._part, unit]))
        favourite = (generator.random(len(rows)) * NUM_CLUSTERS).astype(np.int64)
        offsets = np.concatenate(([0], np.cumsum(lengths.history)))
        age = np.repeat(offsets[1:], lengths.history) - 1 - np.arange(offsets[-1])
        newest, stretch = self._stretch(rows, lengths.history)
        since = age - np.repeat(newest, lengths.history)
        planted = (since >= 0) & (since < np.repeat(stretch, lengths.history))
        items = self._items(generator, len(age))
        items = np.where(planted, _in_cluster(items, np.repeat(favourite, lengths.history), config.num_items), items)
        liked = planted | ((since < 0) & (generator.random(len(age)) < 0.1))
        action = np.where(liked, LIKE, 0).astype(np.int32)
        history: dict[str, AnyArray] = {
            "item_id": FIRST_ID + items,
            "action": action,
            "timestamp": START_TIME - age * SECONDS_BETWEEN_EVENTS,
        }
        return Samples(
            scalars={
                "user_id": self._first_user + rows,
                "segment": FIRST_ID + (self._first_user + rows) % NUM_SEGMENTS,
            },
            history={name: ListColumn(values=values, offsets=offsets) for name, values in history.items()},
            candidate=self._candidates(generator, favourite),
        )

    def _stretch(self, rows: IntArray, history: IntArray) -> tuple[IntArray, IntArray]:
        """[rows] age of the newest event of each stretch, counted from 0, and how many it has, seen or not."""
        config = self._config
        if config.lag_until is None:
            # A history too short for the lag shows the favourite in its oldest events.
            return np.minimum(config.lag - 1, np.maximum(history - STRETCH, 0)), np.full(len(rows), STRETCH)
        draws = random_uniform((config.seed, LAGS, self._part), rows)
        lags: IntArray = (config.lag * (config.lag_until / config.lag) ** draws).astype(np.int64)
        return lags - 1, lags

    def items(self) -> Mapping[str, Values]:
        """Items have no columns."""
        return {}

    def _lengths(self, rows: IntArray) -> Lengths:
        """History lengths and candidate counts."""
        lens = history_lens(self._config, self._part, rows)
        return Lengths(history=lens, candidates=np.full(len(rows), self._config.num_candidates))

    def _items(self, generator: np.random.Generator, count: int) -> IntArray:
        """Numbers of items, n with probability about proportional to (n + 1) ** -exponent."""
        draws, size, power = generator.random(count), self._config.num_items, 1 - self._config.item_exponent
        if abs(power) < 1e-9:
            ranks = (size + 1.0) ** draws
        else:
            ranks = (((size + 1.0) ** power - 1) * draws + 1) ** (1 / power)
        return np.minimum(ranks.astype(np.int64) - 1, size - 1)

    def _candidates(self, generator: np.random.Generator, favourite: IntArray) -> dict[str, ListColumn]:
        """Candidates, about half of them of the favourite cluster, with their labels."""
        config, count = self._config, len(favourite) * self._config.num_candidates
        wanted = np.repeat(favourite, config.num_candidates)
        items = self._items(generator, count)
        items = np.where(generator.random(count) < 0.5, _in_cluster(items, wanted, config.num_items), items)
        match = items % NUM_CLUSTERS == wanted
        coin: NDArray[np.bool_] = generator.random(count) < 0.5
        match = np.where(generator.random(count) < config.noise, coin, match)
        offsets = np.arange(len(favourite) + 1) * config.num_candidates
        columns: dict[str, AnyArray] = {
            "item_id": FIRST_ID + items,
            "action": np.where(match, MATCH, 0).astype(np.int32),
            "timestamp": np.full(count, START_TIME + SECONDS_BETWEEN_EVENTS),
        }
        return {name: ListColumn(values=values, offsets=offsets) for name, values in columns.items()}


def num_samples(config: SyntheticConfig, split: Split) -> int:
    """How many samples a split has."""
    return config.num_users if split == "train" else max(config.num_users // 10, 1)


def synthetic_info(config: SyntheticConfig) -> DatasetInfo:
    """The description that a `dataset.json` would give; events are estimated from the first histories."""
    return DatasetInfo(
        name="synthetic",
        spaces={
            name: Space(name=name, rows=FIRST_ID + number, used=FIRST_ID + number)
            for name, number in ((ITEM_SPACE, config.num_items), ("segment", NUM_SEGMENTS))
        },
        columns=(
            Column(name="segment", part="sample", kind="id", space="segment"),
            Column(name=ITEM_ID, part="event", kind="id", space=ITEM_SPACE),
            Column(name=ITEM_ID, part="candidate", kind="id", space=ITEM_SPACE),
        ),
        actions=("match", "like"),
        splits={
            split: SplitInfo(
                samples=num_samples(config, split),
                history_events=_history_events(config, split),
                candidates=num_samples(config, split) * config.num_candidates,
            )
            for split in SPLITS
        },
        source="generated",
        licence="none needed",
    )


@functools.cache
def _history_events(config: SyntheticConfig, split: Split) -> int:
    """Events of a split's histories, estimated from the first samples where there are many."""
    rows = num_samples(config, split)
    lens = history_lens(config, SPLITS.index(split), np.arange(min(rows, COUNTED_SAMPLES)))
    return round(rows * float(lens.mean()))


def history_lens(config: SyntheticConfig, part: int, rows: IntArray) -> IntArray:
    """Lengths of the histories of these samples of `SPLITS[part]`."""
    draws = random_uniform((config.seed, LENGTHS, part), rows)
    low, high = config.min_len, config.max_len
    if config.lengths == "constant":
        lens = np.full(len(rows), high)
    elif config.lengths == "zipf":
        lens = (low * (high / low) ** draws).astype(np.int64)
    else:
        # Log-normal by Box and Muller, its median at the geometric middle of the bounds.
        angle = random_uniform((config.seed, LENGTHS + 1, part), rows)
        normal = np.sqrt(-2 * np.log(draws)) * np.cos(2 * np.pi * angle)
        lens = np.exp(np.log(low * high) / 2 + 0.2 * np.log(high / low) * normal).astype(np.int64)
    clipped: IntArray = np.clip(lens, low, high)
    return clipped


def _in_cluster(items: IntArray, cluster: IntArray, num_items: int) -> IntArray:
    """The numbers of the items nearest to these that belong to the given clusters."""
    moved = items - items % NUM_CLUSTERS + cluster
    return np.where(moved < num_items, moved, moved - NUM_CLUSTERS)
