"""The columns of items: read once, joined to events and candidates by the item's id as a batch is made."""

from collections.abc import Mapping, Sequence
from pathlib import PurePosixPath

import numpy as np
from numpy.typing import DTypeLike

from pipelines.features import ITEM_ID, ITEM_SPACE, UNKNOWN_ID, Column, DatasetInfo, Space
from pipelines.storage.checked_parquet import open_checked, readable
from pipelines.storage.columns import AnyArray, Bags, IntArray, Values, join_values
from pipelines.storage.dataset_json import open_filesystem, read_dataset_info
from pipelines.storage.stored import parquet_files, row_values
from pipelines.storage.validate import check_column, check_values

ITEMS_FOLDER = "items"
"""Folder of the items' columns within a data set."""


def read_items(path: str, info: DatasetInfo, columns: Sequence[Column]) -> Mapping[str, Values]:
    """Each of these columns by item id, [items] values; items without a row have what is missing: 0, no ids, NaN.

    Memory: 4 bytes an item and column of ids, 4 a number, and 4 more an id of many.

    Raises:
        ValueError: the folder `items` or a column is missing, a value is of another type or outside its space, or an
            item has two rows.
    """
    if not columns:
        return {}
    filesystem, folder = open_filesystem(path)
    where = str(PurePosixPath(folder) / ITEMS_FOLDER)
    files = parquet_files(filesystem, where, f"{info.name} has the item columns {', '.join(c.name for c in columns)}")
    keys = Column(name=ITEM_ID, part="item", kind="id", space=ITEM_SPACE)
    # Joined as arrays, because files may differ in what is alike here: integers beside floats, offsets of two widths.
    read: dict[str, list[Values]] = {each.name: [] for each in (keys, *columns)}
    for file in files:
        with readable(file), open_checked(file, filesystem) as parquet:
            for column in (keys, *columns):
                if column.name not in parquet.schema_arrow.names:
                    raise ValueError(f"{file} lacks the column {column.name}")
                found = parquet.schema_arrow.field(column.name).type
                check_column(found, column, listed=False, where=f"{file}: column {column.name}")
            table = parquet.read(columns=list(read)).combine_chunks()
        for column in (keys, *columns):
            read[column.name].append(row_values(table[column.name], column, f"{file}: column {column.name}"))
    joined = {name: join_values(parts) for name, parts in read.items()}
    item_id = joined[ITEM_ID]
    assert not isinstance(item_id, Bags)
    grown = len(read_dataset_info(path).parts) > len(info.parts)
    if grown:
        # Of a delivery that has come since `info` was read; its items, and its ids, are unknown to who reads now.
        known = np.flatnonzero(item_id < info.num_items)
        joined = {name: values[known] for name, values in joined.items()}
        item_id = item_id[known]
    if len(item_id) and (item_id.min() < 0 or item_id.max() >= info.num_items):
        raise ValueError(f"{where}: item_id {item_id.min()} to {item_id.max()}, outside [0, {info.num_items})")
    if len(np.unique(item_id)) != len(item_id):
        raise ValueError(f"{where}: an item_id stands in two rows; an item has one")
    by_item = {}
    for column in columns:
        values = joined[column.name]
        if grown and column.space is not None:
            values = _as_known(values, info.spaces[column.space])
        check_values(values, info.spaces.get(column.space or ""), f"{where}: {column.name}", None)
        by_item[column.name] = _by_item(values, item_id, info.num_items, _kept_as(column, info))
    return by_item


def _kept_as(column: Column, info: DatasetInfo) -> DTypeLike:
    """The type that a column's values are kept as."""
    if column.space is None:
        return np.float32
    return np.int64 if info.spaces[column.space].unbounded else np.int32


def _as_known(values: Values, space: Space) -> Values:
    """The values with the unknown id in the place of those that a space has not given."""
    if space.unbounded:
        return values
    if isinstance(values, Bags):
        return Bags(np.where(values.values < space.used, values.values, UNKNOWN_ID), values.offsets)
    return np.where(values < space.used, values, UNKNOWN_ID)


def _by_item(values: Values, item_id: IntArray, num_items: int, kind: DTypeLike) -> Values:
    """The values in order of item ids, kept as `kind`; where there is none, NaN for numbers and 0 for ids."""
    if isinstance(values, Bags):
        lens = np.zeros(num_items, dtype=np.int64)
        lens[item_id] = values.lens()
        return Bags(values[np.argsort(item_id)].values.astype(kind), np.concatenate(([0], np.cumsum(lens))))
    kept: AnyArray = np.full(num_items, np.nan if np.dtype(kind).kind == "f" else UNKNOWN_ID, dtype=kind)
    kept[item_id] = values
    return kept
