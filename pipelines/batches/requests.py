"""From a server's requests to a model's inputs: plain Python in, the same arrays out that prepared data give.

    {"sample": {"country": "de"},
     "event": {"item_id": ["sku-4"], "action": [["view"]], "timestamp": [1704067200], "dwell_s": [31.0]},
     "candidate": {"item_id": ["sku-9", "sku-77"], "timestamp": [1704070000, 1704070000]}}

A request holds the columns of `dataset.json` by part, a value an event or candidate: keys of the log in place of ids,
None for what is missing, names of the actions taken.  Columns of items are joined from the data set, but for those that
a request gives itself, as `item.NAME` beside the `item_id` of the part.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from pipelines.batches.batch import Batch, Inputs
from pipelines.batches.collate import collate
from pipelines.config import DataConfig
from pipelines.counts import counts_of
from pipelines.features import ITEM_ID, ITEM_SPACE, TAKEN, UNKNOWN_ID, UNKNOWN_TIME, USER_ID, Column, DatasetInfo, Part
from pipelines.selection import ITEM_PREFIX, Feature, Selection, stored_columns
from pipelines.storage.columns import AnyArray, Bags, ListColumn, Samples, Values
from pipelines.storage.items import read_items
from pipelines.storage.keys import ToId, read_keys
from pipelines.storage.validate import check_samples
from pipelines.stream.global_batches import BatchPlan
from pipelines.stream.order import References
from pipelines.stream.position import DataPosition

Request = Mapping[str, Mapping[str, Any]]
"""A request: the parts of a sample by name, each with its columns by name."""
PARTS: tuple[Part, ...] = ("sample", "event", "candidate")
"""Parts of a request."""
ACTION, TIMESTAMP, _ = TAKEN
MOST_SECONDS = int(np.iinfo(np.int64).max)
"""Seconds that the arrays hold."""


class InputBuilder:
    """Makes inputs of requests.  Reads keys and columns of items once; nothing is written.

    Args:
        config: where the data set lies, and the longest history.
        info: its description.
        selection: what the model reads.
    """

    def __init__(self, config: DataConfig, info: DatasetInfo, selection: Selection) -> None:
        self._config, self._info = replace(config, unknown_share=0.0), info
        # A draw keeps its place among the lookups, and draws nothing.
        draw = None if selection.draw is None else replace(selection.draw, count=0)
        self._selection = replace(selection, labels=(), draw=draw)
        columns = list(stored_columns(self._selection))
        self._columns = [
            *(Column(name=ITEM_ID, part=part, kind="id", space=ITEM_SPACE) for part in PARTS if part != "sample"),
            *columns,
        ]
        self._counted = {name for each in counts_of(info) for name in each.columns}
        self._of_items = [feature for feature in selection.features if feature.of_item]
        read = {feature.column for feature in self._of_items}
        self._items = read_items(config.path, info, [each for each in info.of("item") if each.name in read])
        self._keys: dict[str, tuple[ToId, str]] = {}
        for space in (column.space for column in self._columns if column.space is not None):
            self._keys_of(space)

    def __call__(self, requests: Sequence[Request]) -> Inputs:
        """The inputs of requests, in their order, on the host; candidates are in the order of scores.

        Raises:
            ValueError: a column is missing, unknown, of another type or length, or times are not in order; the message
                names the request and the column.
        """
        return self.batch(requests).inputs

    def batch(self, requests: Sequence[Request]) -> Batch:
        """The request as a batch; its labels say nothing."""
        if not requests:
            raise ValueError("there is no request: give at least one")
        _check_parts(requests)
        for number, request in enumerate(requests):
            self._check_names(request, f"request {number}")
        given = self._given(requests)
        samples = self._samples(requests, given)
        read = [column for column in self._columns if column.name != ITEM_ID]
        check_samples(samples, {}, "requests", self._info, [*read, *given])
        items = {name: values for name, values in self._items.items() if ITEM_PREFIX + name not in _names(given)}
        packed = collate(self._plan(samples), {(0, 0): samples}, items, self._selection, self._config, world_size=1)
        return Batch(packed.contents[0], packed.memory)

    def without_candidates(self, requests: Sequence[Request]) -> list[Request]:
        """The requests with an unknown candidate each, in the place of the item to come; when it comes they may say by
        the time of a candidate, else a second after the history.

        Raises ValueError for a request without history or with candidates.
        """
        _check_parts(requests)
        asked: list[Request] = []
        candidate = [column for column in self._columns if column.part == "candidate"]
        unknown: dict[str, list[Any]] = {each.name: [[] if each.kind == "ids" else None] for each in candidate}
        for number, request in enumerate(requests):
            others = sorted(set(request.get("candidate", {})) - {TIMESTAMP})
            if others:
                raise ValueError(
                    f"request {number} has the candidate column {others[0]!r}, but is asked for the item to come: "
                    f"leave candidates out, but for their {TIMESTAMP}"
                )
            history = request.get("event", {}).get(ITEM_ID, ())
            if _is_list(history) and not len(history):
                raise ValueError(f"request {number} has no history, from which the item to come is predicted")
            time = {TIMESTAMP: [_after(request.get("event", {}).get(TIMESTAMP, ()))]}
            asked.append({**request, "candidate": {**unknown, **time, **request.get("candidate", {})}})
        return asked

    def _given(self, requests: Sequence[Request]) -> list[Column]:
        """The columns of items that a request gives, of every part that the model reads them of."""
        names = {name for request in requests for columns in request.values() for name in columns}
        return [
            Column(name=feature.name, part=part, kind=feature.kind, space=feature.space)
            for feature in self._of_items
            for part in feature.parts
            if feature.name in names
        ]

    def _joined(self, column: Column, requests: Sequence[Request], items: ListColumn) -> ListColumn:
        """A column of items as requests give it or, where one does not, as the data set has it."""
        stored, rows = self._items[column.name.removeprefix(ITEM_PREFIX)], []
        for number, request in enumerate(requests):
            if column.name in request.get(column.part, {}):
                rows.append(self._of(request, column, f"request {number}"))
                continue
            ids = items.array[items.offsets[number] : items.offsets[number + 1]]
            own = stored[ids] if isinstance(stored, Bags) else stored.take(ids)
            rows.append([own[n : n + 1].values.tolist() for n in range(len(ids))] if isinstance(own, Bags) else own)
        return _lists(column, rows)

    def _keys_of(self, space: str) -> tuple[ToId, str]:
        if space not in self._keys:
            self._keys[space] = read_keys(self._config.path, self._info.spaces[space])
        return self._keys[space]

    def _check_names(self, request: Request, where: str) -> None:
        for part, columns in request.items():
            if part not in PARTS:
                raise ValueError(f"{where} has the part {part!r}, which is none of {', '.join(PARTS)}")
            own = [TIMESTAMP] if part == "candidate" else [ACTION, TIMESTAMP] if part == "event" else []
            have = [*own, *(each.name for each in self._info.columns if each.part == part)]
            have += [] if part == "sample" else _names(self._of_items)
            for name in columns:
                if name not in have:
                    raise ValueError(
                        f"{where} has the {part} column {name!r}, which is none of {', '.join(have) or 'any'}"
                    )

    def _samples(self, requests: Sequence[Request], given: Sequence[Column]) -> Samples:
        """The requests as flat arrays, with the columns of items that are `given`."""
        count = len(requests)
        scalars: dict[str, Values] = {USER_ID: np.zeros(count, dtype=np.int64)}
        lists: dict[str, dict[str, ListColumn]] = {"event": {}, "candidate": {}}
        for column in self._columns:
            values = [self._of(request, column, f"request {number}") for number, request in enumerate(requests)]
            if column.part == "sample":
                scalars[column.name] = _array(column, values)
            else:
                lists[column.part][column.name] = _lists(column, values)
        for part, kinds in lists.items():
            time = Column(name=TIMESTAMP, part="event" if part == "event" else "candidate", kind="id")
            values = [self._of(request, time, f"request {number}") for number, request in enumerate(requests)]
            kinds[TIMESTAMP] = _lists(time, values)
        for column in given:
            of_part = lists[column.part]
            of_part[column.name] = self._joined(column, requests, of_part[ITEM_ID])
        actions = [self._actions(request, f"request {number}") for number, request in enumerate(requests)]
        lists["event"][ACTION] = _lists(Column(name=ACTION, part="event", kind="id"), actions, np.int32)
        # Labels of candidates are not known, and scoring does not read them.
        items = lists["candidate"][ITEM_ID]
        lists["candidate"][ACTION] = replace(items, values=np.zeros(len(items.array), dtype=np.int32))
        return Samples(scalars=scalars, history=lists["event"], candidate=lists["candidate"])

    def _of(self, request: Request, column: Column, where: str) -> Any:
        """A request's value of a column of samples, or its values of one of events or candidates, as ids or numbers."""
        columns = request.get(column.part, {})
        where = f"{where}: {column.part} column {column.name!r}"
        if column.name not in columns:
            if column.part == "event" and not columns:
                return []  # No history.
            counted = column.part == "candidate" and column.name in self._counted
            way_out = ": the server keeps these counts, or train with model.input.counts=[]" if counted else ""
            raise ValueError(f"{where} is missing, which the model reads{way_out}")
        values = columns[column.name]
        if column.part == "sample":
            return self._value(column, values, where)
        if not _is_list(values):
            raise ValueError(f"{where} must be a list with a value for each, got {values!r}")
        return [self._value(column, value, where) for value in values]

    def _value(self, column: Column, value: Any, where: str) -> Any:
        if column.kind == "number":
            if value is not None and (
                not isinstance(value, int | float | np.integer | np.floating) or isinstance(value, bool)
            ):
                raise ValueError(f"{where} must hold numbers, or None where they are missing, got {value!r}")
            try:
                return np.nan if value is None else float(value)
            except OverflowError:
                raise ValueError(f"{where} must hold numbers of 32 bits, got one that is far beyond") from None
        if column.kind == "ids":
            if not _is_list(value):
                raise ValueError(f"{where} must hold a list of any length for each, got {value!r}")
            return [self._id(column, each, where) for each in value if not _is_missing(each)]
        return self._id(column, value, where)

    def _id(self, column: Column, key: Any, where: str) -> int:
        if column.space is not None and _is_missing(key):
            return UNKNOWN_ID
        to_id, keys = self._keys_of(column.space) if column.space is not None else (_second, "seconds, or -1")
        try:
            return to_id(key)
        except TypeError:
            raise ValueError(f"{where} must hold {keys}, got {key!r}") from None

    def _actions(self, request: Request, where: str) -> list[int]:
        """The bit mask of each event's actions."""
        events, names = request.get("event", {}), self._info.actions
        where = f"{where}: event column {ACTION!r}"
        if events and ACTION not in events:
            raise ValueError(f"{where} is missing: a list for each, with the names of the actions taken")
        masks = []
        for taken in events.get(ACTION, []):
            if not _is_list(taken) or not all(name in names for name in taken):
                raise ValueError(f"{where} must hold a list of some of {', '.join(names)} for each, got {taken!r}")
            masks.append(sum(1 << names.index(name) for name in set(taken)))
        return masks

    def _plan(self, samples: Samples) -> BatchPlan:
        """All of them, with their newest events."""
        history, candidates = samples.history[ITEM_ID].lens(), samples.candidate[ITEM_ID].lens()
        zeros, rows = np.zeros(len(history), dtype=np.int64), np.arange(len(history))
        kept = np.minimum(history, self._config.max_history_len)
        references = References(
            source=zeros, epoch=zeros, unit=zeros, row=rows, sample=rows, history=history, candidates=candidates
        )
        return BatchPlan(
            samples=references,
            history=kept,
            candidates=candidates,
            global_samples=len(history),
            global_tokens=int(kept.sum() + candidates.sum()),
            global_candidates=int(candidates.sum()),
            global_followed=0,
            imbalance=1.0,
            position=DataPosition(order=("requests",)),
        )


