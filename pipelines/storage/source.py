"""Sources of samples: the units that a split is read in, the lengths of their rows, and the rows themselves.

A unit is a row group of a Parquet file, or a block of generated samples.  Sources know nothing of order or ranks.
"""

import re
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256
from pathlib import PurePosixPath
from typing import Literal, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import fs

from pipelines.features import FIRST_PART, LENGTH_COLUMNS, USER_ID, Column, DatasetInfo, Part, SplitInfo
from pipelines.selection import Selection, stored_columns
from pipelines.storage.checked_parquet import open_checked, readable
from pipelines.storage.columns import IntArray, Lengths, ListColumn, Samples, Values
from pipelines.storage.dataset_json import open_filesystem
from pipelines.storage.items import read_items
from pipelines.storage.stored import list_values, parquet_files, row_values
from pipelines.storage.validate import BASE_LISTS, check_samples, check_schema

Split = Literal["train", "eval"]
LIST_PARTS: tuple[Part, ...] = ("event", "candidate")
PART_FOLDER = re.compile(r"part=\d{5,}")
"""Folders of the parts by which data sets are extended (`prepare event_log --extend`)."""
SPLITS_NEEDED = "a prepared data set has the folders train and eval"
FOOTER_THREADS = 16
"""Footers read at once: from an object store each takes a round trip."""


class Source(Protocol):
    """One split of one data set."""

    @property
    def info(self) -> DatasetInfo:
        """The data set's description."""

    @property
    def contents(self) -> str:
        """A digest of what is stored, as far as it can be told without reading all: another one means other data."""

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

    def items(self) -> Mapping[str, Values]:
        """The selected columns of items, by item id."""


class ParquetSource:
    """A prepared data set on a disk or an object store."""

    def __init__(
        self, path: str, info: DatasetInfo, split: Split, selection: Selection | None = None, part: str = FIRST_PART
    ) -> None:
        """One part of a split; `selection` None reads what every data set has."""
        self._info = info
        self._path = path
        self._selection = selection or Selection()
        self._columns = tuple(stored_columns(self._selection))
        self._filesystem, folder = open_filesystem(path)
        self._files = part_files(self._filesystem, folder, info, split, part)
        # Kept, because parsing a footer with many row groups takes as long as reading one of them.
        self._metadata: dict[str, pq.FileMetaData] = {}
        with ThreadPoolExecutor(FOOTER_THREADS, thread_name_prefix="footer") as pool:
            footers = list(pool.map(self._read_footer, self._files))
        self._metadata.update(zip(self._files, footers, strict=True))
        self._has_lengths = [set(LENGTH_COLUMNS) <= set(footer.schema.to_arrow_schema().names) for footer in footers]
        counts = [[footer.row_group(group).num_rows for group in range(footer.num_row_groups)] for footer in footers]
        self._unit_rows = np.array([rows for each in counts for rows in each], dtype=np.int64)
        self._unit_file = np.repeat(np.arange(len(self._files)), [len(each) for each in counts])
        self._first_unit = np.cumsum([0, *(len(each) for each in counts)])
        # If there are several parts, `dataset.json` tells only their sum.
        if len(info.parts) == 1:
            check_whole(f"{PurePosixPath(folder) / split}", info.splits.get(split), [self])

    @property
    def info(self) -> DatasetInfo:
        """The data set's description."""
        return self._info

    @property
    def contents(self) -> str:
        """Digest of the rows of each row group, and of where its last column begins and ends, behind all that is
        compressed in front of it."""
        found = sha256()
        for file in self._files:
            footer = self._metadata[file]
            for group in map(footer.row_group, range(footer.num_row_groups)):
                last = group.column(group.num_columns - 1)
                found.update(f"{group.num_rows} {last.data_page_offset} {last.total_compressed_size};".encode())
        return found.hexdigest()

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
                history, candidates = (
                    np.concatenate([np.diff(chunk.offsets.to_numpy()).astype(np.int64) for chunk in column.chunks])
                    for column in table.columns
                )
        return Lengths(history=history, candidates=candidates)

    def read(self, unit: int) -> Samples:
        """All rows of a row group, checked."""
        file = int(self._unit_file[unit])
        group = int(unit - self._first_unit[file])
        name = self._files[file]
        base = [Column(name=each, part=part, kind="id") for part in LIST_PARTS for each in BASE_LISTS]
        user = Column(name=USER_ID, part="sample", kind="id")
        columns = {column.stored: column for column in (user, *base, *self._columns)}
        lengths = LENGTH_COLUMNS if self._has_lengths[file] else ()
        with self._open(name) as parquet:
            table = _read(parquet, name, group, (*columns, *lengths))
        where = f"{name}, row group {group}"
        scalars: dict[str, Values] = {}
        lists: dict[str, dict[str, ListColumn]] = {"event": {}, "candidate": {}}
        for stored, column in columns.items():
            about = f"{where}: column {stored}"
            if column.part == "sample":
                scalars[column.name] = row_values(table[stored], column, about)
            elif column.part == "label":
                lists["candidate"][stored] = list_values(table[stored], column, about)
            else:
                lists[column.part][column.name] = list_values(table[stored], column, about)
        samples = Samples(scalars=scalars, history=lists["event"], candidate=lists["candidate"])
        stored_lengths = {column: table[column].to_numpy() for column in lengths}
        check_samples(samples, stored_lengths, where, self._info, self._columns)
        return samples

    def items(self) -> Mapping[str, Values]:
        """The selected columns of items, by item id."""
        names = {feature.column for feature in self._selection.features if feature.of_item}
        return read_items(self._path, self._info, [each for each in self._info.of("item") if each.name in names])

    @property
    def num_files(self) -> int:
        """Files that were found."""
        return len(self._files)

    def _read_footer(self, file: str) -> pq.FileMetaData:
        """A file's footer, its columns checked."""
        with self._open(file) as parquet:
            check_schema(parquet.schema_arrow, file, self._columns)
            return parquet.metadata

    def _open(self, file: str) -> pq.ParquetFile:
        """Open a file; raises ValueError, naming it, if it is not whole."""
        try:
            known = self._metadata.get(file)
            return open_checked(file, self._filesystem, known, pre_buffer=True)
        except (pa.ArrowInvalid, OSError) as error:
            raise ValueError(f"{file} is not a readable Parquet file, perhaps truncated: {error}") from error


