"""Files of a log or of attributes: what each holds is known before any is read.

Parquet files hold typed columns; of CSV files every column is text; of files of JSON lines every field is text or a
list of texts, and one that no line of a file has is missing there if other files have it.  Fields of objects are
columns called OBJECT.FIELD, and those of lists of objects are columns of lists; the folders `key=value` that a file
lies in are columns of text, too.
"""

import csv
import io
import logging
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from urllib.parse import unquote

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.prepare.engine import (
    COMPRESSIONS,
    data_files,
    decompressed,
    file_literal,
    find_files,
    literal,
    plain_file,
    plain_name,
    quoted,
)
from pipelines.prepare.log.csv_quotes import has_values_of_several_lines, quote_rules
from pipelines.prepare.log.fields import fields_of, json_columns, read_as, read_value
from pipelines.prepare.log.readings import NULL, TEXT, Rule, Stored
from pipelines.prepare.log.text_encoding import ENCODING, UTF_8, encoding_of, file_in_utf_8

logger = logging.getLogger(__name__)

PARQUET = ".parquet"
FORMATS = (PARQUET, ".csv", ".tsv", ".jsonl", ".ndjson")
CSV = ".csv"
"""The kind of all files whose first line names columns, whatever divides them."""
DELIMITERS = (",", ";", "\t", "|")
"""What may divide a CSV file's columns: that of which its header has most."""
HEADER_BYTES = 1 << 20
JSON = ".json"
"""Read where a folder holds no file of FORMATS: a description of the data often ends in it."""
TABLES = {"_delta_log": "Delta Lake", ".hoodie": "Hudi", "metadata/*.metadata.json": "Iceberg"}
"""What is found in the folders of tables that have versions."""
SHOWN = 5
"""Names of files that a message shows at most."""
REJECTED = "longview_rejected"
"""Table of lines that are no rows."""
ROW = quoted("longview: row")
"""Name, beside a file's own columns, for a row's place in it, counted from 1."""
ROW_OF_PARQUET = "file_row_number"
"""What the engine calls it in Parquet files: as it knows it of each row, several threads may read."""
NO_VALUE = "__HIVE_DEFAULT_PARTITION__"
"""What a folder `key=value` says where the value is missing."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LogFile:
    """One file, and what it holds."""

    path: Path
    """The file, perhaps compressed."""
    kind: str
    """The suffix in small letters, less that of a compression."""
    columns: Sequence[tuple[str, str]]
    """(name, SQL type) of its columns, in order."""
    encoding: str = UTF_8
    """Encoding, if it is a file of text."""
    delimiter: str = ","
    """What divides the columns of a CSV file."""
    folders: Mapping[str, str | None]
    """Values of the folders `key=value` that it lies in, of which the file has no column."""
    absent: Sequence[str] = ()
    """Columns of other files that this one lacks, as it was written before there were any, or of other events; of JSON
    lines all fields of others, as writers leave out what is missing."""

    @property
    def is_json(self) -> bool:
        """Whether its rows are objects, each with fields of its own."""
        return self.kind not in (PARQUET, CSV)

    @property
    def fields(self) -> dict[str, tuple[str, str]]:
        """(SQL, SQL type) of the fields of its objects, however deep, by OBJECT.FIELD."""
        return {name: found for column, kind in self.columns for name, found in fields_of(column, quoted(column), kind)}

    @property
    def types(self) -> dict[str, str]:
        """The SQL type of each column, those of the folders included."""
        fields = {name: kind for name, (_, kind) in self.fields.items()}
        given = {**dict.fromkeys(self.absent, NULL), **dict.fromkeys(self.folders, TEXT)}
        return {name: read_as(kind) for name, kind in {**given, **fields, **dict(self.columns)}.items()}

    def lacks(self, names: Iterable[str]) -> list[str]:
        """Which of these columns the file lacks; upper and lower case are the same."""
        have = {name.lower() for name in self.types}
        return [name for name in dict.fromkeys(names) if name.lower() not in have]

    def require(self, names: Iterable[str]) -> None:
        """Raise ValueError if the file lacks one of these columns, or has several of the name."""
        types, wanted = self.types, list(dict.fromkeys(names))
        lacking = [name for name in wanted if name not in types]
        if lacking:
            divided = f"divided at {self.delimiter!r}, it has" if self.kind == CSV else "it has"
            raise ValueError(f"{self.path} lacks the column(s) {', '.join(lacking)}; {divided} {', '.join(types)}")
        names = [*(name for name, _ in self.columns), *self.fields]
        for name in wanted:
            if sum(name.lower() == other.lower() for other in names) > 1:
                raise ValueError(f"{self.path} has several columns {name}, in large or small letters; rename one")

    def stored(self, name: str) -> Stored:
        """How the file stores a column that it has."""
        return Stored(path=self.path, name=name, type=self.types[name])

    def place(self, row: int) -> str:
        """How messages name a row, counted from 1: by the line on which it begins, if the file has lines.

        The engine counts no blank lines, and a value in quotes of a CSV file may go over several.
        """
        if self.kind == PARQUET:
            return f"row {row}"
        begun, quotes = -1 if self.kind == CSV else 0, 0
        with (
            decompressed(self.path) as stream,
            io.TextIOWrapper(stream, encoding=self.encoding, errors="replace", newline="") as lines,
        ):
            for number, line in enumerate(lines, 1):
                blank = not line.strip("\r\n" if self.kind == CSV else None)
                begun += quotes % 2 == 0 and not blank
                if begun == row:
                    return f"line {number}"
                quotes += line.count('"') if self.kind == CSV else 0
        raise AssertionError(f"{self.path} has no row {row}")

    @contextmanager
    def reader(self, scratch: Path, *, skip_invalid: bool = False) -> Iterator[tuple[str, Sequence[Rule]]]:
        """(SQL of a table with the file's columns and `ROW`, what its rows must keep to be rows of the log); meanwhile,
        what is compressed or not UTF-8 lies plain in `scratch`.

        With `skip_invalid`, lines that are no rows are left out of a CSV file (see `rejected`), and are rows without
        values in a JSON file.
        """
        with _plain(self.path, scratch, self.encoding) as plain:
            further = "".join(
                f", {literal(value) if value is not None else 'NULL'}::{TEXT} AS {quoted(name)}"
                for name, value in self.folders.items()
            )
            further += "".join(f", NULL AS {quoted(name)}" for name in self.absent)
            further += "".join(
                f", {read_value(name, value, kind)} AS {quoted(name)}" for name, (value, kind) in self.fields.items()
            )
            mixed = [
                f"{read_value(name, quoted(name), kind)} AS {quoted(name)}"
                for name, kind in self.columns
                if read_as(kind) != kind
            ]
            replaced = f" REPLACE ({', '.join(mixed)})" if mixed else ""
            known = self.kind == PARQUET and ROW_OF_PARQUET not in (name.lower() for name, _ in self.columns)
            further += f", {f'{ROW_OF_PARQUET} + 1' if known else 'row_number() OVER ()'} AS {ROW}"
            spanning = self.kind == CSV and has_values_of_several_lines(plain)
            rules = quote_rules([name for name, _ in self.columns], self.delimiter) if spanning else ()
            yield f"(SELECT *{replaced}{further} FROM {_table(plain, self, skip_invalid)})", rules

    def rejected(self, connection: duckdb.DuckDBPyConnection) -> Counter[str]:
        """How many lines the last reading with `skip_invalid` left out, by what was wrong with them."""
        if self.kind != CSV:
            return Counter()
        counts = connection.execute(
            f"SELECT 'line that is no row: ' || lower(error_type::VARCHAR), count(DISTINCT line) FROM {REJECTED} "
            "GROUP BY error_type"
        ).fetchall()
        connection.execute(f"DROP TABLE {REJECTED}; DROP TABLE {REJECTED}_scans")
        return Counter(dict(counts))


def log_paths(source: Path, leave_out: Iterable[Path] = ()) -> list[Path]:
    """Files of data under `source`, by path, less some.  Raises ValueError if there is none."""
    attributes = set(leave_out)
    found = sorted(set(_data_files(source)) - attributes)
    twins = {plain_name(path) for path in found}
    others = [path for path in data_files(source) if path not in attributes and plain_name(path) not in twins]
    names = ", ".join(str(path.relative_to(source)) for path in others[:SHOWN]) + ", ..." * (len(others) > SHOWN)
    if not found:
        formats = f"{', '.join(FORMATS)} file, compressed or not ({', '.join(COMPRESSIONS)})"
        instead = f"; it holds {names}: write the log as one of these" if others else ""
        raise ValueError(f"--source {source} holds no {formats}{instead}")
    if others:
        logger.info("%d file(s) of other kinds are not read: %s", len(others), names)
    return found


def attribute_paths(source: Path, files: str, *, needed: bool = True) -> list[Path]:
    """What a description calls files of attributes: a file, a folder or a pattern, relative to `source`.

    Raises ValueError if there is none though one is needed.
    """
    found = sorted({path.resolve() for path in source.parent.glob(str(Path(source.name) / files))})
    found = [file for path in found for file in (_data_files(path) if path.is_dir() else [path])]
    if needed and not found:
        raise ValueError(
            f"there is no file of data {source / files}: files of attributes are named relative to --source"
        )
    return found


def _data_files(folder: Path) -> list[Path]:
    for pattern, kind in TABLES.items():
        for path in folder.rglob(pattern):
            table = path.parents[pattern.count("/")]
            raise ValueError(
                f"{table} is a table of {kind}, whose files hold rows, too, that were changed or removed: write its "
                "current rows as Parquet into a folder of their own"
            )
    found = [path for kind in FORMATS for path in find_files(folder, f"*{kind}")]
    return found or find_files(folder, f"*{JSON}")


def open_files(
    connection: duckdb.DuckDBPyConnection,
    paths: Iterable[Path],
    scratch: Path,
    *,
    encoding: str = UTF_8,
    optional: Sequence[str] = (),
    described: Iterable[str] = (),
) -> list[LogFile]:
    """What files hold, less JSON files without a line, and Parquet files without a row beside others, since programs
    that have nothing to write do not know its types.  Raises ValueError if one cannot be read, or no file is left.

    Args:
        encoding: that of text files that do not say it themselves.
        optional: columns that a file may lack if others have them.
        described: columns that JSON files may lack all together: an earlier delivery had them.
    """
    opened = [_open(connection, path, scratch, encoding) for path in paths]
    files = [file for file in opened if file.columns]
    files = [file for file in files if not (file.kind == PARQUET and _has_no_row(file.path, scratch))] or files
    kept = {file.path for file in files}
    for file in opened:
        if file.path not in kept:
            logger.info("%s holds no row", file.path)
    if opened and not files:
        raise ValueError(f"{opened[0].path} and all files beside it hold no row")
    have = dict.fromkeys(name for file in files for name in file.types)
    files = [
        replace(file, absent=file.lacks([*have, *described] if file.is_json else [*have.keys() & set(optional)]))
        for file in files
    ]
    for name in optional:
        lacking = [file.path for file in files if name in file.absent]
        if lacking:
            logger.warning(
                "%d of %d file(s) lack the column %s, which is missing in their rows; the first is %s",
                *(len(lacking), len(files), name, lacking[0]),
            )
    return files


def _open(connection: duckdb.DuckDBPyConnection, path: Path, scratch: Path, stated: str) -> LogFile:
    kind = plain_name(path).suffix.lower()
    delimiter, encoding = DELIMITERS[0], UTF_8 if kind == PARQUET else encoding_of(path, stated)
    if kind in (CSV, ".tsv"):
        kind, (delimiter, columns) = CSV, _csv_columns(path, encoding)
    elif kind == PARQUET:
        columns = _parquet_columns(connection, path, scratch)
    else:
        columns = _json_columns(connection, path, encoding, scratch)
    pairs = [part.split("=", 1) for part in path.parent.parts if "=" in part]
    have = {name.lower() for name, _ in columns}
    folders = {
        unquote(name): None if value == NO_VALUE else unquote(value)
        for name, value in pairs
        if unquote(name).lower() not in have
    }
    return LogFile(path=path, kind=kind, columns=columns, encoding=encoding, delimiter=delimiter, folders=folders)


@contextmanager
def _plain(path: Path, scratch: Path, encoding: str = UTF_8) -> Iterator[Path]:
    """`path`, or its copy in UTF-8 without compression as long as it is needed."""
    plain = plain_file(path, scratch) if encoding == UTF_8 else file_in_utf_8(path, encoding, scratch)
    try:
        yield plain
    finally:
        if plain != path:
            plain.unlink()


def _table(plain: Path, described: LogFile, skip_invalid: bool) -> str:
    """The SQL table function that reads a file, or its copy without compression, as columns of its names and types."""
    kind = described.kind
    skip = (
        {
            CSV: f", store_rejects = true, rejects_table = '{REJECTED}', rejects_scan = '{REJECTED}_scans'",
            PARQUET: "",
        }.get(kind, ", ignore_errors = true")
        if skip_invalid
        else ""
    )
    file = file_literal(plain)
    # Fields of JSON that are alike but for large and small letters are refused where they are asked for.
    columns = {name.lower(): (name, each) for name, each in reversed(described.columns)}.values()
    types = ", ".join(f"{literal(name)}: {literal(each)}" for name, each in reversed(columns))
    if kind == PARQUET:
        return _parquet_table(plain)
    if kind == CSV:
        return (
            f"read_csv({file}, header = true, auto_detect = false, delim = {literal(described.delimiter)}, "
            f"quote = '\"', escape = '\"', hive_partitioning = false, columns = {{{types}}}{skip})"
        )
    return f"read_json({file}, format = 'newline_delimited', hive_partitioning = false, columns = {{{types}}}{skip})"


def _parquet_table(plain: Path) -> str:
    return f"read_parquet({file_literal(plain)}, hive_partitioning = false)"


def _json_columns(
    connection: duckdb.DuckDBPyConnection, path: Path, encoding: str, scratch: Path
) -> Sequence[tuple[str, str]]:
    """Fields of all rows of a JSON file."""
    with _plain(path, scratch, encoding) as plain:
        with plain.open("rb") as stream:
            first = next((line for line in stream if line.strip()), b"").strip()
        if not first:
            return []
        if first.startswith(b"["):
            raise ValueError(f"{path} holds a list; write its objects one a line, without brackets and commas around")
        return json_columns(connection, file_literal(plain), path)


def _has_no_row(path: Path, scratch: Path) -> bool:
    with _plain(path, scratch) as plain:
        return bool(pq.read_metadata(plain).num_rows == 0)


def _parquet_columns(connection: duckdb.DuckDBPyConnection, path: Path, scratch: Path) -> Sequence[tuple[str, str]]:
    """Names as they are stored (the engine numbers those that are alike) and the engine's types."""
    with _plain(path, scratch) as plain:
        if not plain.stat().st_size:
            raise ValueError(f"{path} is empty")
        table = _parquet_table(plain)
        try:
            names = pq.read_schema(plain).names
            types = connection.execute(f"DESCRIBE SELECT * FROM {table}").fetchall() if names else []
        except (duckdb.InvalidInputException, duckdb.IOException, pa.ArrowInvalid) as error:
            reason = str(error).splitlines()[0]
            raise ValueError(f"{path} is not a readable Parquet file, perhaps truncated: {reason}") from error
    return [(name, kind[1]) for name, kind in zip(names, types, strict=True)]


def _csv_columns(path: Path, encoding: str) -> tuple[str, Sequence[tuple[str, str]]]:
    """What divides a CSV file, and the names in its header; a name in quotes may hold what divides."""
    with decompressed(path) as stream:
        text = stream.read(HEADER_BYTES).decode(encoding, errors="replace")
    if not text:
        raise ValueError(f"{path} is empty: a header line was expected")
    try:
        headers = {
            delimiter: next(csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, skipinitialspace=True))
            for delimiter in DELIMITERS
        }
    except csv.Error as error:
        raise ValueError(f"{path}: the header is not one of a CSV file: {error}") from error
    delimiter = max(headers, key=lambda each: len(headers[each]))
    names = [name.strip() for name in headers[delimiter]]
    if "\0" in text:
        raise ValueError(
            f"{path} holds zero bytes, as text in UTF-16 does: say which {ENCODING} it has, such as utf-16-le"
        )
    if any("\ufffd" in name for name in names):
        raise ValueError(f"{path}: the header {', '.join(names)} is no text in {encoding}: say which {ENCODING} it has")
    if not any(names):
        raise ValueError(f"{path}: line 1 is blank, a header line was expected; remove the blank lines before it")
    # A table's index and a delimiter at the end of lines make columns without a name, which nobody asks for.
    names = [name or f"longview: column {number}" for number, name in enumerate(names, 1)]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"{path}: the header names {', '.join(twice)} more than once; rename or remove one")
    return delimiter, [(name, TEXT) for name in names]