def _check_parts(requests: Sequence[Request]) -> None:
    """Raise ValueError unless these are requests."""
    if not isinstance(requests, list | tuple):
        raise ValueError(f"requests must be a list of them, got {type(requests).__name__}")
    for number, request in enumerate(requests):
        if not isinstance(request, Mapping):
            raise ValueError(f"request {number} must be a dict with its parts by name, got {request!r}")
        for part, columns in request.items():
            if not isinstance(columns, Mapping):
                raise ValueError(
                    f"request {number}: the part {part!r} must be a dict with its columns by name, got {columns!r}: "
                    "leave it out if there is none"
                )


def _names(columns: Iterable[Column | Feature]) -> list[str]:
    return list(dict.fromkeys(each.name for each in columns))


def _is_missing(key: Any) -> bool:
    """As the preparation has it, which gives such a key the unknown id, and leaves it out of lists."""
    return key is None or (isinstance(key, str) and not key.strip(" "))


def _second(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or abs(int(value)) > MOST_SECONDS:
        raise TypeError
    return int(value)


def _after(times: Any) -> int:
    """A second after the last of these; what is wrong with them is said where they are read."""
    newest = times[-1] if _is_list(times) and len(times) else UNKNOWN_TIME
    return int(newest) + 1 if isinstance(newest, int | np.integer) and newest != UNKNOWN_TIME else UNKNOWN_TIME


def _is_list(values: Any) -> bool:
    return isinstance(values, list | tuple | np.ndarray)


def _lists(column: Column, values: Sequence[Sequence[Any]], dtype: Any = np.int64) -> ListColumn:
    offsets = np.concatenate(([0], np.cumsum([len(each) for each in values])))
    return ListColumn(values=_array(column, [x for each in values for x in each], dtype), offsets=offsets)


def _array(column: Column, values: Sequence[Any], dtype: Any = np.int64) -> Values:
    if column.kind == "ids":
        offsets = np.concatenate(([0], np.cumsum([len(each) for each in values]))).astype(np.int64)
        return Bags(np.array([x for each in values for x in each], dtype=np.int64), offsets)
    array: AnyArray = np.array(values, dtype=np.float64 if column.kind == "number" else dtype)
    return array
