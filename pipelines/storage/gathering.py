"""Data sets that store the log once: a sample is a labelled event, and its history is gathered as it is read.

A sample that stores its own history is stored as often as a user's events are histories, which is too much where each
event of a long history is trained on.  Such a data set has, besides `dataset.json` and `items/`,

    log/item.bin, time.bin, action.bin, pool.bin    all events, a user's after one another, oldest first
    log/first.bin, user.bin                         where each user's events begin (and where the log ends); who it is
    train/PART/place.bin, history.bin               of each sample: its event, and how many events its history has
    eval/place.bin, history.bin

little-endian arrays without a header, on a file system of the machine: they are mapped into memory, so that all
processes of a machine share one copy.  `dataset.json` says how histories are made:

    "gathered": {"pools": ["listen_plus", "like", "skip"], "pool_events": 1362, "scan_events": 20000,
                 "crosses": {"user_x_artist": ["user_id", "item.artist"]}}

Of the `scan_events` events before a sample's, the newest `pool_events` of each pool that lie before its second are its
history, oldest first.  A cross is a column of samples whose ids are a hash of other values at the sample's event: of
`user_id`, `item_id`, `item.COLUMN`, `action.NAME` (0 or 1) and `hour` of the day.
"""

import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from pipelines.features import DatasetInfo
from pipelines.storage.columns import AnyArray, IntArray
from pipelines.stream.randomness import random_bits

FIELD = "gathered"
"""The field of `dataset.json`."""
CROSS_HASH = "splitmix64"
"""Hash of the spaces of crosses: splitmix64, chained over the values."""
NO_POOL = 255
"""Pool of an event that no history holds."""
LOG, ITEM, TIME, ACTION, POOL, FIRST, USER = "log", "item", "time", "action", "pool", "first", "user"
PLACE, HISTORY = "place", "history"
TYPES: Mapping[str, DTypeLike] = {
    **{ITEM: "<i4", TIME: "<i4", POOL: "u1", FIRST: "<i8", USER: "<i8"},
    **{PLACE: "<i8", HISTORY: "<i4"},
}
"""Type of each file; an action mask has the smallest that holds all actions."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Gathering:
    """How histories are made."""

    pools: tuple[str, ...]
    """Kinds of events, each event of one of them or of none."""
    pool_events: int
    """Newest events of each pool."""
    scan_events: int
    """Events before a sample's among which they are sought."""
    crosses: Mapping[str, tuple[str, ...]]
    """Columns of samples, and what each is a hash of."""

    def as_dict(self) -> dict[str, Any]:
        """The field of `dataset.json`, which `gathering_of` reads back."""
        crosses = {name: list(words) for name, words in self.crosses.items()}
        return {"pools": list(self.pools), **_sizes(self), "crosses": crosses}


def _sizes(gathering: Gathering) -> dict[str, int]:
    return {"pool_events": gathering.pool_events, "scan_events": gathering.scan_events}


def gathering_of(info: DatasetInfo) -> Gathering | None:
    """How a data set's histories are made; None where samples store their own.

    Raises:
        ValueError: the field is malformed.
    """
    entry = info.details.get(FIELD)
    if entry is None:
        return None
    try:
        pools, crosses = tuple(map(str, entry["pools"])), {name: tuple(of) for name, of in entry["crosses"].items()}
        sizes = {name: int(entry[name]) for name in ("pool_events", "scan_events")}
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(
            f"{info.name}: {FIELD!r} of dataset.json must give pools, pool_events, scan_events and crosses, got "
            f"{entry!r}"
        ) from error
    if not 0 < len(pools) < NO_POOL or min(sizes.values()) < 1:
        raise ValueError(f"{info.name}: {FIELD!r} of dataset.json needs pools and sizes above 0, got {entry!r}")
    return Gathering(pools=pools, crosses=crosses, **sizes)


def action_type(num_actions: int) -> DTypeLike:
    """Type of `log/action.bin`."""
    return np.dtype(np.min_scalar_type((1 << num_actions) - 1)).newbyteorder("<")


def array_file(folder: Path, name: str) -> Path:
    """The path of an array's file."""
    return folder / f"{name}.bin"


