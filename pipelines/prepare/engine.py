"""The out-of-core engine, DuckDB: a connection with bounded memory, and the reading of publishers' text files.

A data set's module fills two tables with it, which the later stages read:

    events  user_id, item_id, time (seconds, -1 if unknown), rank (order within the user: the time as exact as the log
            has it), log_row (order within one rank, see `numbered` and `shuffled`), request_key (NULL if not known:
            events of one request become candidates together), action (bit mask), candidate (false: history only,
            because its labels are not known), further history columns
    users   user_id, one column a context feature
"""

import bz2
import gzip
import logging
import lzma
import re
import shutil
import threading
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, BinaryIO, cast

import duckdb
import pyarrow as pa

logger = logging.getLogger(__name__)

PROGRESS_SECONDS = 10.0
"""Between two lines of the log that tell how far a step is."""
CAUSES = ("Error when", "Expected", "Value with", "Invalid unicode", "Maximum line size")
"""How the line of DuckDB's messages that tells the cause begins."""


@contextmanager
def connect(scratch: Path, memory_gib: float, threads: int | None) -> Iterator[duckdb.DuckDBPyConnection]:
    """A database in the folder `scratch`, into which it also spills; how far a long query is, is logged meanwhile."""
    ended = threading.Event()
    with duckdb.connect(str(scratch / "prepare.duckdb")) as connection:
        _set_options(connection, scratch, memory_gib, threads)
        watcher = threading.Thread(target=_tell_progress, args=(connection, ended), daemon=True)
        watcher.start()
        try:
            yield connection
        finally:
            ended.set()
            watcher.join()


def _tell_progress(connection: duckdb.DuckDBPyConnection, ended: threading.Event) -> None:
    """Log every now and then how much of a query is done, until `ended`."""
    while not ended.wait(PROGRESS_SECONDS):
        share = connection.query_progress()
        if 0 <= share < 100:
            logger.info("... %.0f%% of this query done", share)


def _set_options(connection: duckdb.DuckDBPyConnection, scratch: Path, memory_gib: float, threads: int | None) -> None:
    connection.execute(f"SET memory_limit = '{int(memory_gib * 1024)}MiB'")
    connection.execute("SET temp_directory = " + literal(str(scratch / "spill")))
    connection.execute("SET preserve_insertion_order = false")
    connection.execute("SET enable_progress_bar = true")
    connection.execute("SET enable_progress_bar_print = false")
    # For dates and times that name no zone.
    connection.execute("SET TimeZone = 'UTC'")
    if threads is not None:
        connection.execute(f"SET threads = {threads}")


def literal(text: str) -> str:
    """`text` as an SQL string."""
    return "'" + text.replace("'", "''") + "'"


def file_literal(path: Path) -> str:
    """The name of a file as an SQL string for functions that read, which take *, ? and [ for patterns of names.

    Raises:
        ValueError: the name is not in UTF-8.
    """
    text = str(path)
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError(f"the name {text!a} is not in UTF-8: rename the file or its folder") from None
    return literal("".join(f"[{letter}]" if letter in "*?[" else letter for letter in text))


def quoted(name: str) -> str:
    """`name` as an SQL identifier."""
    return '"' + name.replace('"', '""') + '"'


def table_exists(connection: duckdb.DuckDBPyConnection, name: str) -> bool:
    """Whether there is a table of this name."""
    return bool(connection.execute("SELECT 1 FROM duckdb_tables() WHERE table_name = ?", [name]).fetchall())


def find_files(source: Path, pattern: str) -> list[Path]:
    """Files of data anywhere under `source` whose name, less a compression suffix, matches the glob `pattern`, in large
    or small letters.

    Left out, as other engines do: names that begin with `_` or `.`, of files and of folders (but folders `key=value`),
    and compressed copies of a file that lies beside them.
    """
    if not source.is_dir():
        raise ValueError(f"--source {source} is not a folder")
    chosen: dict[Path, Path] = {}
    for path in sorted(data_files(source), key=lambda path: (path.suffix.lower() in COMPRESSIONS, path)):
        plain = plain_name(path)
        if not fnmatchcase(plain.name.lower(), pattern.lower()):
            continue
        if chosen.setdefault(plain, path) != path:
            logger.info("%s is not read: %s is the same file", path, chosen[plain].name)
    return sorted(chosen.values())


