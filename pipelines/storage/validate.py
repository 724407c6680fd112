"""Checks of stored samples, made as they are read: one pass of whole-array operations, one clear line an error."""

from collections.abc import Iterable, Mapping

import numpy as np
import pyarrow as pa

from pipelines.counts import counts_of
from pipelines.features import ITEM_SPACE, LENGTH_COLUMNS, UNKNOWN_TIME, Column, DatasetInfo, Space
from pipelines.known_numbers import LARGEST
from pipelines.storage.columns import AnyArray, Bags, IntArray, ListColumn, Samples, Values

BASE_LISTS = ("item_id", "action", "timestamp")
"""Lists that every history and every group of candidates has."""

YEAR_1990, YEAR_2100 = 631_152_000, 4_102_444_800
"""Data that ends outside these counts time in another unit than seconds, or from another beginning than 1970."""
UNITS = {"milliseconds": 1e3, "microseconds": 1e6, "nanoseconds": 1e9, "minutes": 1 / 60, "hours": 1 / 3600}
UNITS |= {"days": 1 / 86_400}
"""How many of each unit a second has."""


def check_schema(schema: pa.Schema, file: str, columns: Iterable[Column]) -> None:
    """Raise ValueError if a needed column is missing or of another type."""
    expected = {"user_id": pa.int64()}
    for part in ("history", "candidate"):
        kinds = zip(BASE_LISTS, (pa.int64(), pa.int32(), pa.int64()), strict=True)
        expected |= {f"{part}_{name}": pa.list_(kind) for name, kind in kinds}
    columns = list(columns)
    for name in (*expected, *(column.stored for column in columns)):
        if name not in schema.names:
            raise ValueError(f"{file} lacks the column {name}")
    for name, kind in expected.items():
        found = schema.field(name).type
        same = found == kind or (_is_list(found) and _is_list(kind) and found.value_type == kind.value_type)
        if not same:
            raise ValueError(f"{file}: column {name} must have the type {_text(kind)}, got {found}")
    for name in set(LENGTH_COLUMNS) & set(schema.names):
        if not pa.types.is_integer(schema.field(name).type):
            raise ValueError(f"{file}: column {name} must hold whole numbers, got {schema.field(name).type}")
    for column in columns:
        found = schema.field(column.stored).type
        check_column(found, column, listed=column.part != "sample", where=f"{file}: column {column.stored}")


def check_column(found: pa.DataType, column: Column, *, listed: bool, where: str) -> None:
    """Raise ValueError if a column that is stored as `found` cannot hold what it should; `listed`: a list a row."""
    inner = found
    for _ in range(listed + (column.kind == "ids")):
        if not _is_list(inner):
            inner = None
            break
        inner = inner.value_type
    number = inner is not None and (pa.types.is_integer(inner) or pa.types.is_floating(inner))
    if column.kind == "number" and not number:
        raise ValueError(f"{where} must hold {'lists of ' * listed}numbers, got {found}")
    if column.kind != "number" and inner != pa.int64():
        depth = listed + (column.kind == "ids")
        raise ValueError(f"{where} must have the type {'list<' * depth}int64{'>' * depth}, got {found}")


def _is_list(kind: pa.DataType) -> bool:
    return bool(pa.types.is_list(kind) or pa.types.is_large_list(kind))


def _text(kind: pa.DataType) -> str:
    return f"list<{kind.value_type}>" if _is_list(kind) else str(kind)


def check_samples(
    samples: Samples, stored_lengths: Mapping[str, AnyArray], where: str, info: DatasetInfo, columns: Iterable[Column]
) -> None:
    """Raise ValueError for the first rule that rows of a unit break; `where` names the unit."""
    _check_lens(samples, stored_lengths, where)
    for part, lists in (("history", samples.history), ("candidate", samples.candidate)):
        items, actions = lists["item_id"], lists["action"]
        check_values(items.values, info.spaces[ITEM_SPACE], f"{where}: column {part}_item_id", items.offsets)
        check_ids(actions.array, 1 << len(info.actions), f"{where}: column {part}_action", actions.offsets)
    for column in columns:
        space = info.spaces.get(column.space or "")
        if column.part == "sample":
            check_values(samples.scalars[column.name], space, f"{where}: column {column.stored}", None)
            continue
        lists = samples.history if column.part == "event" else samples.candidate
        list_ = lists[column.stored if column.part == "label" else column.name]
        check_values(list_.values, space, f"{where}: column {column.stored}", list_.offsets)
        if column.part == "label" and column.name in (info.weight, info.keep_rate):
            about = f"{where}: column {column.stored}"
            _check_weights(list_, about, is_keep_rate=column.name == info.keep_rate)
    _check_counts(samples, where, info)
    _check_times(samples, where, by_place=info.cut == "by_place")
    if info.clock == "unix":
        _check_unit_of_time(samples, where)


