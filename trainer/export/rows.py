"""The rows of an exported table, edited or not: which row of the table each line is, and its values.

Lines are matched with rows by DuckDB, which spills to disk: neither keys nor values have to fit into memory.
"""

from collections.abc import Iterator
from pathlib import Path

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from torch import Tensor

from pipelines.prepare.engine import file_literal
from pipelines.storage.checked_parquet import open_checked, readable
from trainer.export.description import TRAINED, VALUES, ExportedTable, value_type
from trainer.export.keys import Identities

PART_ROWS = 1 << 16
"""Lines that are read at a time."""


class TableRows:
    """A Parquet file of a table's rows."""

    def __init__(self, file: Path, name: str, table: ExportedTable) -> None:
        self._file, self._name, self._table = file, name, table

    def check_columns(self, identities: Identities) -> None:
        """Raise ValueError unless the file has the columns that it needs and no other, of the right types."""
        if not self._file.is_file():
            raise ValueError(f"{self._file} does not exist: export again, or write the rows of table {self._name!r}")
        try:
            schema = pq.read_schema(self._file)
        except pa.ArrowException as error:
            raise ValueError(f"{self._file} is no Parquet file: {error}") from None
        needed = {self._table.identity, VALUES, TRAINED}
        if set(schema.names) != needed or len(schema.names) != len(needed):
            raise ValueError(
                f"{self._file} has the columns {', '.join(schema.names)}: it needs {self._table.identity}, "
                f"{VALUES} and {TRAINED} and no other"
            )
        found, wanted = schema.field(self._table.identity).type, identities.type(self._name)
        if _family(found) != _family(wanted):
            raise ValueError(f"{self._file}: {self._table.identity} is of type {found}, it must be {wanted}")
        values, own = schema.field(VALUES).type, value_type(self._table.kind)
        # DuckDB reads numbers of 16 bits as such of 32.
        if not _is_list(values) or values.value_type not in {own, pa.float32()}:
            raise ValueError(f"{self._file}: {VALUES} is of type {values}, it must be a list of {own}")
        if (trained := schema.field(TRAINED).type) != pa.bool_():
            raise ValueError(f"{self._file}: {TRAINED} is of type {trained}, it must be bool")

    def match(self, identities: Identities, connection: duckdb.DuckDBPyConnection) -> None:
        """Find the row of each line, for `copy_into`.

        Raises:
            ValueError: a row of the table has no line, or two, or a line is of no row.
        """
        table, identity = self._table, self._table.identity
        schema = pa.schema([("identity", identities.type(self._name)), ("row", pa.int64())])
        rows = pa.RecordBatchReader.from_batches(
            schema,
            (
                pa.record_batch([part, pa.array(np.arange(first, first + len(part)))], schema=schema)
                for first, part in identities.parts(self._name, rows=table.first + table.count, part_rows=PART_ROWS)
            ),
        )
        connection.register("rows", rows)
        connection.execute("CREATE TABLE known AS SELECT * FROM rows")
        connection.execute(
            f"CREATE TABLE given AS SELECT {identity} AS identity, file_row_number AS line "
            f"FROM read_parquet({file_literal(self._file)}, file_row_number = true)"
        )
        for query, problem in (
            ("SELECT line FROM given WHERE identity IS NULL", f"line {{}} has no {identity}"),
            ("SELECT identity FROM given GROUP BY identity HAVING count(*) > 1", f"{identity} {{!r}} stands twice"),
            (
                "SELECT identity FROM given ANTI JOIN known USING (identity)",
                f"{identity} {{!r}} is none of the table's",
            ),
            (
                "SELECT identity FROM known ANTI JOIN given USING (identity)",
                f"{identity} {{!r}} of the table is missing",
            ),
        ):
            found = connection.execute(f"{query} ORDER BY 1 LIMIT 1").fetchone()
            if found is not None:
                raise ValueError(f"{self._file}: {problem.format(found[0])}")
        connection.execute(
            "CREATE TABLE matched AS SELECT line, row FROM given JOIN known USING (identity) ORDER BY line"
        )

    def copy_into(self, target: Tensor, trained: Tensor, connection: duckdb.DuckDBPyConnection) -> None:
        """Put the values into their rows of `target` [rows, columns], and which are trained into `trained` [rows],
        after `match`.

        Raises:
            ValueError: a line holds another number of values, or one that is missing or not finite, or does not say
                whether it is trained.
        """
        columns, line = target.shape[1], 0
        for batch in self._batches():
            query = f"SELECT row FROM matched WHERE line >= {line} AND line < {line + len(batch)} ORDER BY line"
            rows = connection.execute(query).fetchnumpy()["row"]
            lists = batch.column(VALUES)
            lens = pc.list_value_length(lists).fill_null(-1).to_numpy()
            self._refuse(batch, lens != columns, f"needs {columns} values")
            values = lists.flatten().to_numpy(zero_copy_only=False).reshape(len(batch), columns)
            # A number that is missing comes as NaN.
            with np.errstate(over="ignore"):
                values = values.astype(target.numpy().dtype, copy=False)
            self._refuse(batch, ~np.isfinite(values).all(axis=1), "has a value that is missing or not finite")
            self._refuse(batch, batch.column(TRAINED).is_null().to_numpy(zero_copy_only=False), f"lacks {TRAINED}")
            marks = batch.column(TRAINED).to_numpy(zero_copy_only=False)
            target.index_copy_(0, torch.from_numpy(rows), torch.tensor(values))
            trained.index_copy_(0, torch.from_numpy(rows), torch.tensor(marks))
            line += len(batch)

    def _batches(self) -> Iterator[pa.RecordBatch]:
        with readable(self._file):
            yield from open_checked(str(self._file)).iter_batches(batch_size=PART_ROWS)

    def _refuse(self, batch: pa.RecordBatch, bad: np.ndarray, problem: str) -> None:
        if bad.any():
            identity = batch.column(self._table.identity)[int(bad.argmax())].as_py()
            raise ValueError(f"{self._file}: the row of {self._table.identity} {identity!r} {problem}")


def _is_list(kind: pa.DataType) -> bool:
    return bool(pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind))


def _family(kind: pa.DataType) -> str:
    """Types that tools turn into one another without a loss are one."""
    if pa.types.is_integer(kind):
        return "integer"
    if pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind):
        return "text"
    return str(kind)
