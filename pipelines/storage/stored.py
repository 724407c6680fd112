"""Parquet files and columns of the prepared format as flat arrays, without copies where there is no need for one."""

from collections.abc import Callable, Sequence

import numpy as np
import pyarrow as pa
from pyarrow import fs

from pipelines.features import Column
from pipelines.storage.columns import AnyArray, Bags, ListColumn, Values


def parquet_files(
    filesystem: fs.FileSystem, folder: str, needed: str, *, without: Callable[[str], bool] = lambda name: False
) -> list[str]:
    """Parquet files anywhere in a folder, by name; without any, raises ValueError that says what they are for.

    Names that begin with `_` or `.` are not data but other systems' own; folders `key=value` are.  `without` tells
    names in it that belong to something else.
    """
    if filesystem.get_file_info(folder).type != fs.FileType.Directory:
        raise ValueError(f"{folder} does not exist: {needed}")
    found = filesystem.get_file_info(fs.FileSelector(folder, recursive=True))
    names = sorted(
        info.path
        for info in found
        if info.path.endswith(".parquet")
        and info.type == fs.FileType.File
        and _is_data(parts := info.path[len(folder) :].strip("/").split("/"))
        and not without(parts[0])
    )
    if not names:
        raise ValueError(f"{folder} holds no .parquet file; prepare the data set again")
    return names


def _is_data(parts: Sequence[str]) -> bool:
    """Whether the folders and the name of a file, from the data's folder on, are those of data."""
    *folders, name = parts
    hidden = any(part.startswith(".") or (part.startswith("_") and "=" not in part) for part in folders)
    return not hidden and not name.startswith(("_", "."))


def row_values(column: pa.ChunkedArray, about: Column, where: str) -> Values:
    """The values of a column with one a row."""
    array = _whole(column)
    if about.kind == "ids":
        return _bags(array, where)
    return number_array(array) if about.kind == "number" else _ids(array, where)


def list_values(column: pa.ChunkedArray, about: Column, where: str) -> ListColumn:
    """The values of a column with a list a row."""
    array = _whole(column)
    _refuse_nulls(array, where)
    offsets = array.offsets.to_numpy().astype(np.int64)
    values: Values
    if about.kind == "ids":
        values = _bags(array.values, where)
    else:
        values = number_array(array.values) if about.kind == "number" else _ids(array.values, where)
    return ListColumn(values=values, offsets=offsets)


def number_array(array: pa.Array) -> AnyArray:
    """Numbers; a missing one is NaN."""
    values: AnyArray = array.to_numpy(zero_copy_only=False)
    # In 16 bits, the check for numbers beyond 32 bits would compare with infinity.
    return values.astype(np.float32) if values.dtype == np.float16 else values


def _ids(array: pa.Array, where: str) -> AnyArray:
    _refuse_nulls(array, where)
    values: AnyArray = array.to_numpy(zero_copy_only=False)
    return values


def _bags(array: pa.Array, where: str) -> Bags:
    _refuse_nulls(array, where)
    _refuse_nulls(array.values, where)
    return Bags(array.values.to_numpy(zero_copy_only=False), array.offsets.to_numpy().astype(np.int64))


def _refuse_nulls(array: pa.Array, where: str) -> None:
    if array.null_count:
        raise ValueError(f"{where} holds missing values; only numbers may be null")


def _whole(column: pa.ChunkedArray) -> pa.Array:
    return column.chunk(0) if column.num_chunks else pa.array([], column.type)