def check_values(values: Values, space: Space | None, where: str, offsets: IntArray | None) -> None:
    """Ids lie in their space, where that is bounded; numbers are finite or missing.

    `offsets` are the rows' where values are lists.
    """
    if space is not None and space.unbounded:
        return
    if isinstance(values, Bags):
        assert space is not None
        rows = values.offsets if offsets is None else values.offsets[offsets]
        check_ids(values.values, space.rows, where, rows)
    elif space is not None:
        check_ids(values, space.rows, where, offsets)
    elif values.dtype.kind == "f" and (np.abs(values) > LARGEST).any():
        row = _row_of(np.abs(values) > LARGEST, offsets)
        raise ValueError(
            f"{where} of row {row} is infinite or beyond {LARGEST:.4g}, the end of 32 bits; a missing number is NaN"
        )


def check_ids(values: AnyArray, size: int, where: str, offsets: IntArray | None) -> None:
    """Ids lie in [0, size)."""
    if not len(values) or (values.min() >= 0 and values.max() < size):
        return
    bad = (values < 0) | (values >= size)
    row = _row_of(bad, offsets)
    raise ValueError(f"{where} of row {row} is {values[int(np.argmax(bad))]}, outside [0, {size}) of dataset.json")


def _check_weights(column: ListColumn, where: str, *, is_keep_rate: bool) -> None:
    """Weights are at least 0, keep rates above 0 and at most 1; none is missing."""
    values = column.array
    good = (values > 0) & (values <= 1) if is_keep_rate else values >= 0
    if not good.all():
        row = _row_of(~good, column.offsets)
        rule = "a keep rate is above 0 and at most 1" if is_keep_rate else "a weight is at least 0"
        raise ValueError(f"{where} of row {row} is {values[int(np.argmin(good))]}; {rule}, and never missing")


def _check_counts(samples: Samples, where: str, info: DatasetInfo) -> None:
    """No count that was read is negative, and no action was taken more often than there were events."""
    for each in counts_of(info):
        if not samples.candidate.keys() >= set(each.columns):
            continue
        seen = samples.candidate[each.seen]
        for name in each.taken:
            taken = samples.candidate[name].array
            bad = (taken < 0) | (taken > seen.array)
            if bad.any():
                row, place = _row_of(bad, seen.offsets), int(np.argmax(bad))
                raise ValueError(
                    f"{where}, row {row}: of {seen.array[place]} events in candidate_{each.seen}, {taken[place]} are "
                    f"counted in candidate_{name}, which must lie between 0 and those"
                )


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
        raise ValueError(f"{where}, row {row}: user {np.asarray(samples.scalars['user_id'])[row]} has no events at all")


def _check_times(samples: Samples, where: str, *, by_place: bool) -> None:
    """Times do not fall within a row's history nor within its candidates; unknown ones (-1) come first.

    A history ends before the time of its first candidate; at that time at the latest, where data is cut by place.
    """
    history, candidate = samples.history["timestamp"], samples.candidate["timestamp"]
    for part, column in (("history", history), ("candidate", candidate)):
        values = column.array
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
    last = history.array[history.offsets[1:][both] - 1]
    first = candidate.array[candidate.offsets[:-1][both]]
    leaks = first < last if by_place else first <= last
    if leaks.any():
        row = int(np.flatnonzero(both)[np.argmax(leaks)])
        raise ValueError(
            f"{where}, row {row}: the history reaches the time of the first candidate, which leaks what came of it; "
            'end histories before that time (or write "cut": "by_place" into dataset.json of next-item data, in which '
            "equal times go by their place)"
        )


def _check_unit_of_time(samples: Samples, where: str) -> None:
    """Times in seconds since 1970 end after 1990 and before 2100; else they count something else."""
    columns = (part["timestamp"].array for part in (samples.history, samples.candidate))
    latest = max((int(values.max()) for values in columns if len(values)), default=UNKNOWN_TIME)
    if latest == UNKNOWN_TIME or YEAR_1990 <= latest < YEAR_2100:
        return
    likely = [unit for unit, per_second in UNITS.items() if YEAR_1990 <= latest / per_second < YEAR_2100]
    guess = f"are they {' or '.join(likely)}?" if likely else "what do they count?"
    raise ValueError(
        f"{where}: the latest timestamp is {latest}, not in the years 1990 to 2100 as seconds since 1970: {guess} "
        '(data whose times count from another beginning says "clock": "relative" in dataset.json)'
    )


def _row_of(bad: AnyArray, offsets: IntArray | None) -> int:
    """The row of the first True."""
    place = int(np.argmax(bad))
    return place if offsets is None else int(np.searchsorted(offsets, place, side="right")) - 1