def data_files(source: Path) -> list[Path]:
    """All files under `source` that are not hidden, of any kind."""
    return sorted(path for path in source.rglob("*") if is_data(path.relative_to(source)) and path.is_file())


def plain_name(path: Path) -> Path:
    """The path less the suffix of a compression."""
    return path.with_suffix("") if path.suffix.lower() in COMPRESSIONS else path


def is_data(path: Path) -> bool:
    """Whether a path within a source names data: no part of it is hidden, or kept by an engine for itself."""
    *folders, name = path.parts
    return not name.startswith(("_", ".")) and not any(
        folder.startswith(".") or (folder.startswith("_") and "=" not in folder) for folder in folders
    )


def require_files(source: Path, pattern: str, what: str) -> list[Path]:
    """Like `find_files`; raises ValueError, saying what is missing, if there is none."""
    found = find_files(source, pattern)
    if not found:
        raise ValueError(f"--source {source} holds no {pattern} (also .xz, .gz, .zip): {what}")
    return found


def plain_file(path: Path, scratch: Path) -> Path:
    """`path` itself, or its decompressed copy in `scratch`."""
    if plain_name(path) == path:
        return path
    copy = scratch / "plain" / path.stem
    copy.parent.mkdir(exist_ok=True)
    logger.info("decompressing %s", path.name)
    with decompressed(path) as content, copy.open("wb") as plain:
        shutil.copyfileobj(content, plain, 1 << 20)
    return copy


@contextmanager
def decompressed(path: Path) -> Iterator[BinaryIO]:
    """The content of a file, compressed or not; raises ValueError if it turns out to be damaged as it is read."""
    opener = COMPRESSIONS.get(path.suffix.lower())
    try:
        with opener(path) if opener else path.open("rb") as stream:
            yield stream
    except DAMAGED as error:
        # The error comes from the file system if it has a number.
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise ValueError(f"{path} cannot be decompressed: {error}") from error


def csv_reader(path: Path, columns: Mapping[str, str | None]) -> str:
    """The SQL table function that reads a CSV file with a header, `columns` as these SQL types and the rest as text.

    Raises ValueError, naming the file, if it is empty or lacks a column.
    """
    with path.open("rb") as stream:
        header = stream.readline().decode("utf-8-sig", errors="replace").strip()
    if not header:
        raise ValueError(f"{path} is empty: a header line was expected")
    names = [name.strip().strip('"') for name in header.split(",")]
    missing = [name for name in columns if name not in names]
    if missing:
        raise ValueError(
            f"{path}: the header lacks the column(s) {', '.join(missing)}; divided at commas, it has {', '.join(names)}"
        )
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"{path}: the header names {', '.join(twice)} more than once; rename or remove one")
    types = ", ".join(f"{literal(name)}: {literal(columns.get(name) or 'VARCHAR')}" for name in names)
    return (
        f"read_csv({file_literal(path)}, header = true, auto_detect = false, delim = ',', quote = '\"', "
        f"escape = '\"', columns = {{{types}}})"
    )


def delimited_reader(path: Path, delimiter: str, columns: Mapping[str, str]) -> str:
    """The SQL table function that reads a text file without a header, with these columns and SQL types in order."""
    if not path.stat().st_size:
        raise ValueError(f"{path} is empty")
    types = ", ".join(f"{literal(name)}: {literal(kind)}" for name, kind in columns.items())
    return (
        f"read_csv({file_literal(path)}, header = false, auto_detect = false, delim = {literal(delimiter)}, "
        f"quote = '', escape = '', columns = {{{types}}})"
    )