def open_array(folder: Path, name: str, kind: DTypeLike | None = None) -> AnyArray:
    """Map an array of a data set.

    Raises:
        ValueError: the file is missing or not whole.
    """
    path, dtype = array_file(folder, name), np.dtype(kind if kind is not None else TYPES[name])
    try:
        size = path.stat().st_size
        if size % dtype.itemsize:
            raise ValueError(f"{path} has {size} bytes, no whole number of {dtype.name}: copy or prepare it again")
        # As a plain array, of which a slice is made in a third of the time.
        return np.asarray(np.memmap(path, dtype=dtype, mode="r")) if size else np.zeros(0, dtype=dtype)
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}; copy or prepare the data set again") from error


@dataclass(frozen=True, slots=True)
class Histories:
    """The histories of one user's samples: of each pool a run of its events."""

    pools: list[IntArray]
    """[events of the pool] places in the log, rising."""
    begin: IntArray
    """[pools, samples] where each run begins in `pools`."""
    end: IntArray
    """[pools, samples] where it ends."""

    def lens(self) -> IntArray:
        """[samples] events of each history."""
        lens: IntArray = (self.end - self.begin).sum(axis=0)
        return lens

    def places(self) -> Iterator[IntArray]:
        """The places in the log of the events of each sample's history, oldest first."""
        for sample in range(self.begin.shape[1]):
            bounds = zip(self.pools, self.begin[:, sample], self.end[:, sample], strict=True)
            # Sorted runs lie one after another here, which the sort merges quickly.
            yield np.sort(np.concatenate([places[low:high] for places, low, high in bounds]), kind="stable")


class EventLog:
    """The log of a data set, mapped into memory."""

    def __init__(self, path: str, num_actions: int) -> None:
        """Raises ValueError if a file is missing or not whole."""
        folder = Path(path) / LOG
        self.item, self.time, self.pool = (open_array(folder, name) for name in (ITEM, TIME, POOL))
        self.action = open_array(folder, ACTION, action_type(num_actions))
        self.first, self.user = open_array(folder, FIRST), open_array(folder, USER)
        sizes = {len(each) for each in (self.item, self.time, self.pool, self.action)}
        if sizes != {int(self.first[-1]) if len(self.first) else 0} or len(self.first) != len(self.user) + 1:
            raise ValueError(f"{folder}: its files disagree in length; copy or prepare the data set again")

    def by_user(self, places: IntArray) -> Iterator[tuple[int, IntArray]]:
        """(number of a user, the places among these that are theirs), for places that rise."""
        number = np.searchsorted(self.first, places, side="right") - 1
        bounds = np.append(np.flatnonzero(np.diff(number, prepend=-1)), len(places))
        for low, high in pairwise(bounds):
            yield int(number[low]), places[low:high]

    def before_its_second(self, user: int, places: IntArray) -> IntArray:
        """[places] how many of the user's events lie before the second of each of these."""
        first = int(self.first[user])
        time = np.asarray(self.time[first : int(places[-1]) + 1])
        return np.searchsorted(time, time[places - first], side="left")

    def histories(self, user: int, places: IntArray, gathering: Gathering) -> Histories:
        """The histories of the samples at these places, which are one user's and rise."""
        low = max(int(self.first[user]), int(places[0]) - gathering.scan_events)
        window = slice(low, int(places[-1]) + 1)
        time, pool = np.asarray(self.time[window]), np.asarray(self.pool[window])
        stop = low + np.searchsorted(time, time[places - low], side="left")
        start = np.maximum(places - gathering.scan_events, low)
        pools = [low + np.flatnonzero(pool == number) for number in range(len(gathering.pools))]
        end = np.stack([np.searchsorted(each, stop) for each in pools])
        begin = np.stack([np.searchsorted(each, start) for each in pools])
        return Histories(pools, np.minimum(np.maximum(begin, end - gathering.pool_events), end), end)


@functools.lru_cache(maxsize=4)
def open_log(path: str, num_actions: int) -> EventLog:
    """The log of a data set: once a process, for all parts of the data set are read from it."""
    return EventLog(path, num_actions)


def cross_ids(values: Sequence[IntArray], rows: int) -> IntArray:
    """[n] ids in [1, rows) of these values together, each [n] whole numbers."""
    bits: NDArray[np.uint64] = np.zeros(len(values[0]), dtype=np.uint64)
    for number, each in enumerate(values):
        bits = random_bits((number,), (bits ^ each.astype(np.uint64)).view(np.int64))
    return 1 + (bits % np.uint64(rows - 1)).astype(np.int64)
