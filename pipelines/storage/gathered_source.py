"""A split of a data set whose histories are gathered from its log as they are read (`pipelines.storage.gathering`)."""

import functools
from collections.abc import Callable, Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np

from pipelines.features import ITEM_ID, USER_ID, DatasetInfo
from pipelines.selection import ITEM_PREFIX, Selection, stored_columns
from pipelines.storage.columns import AnyArray, IntArray, Lengths, ListColumn, Samples, Values
from pipelines.storage.dataset_json import read_dataset_info
from pipelines.storage.gathering import (
    HISTORY,
    PLACE,
    EventLog,
    Gathering,
    cross_ids,
    gathering_of,
    open_array,
    open_log,
)
from pipelines.storage.items import read_items
from pipelines.storage.source import Split
from pipelines.storage.validate import check_samples

ROWS_PER_UNIT = 64
"""Samples that are gathered together: few, because a rank gathers whole units though it may need a part of one."""
ACTION_PREFIX = "action."
DIGESTED_PIECES, DIGESTED_VALUES = 16, 512
"""Pieces of each array, and values of a piece, that its digest is made of: a whole array lies on the disk."""


class GatheredSource:
    """One part of the training split, or the evaluation split; any unit can be read at any time."""

    def __init__(self, path: str, info: DatasetInfo, split: Split, selection: Selection, part: str) -> None:
        """`part` is one of the training split's; the evaluation split has none.

        Raises:
            ValueError: the data set lies in an object store, or a file is missing or not whole.
        """
        if "://" in path:
            raise ValueError(f"{path}: a log that histories are gathered from must lie on a file system of the machine")
        self._arguments = (path, info, split, selection, part)
        self._path, self._info, self._selection = path, info, selection
        gathering = gathering_of(info)
        assert gathering is not None
        self._gathering: Gathering = gathering
        self._folder = Path(path) / split / (part if split == "train" else "")
        self._place, self._history = open_array(self._folder, PLACE), open_array(self._folder, HISTORY)
        if len(self._place) != len(self._history) or not len(self._place):
            raise ValueError(f"{self._folder}: {PLACE}.bin and {HISTORY}.bin disagree in length, or are empty")
        starts = np.arange(0, len(self._place), ROWS_PER_UNIT)
        self._unit_rows: IntArray = np.minimum(len(self._place) - starts, ROWS_PER_UNIT)

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        """A reader process maps the files itself, rather than be sent what they hold."""
        return GatheredSource, self._arguments

    @property
    def info(self) -> DatasetInfo:
        """The data set's description."""
        return self._info

    @property
    def contents(self) -> str:
        """Digest of the sizes of all arrays, and of pieces of them."""
        log, found = open_log(self._path, len(self._info.actions)), sha256()
        for array in (self._place, self._history, log.user, log.first, log.item, log.action, log.time, log.pool):
            found.update(f"{len(array)};".encode())
            for start in np.linspace(0, max(0, len(array) - DIGESTED_VALUES), DIGESTED_PIECES).astype(int):
                found.update(np.ascontiguousarray(array[start : start + DIGESTED_VALUES]).tobytes())
        return found.hexdigest()

    @property
    def num_files(self) -> int:
        """Places of samples lie in one file a part."""
        return 1

    @property
    def unit_rows(self) -> IntArray:
        """[units] samples of each unit, in order of users and then of time."""
        return self._unit_rows

    @property
    def unit_file(self) -> IntArray:
        """[units] all of one file."""
        return np.zeros(len(self._unit_rows), dtype=np.int64)

    def file_lengths(self, file: int) -> Lengths:
        """Lengths of all samples."""
        return Lengths(history=self._history.astype(np.int64), candidates=np.ones(len(self._history), dtype=np.int64))

    def read(self, unit: int) -> Samples:
        """Gather the samples of a unit, checked."""
        log, first = open_log(self._path, len(self._info.actions)), unit * ROWS_PER_UNIT
        place = np.asarray(self._place[first : first + int(self._unit_rows[unit])])
        users: list[IntArray] = []
        gathered: list[IntArray] = []
        for user, places in log.by_user(place):
            users.append(np.full(len(places), log.user[user]))
            gathered += log.histories(user, places, self._gathering).places()
        history = np.concatenate([np.zeros(0, dtype=np.int64), *gathered])
        user_id = np.concatenate(users)
        where = f"{self._folder}, samples {first} to {first + len(place) - 1}"
        samples = Samples(
            scalars={USER_ID: user_id, **self._crosses(log, place, user_id)},
            history=_lists(log, history, np.array([len(each) for each in gathered])),
            candidate=_lists(log, place, np.ones(len(place), dtype=np.int64)),
        )
        stored = {"history_length": self._history[first : first + len(place)], "num_candidates": np.ones(len(place))}
        check_samples(samples, stored, where, self._info, stored_columns(self._selection))
        return samples

    def items(self) -> Mapping[str, Values]:
        """The selected columns of items, by item id."""
        names = {feature.column for feature in self._selection.features if feature.of_item}
        return read_items(self._path, self._info, [each for each in self._info.of("item") if each.name in names])

    def _crosses(self, log: EventLog, place: IntArray, user_id: IntArray) -> dict[str, Values]:
        """The selected crosses of the samples at these places."""
        item, action = log.item[place].astype(np.int64), log.action[place].astype(np.int64)
        rows = {each.name: self._info.spaces[each.space or ""].rows for each in self._info.of("sample")}

        def value(word: str) -> IntArray:
            if word.startswith(ITEM_PREFIX):
                return _item_column(self._path, word.removeprefix(ITEM_PREFIX))[item].astype(np.int64)
            if word.startswith(ACTION_PREFIX):
                return action >> self._info.action_bit(word.removeprefix(ACTION_PREFIX)) & 1
            if word == "hour":
                return log.time[place].astype(np.int64) // 3600 % 24
            known = {USER_ID: user_id, ITEM_ID: item}
            if word not in known:
                raise ValueError(
                    f"{self._info.name}: a cross is made of {word!r}, which is none of user_id, item_id, item.COLUMN, "
                    "action.NAME and hour"
                )
            return known[word]

        chosen = {each.column for each in self._selection.features if each.parts == ("sample",)}
        return {
            name: cross_ids([value(word) for word in words], rows[name])
            for name, words in self._gathering.crosses.items()
            if name in chosen
        }


def _lists(log: EventLog, places: IntArray, lens: IntArray) -> dict[str, ListColumn]:
    """What every event has, of the events at these places: a list a sample."""
    offsets = np.concatenate(([0], np.cumsum(lens)))
    columns: dict[str, AnyArray] = {
        ITEM_ID: log.item[places].astype(np.int64),
        "action": log.action[places].astype(np.int32),
        "timestamp": log.time[places].astype(np.int64),
    }
    return {name: ListColumn(values=values, offsets=offsets) for name, values in columns.items()}


@functools.lru_cache(maxsize=16)
def _item_column(path: str, name: str) -> AnyArray:
    """A column of ids of items, by item id: once a process, for all parts of the data set."""
    info = read_dataset_info(path)
    columns = [each for each in info.of("item") if each.name == name and each.kind == "id"]
    if not columns:
        raise ValueError(f"{info.name}: a cross is made of item.{name}, which is no column of ids of items")
    values = read_items(path, info, columns)[name]
    assert isinstance(values, np.ndarray)
    return values
