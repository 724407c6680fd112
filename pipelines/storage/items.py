"""The columns of items: read once, joined to events and candidates by the item's id as a batch is made."""

from collections.abc import Mapping, Sequence
from pathlib import PurePosixPath

import numpy as np
import pyarrow as pa
from numpy.typing import DTypeLike

from pipelines.features import ITEM_ID, UNKNOWN_ID, Column, DatasetInfo, Space
from pipelines.storage.checked_parquet import open_checked, readable
from pipelines.storage.columns import AnyArray, Bags, IntArray, Values
from pipelines.storage.dataset_json import open_filesystem, read_dataset_info
from pipelines.storage.stored import parquet_files, row_values
from pipelines.storage.validate import check_column, check_values

ITEMS_FOLDER = "items"
"""Folder of the items' columns within a data set."""


def read_items(path: str, info: DatasetInfo, columns: Sequence[Column]) -> Mapping[str, Values]:
    """Each of these columns by item id, [items] values; items without a row have what is missing: 0, no ids, NaN.

    Memory: 4 bytes an item and column of ids, 4 a number, and 4 more an id of many.

    Raises:
        ValueError: the folder `items` or a column is missing, an id lies outside its space, or an item has two rows.
    """
    if not columns:
        return {}
    filesystem, folder = open_filesystem(path)
    where = str(PurePosixPath(folder) / ITEMS_FOLDER)
    files = parquet_files(filesystem, where, f"{info.name} has the item columns {', '.join(c.name for c in columns)}")
    tables = []
    for file in files:
        with readable(file), open_checked(file, filesystem) as parquet:
            for name, column in ((ITEM_ID, None), *((each.name, each) for each in columns)):
                if name not in parquet.schema_arrow.names:
                    raise ValueError(f"{file} lacks the column {name}")
                if column is not None:
                    check_column(parquet.schema_arrow.field(name).type, column, listed=False, where=f"{file}: {name}")
            tables.append(parquet.read(columns=[ITEM_ID, *(each.name for each in columns)]))
    table = pa.concat_tables(tables).combine_chunks()
    item_id = table[ITEM_ID].to_numpy().astype(np.int64)
    grown = len(read_dataset_info(path).parts) > len(info.parts)
    if grown:
        # Of a delivery that has come since `info` was read; its items, and its ids, are unknown to who reads now.
        known = item_id < info.num_items
        table, item_id = table.filter(pa.array(known)), item_id[known]
    if len(item_id) and (item_id.min() < 0 or item_id.max() >= info.num_items):
        raise ValueError(f"{where}: item_id {item_id.min()} to {item_id.max()}, outside [0, {info.num_items})")
    if len(np.unique(item_id)) != len(item_id):
        raise ValueError(f"{where}: an item_id stands in two rows; an item has one")
    found = {}
    for column in columns:
        values = row_values(table[column.name], column, f"{where}: {column.name}")
        if grown and column.space is not None:
            values = _as_known(values, info.spaces[column.space])
        check_values(values, info.spaces.get(column.space or ""), f"{where}: {column.name}", None)
        unbounded = column.space is not None and info.spaces[column.space].unbounded
        found[column.name] = _by_item(values, item_id, info.num_items, np.int64 if unbounded else np.int32)
    return found


def _as_known(values: Values, space: Space) -> Values:
    """The values with the unknown id in the place of those that a space has not given."""
    if space.unbounded:
        return values
    if isinstance(values, Bags):
        return Bags(np.where(values.values < space.used, values.values, UNKNOWN_ID), values.offsets)
    return np.where(values < space.used, values, UNKNOWN_ID)


def _by_item(values: Values, item_id: IntArray, num_items: int, id_type: DTypeLike) -> Values:
    """The values in order of item ids; ids are kept as `id_type`."""
    if isinstance(values, Bags):
        lens = np.zeros(num_items, dtype=np.int64)
        lens[item_id] = values.lens()
        return Bags(values[np.argsort(item_id)].values.astype(id_type), np.concatenate(([0], np.cumsum(lens))))
    if values.dtype.kind == "f":
        numbers: AnyArray = np.full(num_items, np.nan, dtype=np.float32)
        numbers[item_id] = values
        return numbers
    ids: AnyArray = np.zeros(num_items, dtype=id_type)
    ids[item_id] = values
    return ids
