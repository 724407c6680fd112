"""Prepared samples against the log that they were made of, column by column, whatever numbers ids have."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from benchmarks.made_up.shop import ACTIONS, Day, newest
from pipelines.features import Column, DatasetInfo
from pipelines.storage.dataset_json import read_dataset_info

Array = NDArray[Any]
BITS = {name: bit for bit, name in enumerate(ACTIONS)}


def check_against_log(folder: Path, days: Sequence[Day], max_history: int) -> None:
    """Every event of the log is a candidate once; histories hold the newest events before their candidates' second.

    Raises:
        ValueError: a column that differs from the log's, named.
    """
    info = read_dataset_info(str(folder))
    log = pa.concat_tables([day.log for day in days])
    log = log.take(np.lexsort((log["at"].to_numpy(), _text(log["customer"]))))
    samples = _read_samples(folder)
    keys = {name: read_keys(folder, info, name) for name in info.spaces}
    users, candidates = keys["user"](samples["user_id"].to_numpy()), _lengths(samples["candidate_item_id"])
    times = _flat(samples["candidate_timestamp"])
    order = np.lexsort((times, np.repeat(users, candidates)))
    _check_columns(info, "candidate", samples, log, keys, ours=order, logs=np.arange(log.num_rows))
    # A history is a stretch of the log in order of users and times.
    first = times[np.cumsum(candidates) - candidates]
    end = _places(log, users, first)
    begin = np.maximum(_places(log, users, np.zeros_like(first)), end - max_history)
    lengths = end - begin
    if not np.array_equal(lengths, _lengths(samples["history_item_id"])):
        raise ValueError(f"{folder}: histories are of other lengths than the log says")
    within = np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    logs = np.repeat(begin, lengths) + within
    _check_columns(info, "event", samples, log, keys, ours=np.arange(len(logs)), logs=logs)
    _check_attributes(folder, info, days, keys)


def differing_columns(one: Path, other: Path) -> list[str]:
    """Columns of candidates in which two preparations of one log differ; none if they are equal but for their ids."""
    found = []
    for folder in (one, other):
        info = read_dataset_info(str(folder))
        names = {column.stored: column for column in info.of("candidate")}
        wanted = ["user_id", "candidate_timestamp", "candidate_action", *names]
        samples = _read_samples(folder, wanted)
        users = np.repeat(read_keys(folder, info, "user")(samples["user_id"].to_numpy()), _lengths(samples[wanted[1]]))
        order = np.lexsort((_flat(samples["candidate_timestamp"]), users))
        columns = {name: _flat(samples[name])[order] for name in wanted[1:]}
        for name, column in names.items():
            if column.space is not None:
                columns[name] = read_keys(folder, info, column.space)(columns[name])
        found.append({"user_id": users[order], **columns})
    return [name for name in found[0] if not _same(found[0][name], found[1][name])]


def read_keys(folder: Path, info: DatasetInfo, name: str) -> Callable[[Array], Array]:
    """From ids of a space to its keys as text, empty for id 0; ids of a hash stay."""
    space = info.spaces[name]
    if space.keys is None:
        return lambda ids: ids
    stored = pq.read_table(folder / space.keys)
    texts = _text(stored[f"{name}_key"])
    keys = np.full(space.rows, "", dtype=texts.dtype)
    keys[stored[f"{name}_id"].to_numpy()] = texts
    return lambda ids: keys[ids]


def _check_columns(
    info: DatasetInfo,
    part: Any,
    samples: pa.Table,
    log: pa.Table,
    keys: Mapping[str, Callable[[Array], Array]],
    *,
    ours: Array,
    logs: Array,
) -> None:
    """The values of events or candidates, in the order `ours`, are those of the log's rows `logs`."""
    prefix = {"event": "history_", "candidate": "candidate_"}[part]
    action = sum(log[name].to_numpy().astype(np.int64) << bit for name, bit in BITS.items())
    pairs = {
        f"{prefix}item_id": (keys["item"](_flat(samples[f"{prefix}item_id"])), _text(log["sku"])),
        f"{prefix}timestamp": (_flat(samples[f"{prefix}timestamp"]), log["at"].to_numpy()),
        f"{prefix}action": (_flat(samples[f"{prefix}action"]), action),
    }
    for column in info.of(part):
        # Counts are compared between preparations, hashes only within them.
        if column.name in log.column_names and (column.space is None or info.spaces[column.space].keys):
            pairs[column.stored] = (_values(samples[column.stored], column, keys), _log_values(log, column))
    for name, (found, expected) in pairs.items():
        if len(found) != len(ours) or not _same(found[ours], expected[logs]):
            raise ValueError(f"{info.source}: {name} differs from the log")


def _check_attributes(
    folder: Path, info: DatasetInfo, days: Sequence[Day], keys: Mapping[str, Callable[[Array], Array]]
) -> None:
    """Items in the data have their newest attributes."""
    stored = pq.read_table(folder / "items")
    told = newest(day.items for day in days)
    place = {key: row for row, key in enumerate(_text(told["sku"]))}
    items = keys["item"](stored["item_id"].to_numpy())
    known = np.array([item in place for item in items])
    rows = np.array([place[item] for item in items[known]])
    for column in info.of("item"):
        expected = told[column.name].take(rows).to_pylist()
        found = stored[column.name].filter(known).to_pylist()
        if column.space is not None:
            name = keys[column.space]
            found = [name(np.array(each, dtype=np.int64)) for each in found]
            found = [each.tolist() if column.kind == "ids" else str(each) for each in found]
        if found != expected:
            raise ValueError(f"{folder}: the items' {column.name} is not the newest")


def _read_samples(folder: Path, columns: list[str] | None = None) -> pa.Table:
    """Training and evaluation samples of all parts."""
    return pa.concat_tables(
        [pq.read_table(folder / split, columns=columns, partitioning=None) for split in ("train", "eval")]
    )


def _places(log: pa.Table, users: Array, times: Array) -> Array:
    """Where each user's first event at or after each time stands, or would stand."""
    names, number = np.unique(_text(log["customer"]), return_inverse=True)
    stamps = number * (1 << 33) + log["at"].to_numpy()
    return np.asarray(np.searchsorted(stamps, np.searchsorted(names, users) * (1 << 33) + times))


def _values(lists: pa.ChunkedArray, column: Column, keys: Mapping[str, Callable[[Array], Array]]) -> Array:
    flat = _flat(lists)
    return flat if column.space is None else keys[column.space](flat)


def _log_values(log: pa.Table, column: Column) -> Array:
    if column.space is None:
        return np.asarray(log[column.name].to_numpy(zero_copy_only=False), dtype=np.float64)
    return _text(log[column.name])


def _text(values: pa.ChunkedArray) -> Array:
    """Keys as text, empty where missing."""
    return np.asarray(values.cast(pa.string()).fill_null("").to_numpy(zero_copy_only=False), dtype=str)


def _flat(lists: pa.ChunkedArray) -> Array:
    return np.asarray(lists.combine_chunks().flatten().to_numpy(zero_copy_only=False))


def _lengths(lists: pa.ChunkedArray) -> Array:
    return np.asarray(pa.compute.list_value_length(lists).to_numpy())


def _same(one: Array, other: Array) -> bool:
    return bool(np.array_equal(one, other, equal_nan=one.dtype.kind == "f"))
