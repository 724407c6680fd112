"""Checks of stored samples, made as they are read: one pass of whole-array operations, one clear line an error."""

from collections.abc import Mapping, Sequence

import numpy as np
import pyarrow as pa

from pipelines.columns import AnyArray, IntArray, Samples
from pipelines.features import LENGTH_COLUMNS, UNKNOWN_TIME, DatasetInfo


def check_schema(schema: pa.Schema, file: str, info: DatasetInfo, history_features: Sequence[str]) -> None:
    """Raise ValueError if a needed column is missing or of another type."""
    scalars = dict.fromkeys(("user_id", *info.context_features), pa.int64())
    lists = {f"{part}_item_id": pa.int64() for part in ("history", "candidate")}
    lists |= {f"{part}_action": pa.int32() for part in ("history", "candidate")}
    lists |= {f"{part}_timestamp": pa.int64() for part in ("history", "candidate")}
    for name in (*scalars, *lists, *(f"history_{feature}" for feature in history_features)):
        if name not in schema.names:
            raise ValueError(f"{file} lacks the column {name}")
    for name, expected in scalars.items():
        if schema.field(name).type != expected:
            raise ValueError(f"{file}: column {name} must have the type {expected}, got {schema.field(name).type}")
    for name, expected in lists.items():
        kind = schema.field(name).type
        if not (pa.types.is_list(kind) or pa.types.is_large_list(kind)) or kind.value_type != expected:
            raise ValueError(f"{file}: column {name} must have the type list<{expected}>, got {kind}")
    for feature in history_features:
        kind = schema.field(f"history_{feature}").type
        is_list = pa.types.is_list(kind) or pa.types.is_large_list(kind)
        if not is_list or not (pa.types.is_integer(kind.value_type) or pa.types.is_floating(kind.value_type)):
            raise ValueError(f"{file}: column history_{feature} must hold lists of numbers, got {kind}")


def check_samples(samples: Samples, stored_lengths: Mapping[str, AnyArray], where: str, info: DatasetInfo) -> None:
    """Raise ValueError for the first rule that rows of a unit break; `where` names the unit."""
    for name, size in info.context_features.items():
        _check_ids(samples.scalars[name], size, f"{where}: context feature {name}", None)
    _check_lens(samples, stored_lengths, where)
    for part, lists in (("history", samples.history), ("candidate", samples.candidate)):
        _check_ids(lists["item_id"].values, info.num_items, f"{where}: {part}_item_id", lists["item_id"].offsets)
        _check_ids(lists["action"].values, 1 << len(info.actions), f"{where}: {part}_action", lists["action"].offsets)
        for name, column in lists.items():
            if column.values.dtype.kind == "f" and not np.isfinite(column.values).all():
                row = _row_of(~np.isfinite(column.values), column.offsets)
                raise ValueError(f"{where}, row {row}: {part}_{name} holds a value that is not a finite number")
    _check_times(samples, where, by_place=info.cut == "by_place")


def _check_ids(values: AnyArray, size: int, where: str, offsets: IntArray | None) -> None:
    """Ids lie in [0, size)."""
    if not len(values) or (values.min() >= 0 and values.max() < size):
        return
    bad = (values < 0) | (values >= size)
    row = _row_of(bad, offsets)
    raise ValueError(f"{where} of row {row} is {values[int(np.argmax(bad))]}, outside [0, {size}) of dataset.json")


def _check_lens(samples: Samples, stored: Mapping[str, AnyArray], where: str) -> None:
    """Lists of a row agree in length, with each other and with the length columns; no row is empty."""
    for part, lists in (("history", samples.history), ("candidate", samples.candidate)):
        expected = lists["item_id"].lens()
        for name, column in lists.items():
            if (column.lens() != expected).any():
                row = int(np.argmax(column.lens() != expected))
                raise ValueError(
                    f"{where}, row {row}: {part}_{name} holds {column.lens()[row]} values, "
                    f"but {part}_item_id holds {expected[row]}"
                )
    lens = (samples.history["item_id"].lens(), samples.candidate["item_id"].lens())
    for name, actual in zip(LENGTH_COLUMNS, lens, strict=True):
        if name in stored and (stored[name] != actual).any():
            row = int(np.argmax(stored[name] != actual))
            raise ValueError(f"{where}, row {row}: {name} says {stored[name][row]}, but the lists hold {actual[row]}")
    if (lens[0] + lens[1] == 0).any():
        row = int(np.argmax(lens[0] + lens[1] == 0))
        raise ValueError(f"{where}, row {row}: user {samples.scalars['user_id'][row]} has no events at all")


def _check_times(samples: Samples, where: str, *, by_place: bool) -> None:
    """Times do not fall within a row's history nor within its candidates; unknown ones (-1) come first.

    A history ends before the time of its first candidate; at that time at the latest, where data is cut by place.
    """
    history, candidate = samples.history["timestamp"], samples.candidate["timestamp"]
    for part, column in (("history", history), ("candidate", candidate)):
        values = column.values
        if len(values) and values.min() < UNKNOWN_TIME:
            row = _row_of(values < UNKNOWN_TIME, column.offsets)
            raise ValueError(f"{where}, row {row}: {part}_timestamp {values.min()} is negative; unknown is -1")
        falls = values[1:] < values[:-1]
        starts = column.offsets[1:-1]
        inner = starts[(starts > 0) & (starts < len(values))]
        falls[inner - 1] = False
        if falls.any():
            row = _row_of(np.append(False, falls), column.offsets)
            raise ValueError(f"{where}, row {row}: {part}_timestamp falls; events must be sorted, oldest first")
    both = (history.lens() > 0) & (candidate.lens() > 0)
    last = history.values[history.offsets[1:][both] - 1]
    first = candidate.values[candidate.offsets[:-1][both]]
    leaks = first < last if by_place else first <= last
    if leaks.any():
        row = int(np.flatnonzero(both)[np.argmax(leaks)])
        raise ValueError(
            f"{where}, row {row}: the history reaches the time of the first candidate, which leaks what came of it; "
            'end histories before that time (or write "cut": "by_place" into dataset.json of next-item data, in which '
            "equal times go by their place)"
        )


def _row_of(bad: AnyArray, offsets: IntArray | None) -> int:
    """The row of the first True."""
    place = int(np.argmax(bad))
    return place if offsets is None else int(np.searchsorted(offsets, place, side="right")) - 1
