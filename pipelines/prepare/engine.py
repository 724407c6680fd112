"""The out-of-core engine, DuckDB: a connection with bounded memory, and the files that it is given.

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
