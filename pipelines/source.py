"""Sources of samples: the units that a split is read in, the lengths of their rows, and the rows themselves.

A unit is a row group of a Parquet file, or a block of generated samples.  Sources know nothing of order or ranks.
"""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import PurePosixPath
from typing import Literal, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import fs

from pipelines.columns import IntArray, Lengths, ListColumn, Samples
from pipelines.dataset_json import open_filesystem
from pipelines.features import LENGTH_COLUMNS, DatasetInfo
from pipelines.validate import check_samples, check_schema

Split = Literal["train", "eval"]
BASE_LISTS = ("item_id", "action", "timestamp")
FOOTER_THREADS = 16
"""Footers read at once: from an object store each takes a round trip."""


class Source(Protocol):
    """One split of one data set."""

    @property
    def info(self) -> DatasetInfo:
        """The data set's description."""

    @property
    def unit_rows(self) -> IntArray:
        """[units] rows of each unit, in stored order."""

    @property
    def unit_file(self) -> IntArray:
        """[units] which file each unit belongs to, not falling."""

    def file_lengths(self, file: int) -> Lengths:
        """Lengths of all rows of a file."""

    def read(self, unit: int) -> Samples:
        """All rows of a unit."""


class ParquetSource:
    """A prepared data set on a disk or an object store."""

    def __init__(self, path: str, info: DatasetInfo, split: Split, history_features: Sequence[str] = ()) -> None:
        unknown = sorted(set(history_features) - set(info.history_features))
        if unknown:
            have = ", ".join(info.history_features) or "none"
            raise ValueError(f"data.history_features names {', '.join(unknown)}, but {path} has {have}")
        self._info = info
        self._history = (*BASE_LISTS, *history_features)
        self._filesystem, folder = open_filesystem(path)
        self._files = _parquet_files(self._filesystem, str(PurePosixPath(folder) / split))
        # Kept, because parsing a footer with many row groups takes as long as reading one of them.
        self._metadata: dict[str, pq.FileMetaData] = {}
        with ThreadPoolExecutor(FOOTER_THREADS, thread_name_prefix="footer") as pool:
            footers = list(pool.map(lambda file: self._read_footer(file, history_features), self._files))
        self._metadata.update(zip(self._files, footers, strict=True))
        self._has_lengths = [set(LENGTH_COLUMNS) <= set(footer.schema.to_arrow_schema().names) for footer in footers]
        counts = [[footer.row_group(group).num_rows for group in range(footer.num_row_groups)] for footer in footers]
        self._unit_rows = np.array([rows for each in counts for rows in each], dtype=np.int64)
        self._unit_file = np.repeat(np.arange(len(self._files)), [len(each) for each in counts])
        self._first_unit = np.cumsum([0, *(len(each) for each in counts)])
        if not self._unit_rows.sum():
            raise ValueError(f"{PurePosixPath(folder) / split} holds no rows; prepare the data set again")

    @property
    def info(self) -> DatasetInfo:
        """The data set's description."""
        return self._info

    @property
    def unit_rows(self) -> IntArray:
        """[units] rows of each row group, files in order of their names."""
        return self._unit_rows

    @property
    def unit_file(self) -> IntArray:
        """[units] which file each row group belongs to."""
        return self._unit_file

    def file_lengths(self, file: int) -> Lengths:
        """Lengths of all rows of a file: from its length columns, else by reading the smallest lists."""
        name = self._files[file]
        with self._open(name) as parquet:
            if self._has_lengths[file]:
                table = _read(parquet, name, None, LENGTH_COLUMNS)
                history, candidates = (table[column].to_numpy().astype(np.int64) for column in LENGTH_COLUMNS)
            else:
                table = _read(parquet, name, None, ("history_action", "candidate_action"))
                history, candidates = (_list_column(column).lens() for column in table.columns)
        return Lengths(history=history, candidates=candidates)

    def read(self, unit: int) -> Samples:
        """All rows of a row group, checked."""
        file = int(self._unit_file[unit])
        group = int(unit - self._first_unit[file])
        name = self._files[file]
        scalars = tuple(dict.fromkeys(("user_id", *self._info.context_features)))
        lists = [f"history_{column}" for column in self._history] + [f"candidate_{column}" for column in BASE_LISTS]
        lengths = LENGTH_COLUMNS if self._has_lengths[file] else ()
        with self._open(name) as parquet:
            table = _read(parquet, name, group, (*scalars, *lists, *lengths))
        where = f"{name}, row group {group}"
        nulls = [column for column in table.column_names if table[column].null_count]
        if nulls:
            raise ValueError(f"{where}: column(s) {', '.join(nulls)} hold missing values; none may be null")
        samples = Samples(
            scalars={column: table[column].to_numpy().astype(np.int64, copy=False) for column in scalars},
            history={column: _list_column(table[f"history_{column}"], where) for column in self._history},
            candidate={column: _list_column(table[f"candidate_{column}"], where) for column in BASE_LISTS},
        )
        stored = {column: table[column].to_numpy() for column in lengths}
        check_samples(samples, stored, where, self._info)
        return samples

    def _read_footer(self, file: str, history_features: Sequence[str]) -> pq.FileMetaData:
        """A file's footer, its columns checked."""
        with self._open(file) as parquet:
            check_schema(parquet.schema_arrow, file, self._info, history_features)
            return parquet.metadata

    def _open(self, file: str) -> pq.ParquetFile:
        """Open a file; raises ValueError, naming it, if it is not whole."""
        try:
            known = self._metadata.get(file)
            return pq.ParquetFile(file, filesystem=self._filesystem, metadata=known, pre_buffer=True)
        except (pa.ArrowInvalid, OSError) as error:
            raise ValueError(f"{file} is not a readable Parquet file, perhaps truncated: {error}") from error


def _read(parquet: pq.ParquetFile, name: str, group: int | None, columns: Sequence[str]) -> pa.Table:
    """Some columns of a row group, or of the whole file; each column in one piece."""
    try:
        if group is None:
            return parquet.read(columns=list(columns), use_threads=False).combine_chunks()
        return parquet.read_row_group(group, columns=list(columns), use_threads=False).combine_chunks()
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{name} cannot be read, perhaps truncated or damaged: {error}") from error


def _list_column(column: pa.ChunkedArray, where: str = "") -> ListColumn:
    """Offsets and values of a list column, without a copy; raises ValueError if a value is missing."""
    array = column.chunk(0) if column.num_chunks else pa.array([], column.type)
    offsets = array.offsets.to_numpy().astype(np.int64)
    values = array.values
    if values.null_count:
        raise ValueError(f"{where}: a list holds missing values; none may be null")
    return ListColumn(values=values.to_numpy(zero_copy_only=False), offsets=offsets)


def _parquet_files(filesystem: fs.FileSystem, folder: str) -> list[str]:
    """Parquet files directly in a folder, by name; raises ValueError if there is none."""
    if filesystem.get_file_info(folder).type != fs.FileType.Directory:
        raise ValueError(f"{folder} does not exist: a prepared data set has the folders train and eval")
    found = filesystem.get_file_info(fs.FileSelector(folder))
    names = sorted(info.path for info in found if info.path.endswith(".parquet") and info.type == fs.FileType.File)
    if not names:
        raise ValueError(f"{folder} holds no .parquet file; prepare the data set again")
    return names