def json_reader(path: Path, fields: Mapping[str, str]) -> str:
    """The SQL table function that reads these fields of a file of JSON lines."""
    if not path.stat().st_size:
        raise ValueError(f"{path} is empty")
    types = ", ".join(f"{literal(name)}: {literal(kind)}" for name, kind in fields.items())
    return f"read_json({file_literal(path)}, format = 'newline_delimited', columns = {{{types}}})"


def parquet_reader(connection: duckdb.DuckDBPyConnection, path: Path, columns: Mapping[str, str | None]) -> str:
    """SQL that reads these columns of a Parquet file as these types (None: as stored).

    Where a type is asked for, NaN is a missing value, and a fraction where whole numbers are ends the query.  Raises
    ValueError if a column is missing, or holds lists and a type is asked for.
    """
    file = f"read_parquet({file_literal(path)})"
    try:
        stored = {row[0]: row[1] for row in connection.execute(f"DESCRIBE SELECT * FROM {file}").fetchall()}
    except (duckdb.InvalidInputException, duckdb.IOException) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"{path} is not a readable Parquet file, perhaps truncated: {reason}") from error
    missing = [name for name in columns if name not in stored]
    if missing:
        raise ValueError(f"{path} lacks the column(s) {', '.join(missing)}; it has {', '.join(stored)}")
    for name, kind in columns.items():
        if kind and stored[name].endswith("[]"):
            raise ValueError(f"{path}: column {name} holds lists ({stored[name]}); give files with one event a row")
    casts = ", ".join(f"{_cast(name, kind, stored[name])} AS {quoted(name)}" for name, kind in columns.items())
    return f"(SELECT {casts} FROM {file})"


def _cast(name: str, kind: str | None, stored: str) -> str:
    """SQL for a stored column as another type; what the engine would round is refused."""
    column = quoted(name)
    if kind is None:
        return column
    if stored not in ("FLOAT", "DOUBLE"):
        return f"{column}::{kind}"
    if kind == "DOUBLE":
        # As text: whether a number is NaN is answered from the file's statistics, which leave NaNs out.
        return f"nullif({column}::VARCHAR, 'nan')::DOUBLE"
    said = f"{literal(f'column {name} holds ')} || {column} || ', which is no whole number'"
    # TRY_CAST, for the engine casts before it looks at the condition.
    return f"CASE WHEN {column} <> floor({column}) THEN error({said}) ELSE TRY_CAST({column} AS {kind}) END"


ROWS_OF_A_FILE = 1 << 40
"""More than a file has: so many numbers of rows are set apart for each."""


def numbered(reader: str, file: int = 0) -> str:
    """SQL for the rows of `reader` with `log_row`: their order in the log, where this is the `file`-th of its files.

    The engine reads a file in its order wherever it has to number rows.
    """
    return f"(SELECT *, {file * ROWS_OF_A_FILE} + row_number() OVER () AS log_row FROM {reader})"


def shuffled(keys: str) -> str:
    """SQL for an order of rows that tells nothing of what they hold, for files that are sorted by item.

    A hash of the keys, so that it is the same whatever the order of the files; only rows with the same keys keep their
    own order.
    """
    return f"((hash({keys}) >> 24 << 23) + log_row % {1 << 23})::BIGINT"


def execute(connection: duckdb.DuckDBPyConnection, sql: str, path: Path | None = None) -> list[tuple[Any, ...]]:
    """Run `sql` and fetch its rows; an error about the content of `path` becomes a ValueError with file and line."""
    try:
        return connection.execute(sql).fetchall()
    except (duckdb.ConversionException, duckdb.InvalidInputException, duckdb.ConstraintException) as error:
        if path is None:
            raise
        raise ValueError(f"{path}{_line_of(str(error))}") from error


