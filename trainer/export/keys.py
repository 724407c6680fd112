"""What tells the rows of a table apart, from the data set that the run was trained on, part by part."""

from collections.abc import Iterator

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.storage.dataset_json import read_dataset_info
from pipelines.storage.keys import open_keys
from pipelines.storage.vocabulary import earlier_digests, vocabularies
from trainer.export.description import Identity


class Identities:
    """The keys behind the rows of each table, or their numbers where ids are hashes or keys themselves."""

    def __init__(self, path: str) -> None:
        """Raises ValueError if there is no data set at `path`."""
        self._path, self._info = path, read_dataset_info(path)

    def check(self, table: str, known: str | None) -> None:
        """Refuse keys that are not those by which a run numbered the table's rows; `known`: their digest then.

        Raises:
            ValueError: the data set has no such space, or its ids mean something else.
        """
        if table not in self._info.spaces:
            raise ValueError(f"{self._path} has no space {table!r}: name the data that the run was trained on, --data")
        digest = vocabularies(self._info).get(table)
        if known not in (digest, *earlier_digests(self._info, table)):
            raise ValueError(
                f"ids of table {table!r} mean something else in {self._path} than they did when the run was trained: "
                "name the data that it was trained on, --data"
            )

    def kind(self, table: str) -> Identity:
        """Which of the two it is."""
        return "row" if self._info.spaces[table].keys is None else "key"

    def first_row(self, table: str) -> int:
        """Number of the first row that has one: row 0 of a table with keys is that of ids without a key."""
        return int(self.kind(table) == "key")

    def type(self, table: str) -> pa.DataType:
        """Type of a table's keys, or of the numbers of its rows."""
        return pa.int64() if self.kind(table) == "row" else self._open(table).schema_arrow.field(0).type

    def parts(self, table: str, *, rows: int, part_rows: int) -> Iterator[tuple[int, pa.Array]]:
        """(number of the first row, keys or numbers) of the rows below `rows`, in their order, from `first_row` on.

        Raises:
            ValueError: the file of keys is not in that order.
        """
        if self.kind(table) == "row":
            for first in range(0, rows, part_rows):
                yield first, pa.array(np.arange(first, min(first + part_rows, rows)))
            return
        expected = 1
        for batch in self._open(table).iter_batches(batch_size=part_rows):
            keys, ids = batch.columns[:2]
            if not np.array_equal(ids.to_numpy(), np.arange(expected, expected + len(ids))):
                raise ValueError(
                    f"{self._path}/{self._info.spaces[table].keys} does not number its keys 1, 2, 3 and so on: prepare "
                    "the data again"
                )
            if expected < rows:
                yield expected, keys.slice(0, rows - expected)
            expected += len(ids)

    def _open(self, table: str) -> pq.ParquetFile:
        return open_keys(self._path, str(self._info.spaces[table].keys))