def part_files(filesystem: fs.FileSystem, folder: str, info: DatasetInfo, split: Split, part: str) -> list[str]:
    """The Parquet files of a part of a split; raises ValueError if there is none."""

    def is_of_another(name: str) -> bool:
        return name not in (part, FIRST_PART) and (name in info.parts or _comes_later(name, info))

    return parquet_files(filesystem, str(PurePosixPath(folder) / split / part), SPLITS_NEEDED, without=is_of_another)


def _comes_later(folder: str, info: DatasetInfo) -> bool:
    """Whether a folder of a split is a delivery (`prepare event_log --extend`) that has come since `info` was read."""
    number = re.fullmatch(r"part=(\d{5})", folder)
    return number is not None and "state" in info.details and int(number[1]) >= len(info.parts)


def newest_part(path: str, info: DatasetInfo, split: Split) -> str:
    """The newest part that holds samples of this split.

    Raises:
        ValueError: none does, or files of the split are missing, of whichever part.
    """
    filesystem, folder = open_filesystem(path)
    where = str(PurePosixPath(folder) / split)
    files = parquet_files(filesystem, where, SPLITS_NEEDED, without=lambda name: _comes_later(name, info))
    told = info.splits.get(split)
    if told is not None and told.files not in (None, len(files)):
        raise ValueError(
            f"{where} holds {len(files)} file(s), dataset.json tells of {told.files}: it is not whole, or holds files "
            "of another data set; copy or prepare it again"
        )
    folders = {file[len(where) :].strip("/").split("/")[0] for file in files}
    return next((part for part in reversed(info.parts) if part in folders), info.parts[0])


class Counted(Source, Protocol):
    """A source whose files can be counted."""

    @property
    def num_files(self) -> int:
        """Files that were found."""


def check_whole(where: str, told: SplitInfo | None, parts: Sequence[Counted]) -> None:
    """Raise ValueError if files of a split are missing, or there are more than `dataset.json` tells of."""
    rows, files = sum(int(part.unit_rows.sum()) for part in parts), sum(part.num_files for part in parts)
    if not rows:
        raise ValueError(f"{where} holds no rows; prepare the data set again")
    if told is None or (told.samples == rows and told.files in (None, files)):
        return
    of_files = "" if told.files is None else f" in {told.files} file(s)"
    raise ValueError(
        f"{where} holds {rows} samples in {files} file(s), dataset.json tells of {told.samples}{of_files}: it is "
        "not whole, or holds files of another data set; copy or prepare it again"
    )


def _read(parquet: pq.ParquetFile, name: str, group: int | None, columns: Sequence[str]) -> pa.Table:
    """Some columns of a row group, or of the whole file; each column in one piece."""
    with readable(name):
        if group is None:
            # In pieces, because a whole file may hold more events than a list's offsets can count.
            return parquet.read(columns=list(columns), use_threads=False)
        return parquet.read_row_group(group, columns=list(columns), use_threads=False).combine_chunks()