def check_rows(
    connection: duckdb.DuckDBPyConnection,
    reader: str,
    path: Path,
    rules: Mapping[str, str],
    first_line: int = 2,
    *,
    unit: str = "line",
) -> None:
    """Raise ValueError with file and line for the first row of `reader` that breaks a rule (SQL condition: text)."""
    logger.info("reading %s", path)
    bad = " OR ".join(f"(({rule}) IS NOT TRUE)" for rule in rules)
    count = execute(connection, f"SELECT count(*) FROM {reader} WHERE {bad}", path)[0][0]
    if not count:
        return
    which = ", ".join(f"({rule}) IS NOT TRUE" for rule in rules)
    connection.execute("SET preserve_insertion_order = true")
    numbered = f"SELECT row_number() OVER () AS line_number, {which} FROM {reader}"
    ordered = f"SELECT * FROM ({numbered}) AS rows(line_number, {', '.join(f'r{i}' for i in range(len(rules)))})"
    any_rule = " OR ".join(f"r{i}" for i in range(len(rules)))
    row = connection.execute(f"{ordered} WHERE {any_rule} ORDER BY line_number LIMIT 1").fetchall()[0]
    connection.execute("SET preserve_insertion_order = false")
    reason = next(text for text, broken in zip(rules.values(), row[1:], strict=True) if broken)
    raise ValueError(f"{path}, {unit} {row[0] - 1 + first_line}: {reason} ({count} such row(s))")


def check_one_row_each(connection: duckdb.DuckDBPyConnection, reader: str, path: Path, column: str) -> None:
    """Raise ValueError if a value of `column` stands in several rows: each of its events would count several times."""
    found = execute(
        connection, f"SELECT {column} FROM {reader} GROUP BY 1 HAVING count(*) > 1 ORDER BY 1 LIMIT 1", path
    )
    if found:
        raise ValueError(f"{path}: {column} {found[0][0]} stands in several rows; give one row a user")


def _open_xz(path: Path) -> BinaryIO:
    return cast(BinaryIO, lzma.open(path))


def _open_gz(path: Path) -> BinaryIO:
    return cast(BinaryIO, gzip.open(path))


def _open_bz2(path: Path) -> BinaryIO:
    return cast(BinaryIO, bz2.open(path))


def _open_zst(path: Path) -> BinaryIO:
    return cast(BinaryIO, pa.input_stream(path, compression="zstd"))


def _line_of(message: str) -> str:
    """The line number and the cause out of DuckDB's many-line message."""
    malformed = re.search(r"Malformed JSON .* in line (\d+)", message)
    not_utf_8 = "utf-8" in message.lower()
    fix = "; write it in UTF-8, or say its --encoding for an event_log" * not_utf_8
    if malformed:
        # DuckDB 2.0 counts one too many here, unlike where a value has the wrong type.
        return (
            f", line {int(malformed.group(1)) - 1}: {'text that is not UTF-8' if not_utf_8 else 'malformed JSON'}{fix}"
        )
    line = re.search(r"(?:on|in) line:? (\d+)", message, re.IGNORECASE)
    lines = [text.strip().removeprefix("Invalid Input Error: ") for text in message.splitlines() if text.strip()]
    cause = next((text for text in lines if text.startswith(CAUSES)), lines[0])
    original = next((text for text in lines if text.startswith("Original Line")), "")
    where = f", line {line.group(1)}" if line else ""
    return f"{where}: {cause}{fix}" + (f" [{original[:200]}]" if original else "")


def _open_zip(path: Path) -> BinaryIO:
    """The only member of an archive."""
    archive = zipfile.ZipFile(path)
    members = [name for name in archive.namelist() if not name.endswith("/")]
    if len(members) != 1:
        raise ValueError(f"{path} holds {len(members)} files; unpack it and give the folder")
    return cast(BinaryIO, archive.open(members[0]))


DAMAGED = (lzma.LZMAError, EOFError, OSError, zlib.error, zipfile.BadZipFile)
"""What decompressing a file that is not whole ends in."""
COMPRESSIONS: Mapping[str, Callable[[Path], BinaryIO]] = {
    ".xz": _open_xz,
    ".gz": _open_gz,
    ".bz2": _open_bz2,
    ".zst": _open_zst,
    ".zip": _open_zip,
}
"""Openers of compressed text, by the last part of the file's name."""
