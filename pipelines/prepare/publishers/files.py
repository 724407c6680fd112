"""Publishers' files as SQL that reads them, and the checks of their rows.

The engine's own casts round fractions where whole numbers are asked for.  What is no whole number there is null as it
is read, and `check_rows`, through which every file goes before it is used, says where it stands.
"""

import logging
from collections.abc import Mapping
from pathlib import Path

import duckdb

from pipelines.prepare.engine import execute, file_literal, literal, quoted

logger = logging.getLogger(__name__)

WHOLE = {"INTEGER": 32, "BIGINT": 64}
"""Bits of the types of whole numbers as which columns are read; the engine's own casts to them round."""
FLOATS = ("FLOAT", "DOUBLE")
UNREADABLE = "unreadable"
"""Column of every reader: null, or what `check_rows` says of the row."""


def csv_reader(path: Path, columns: Mapping[str, str | None]) -> str:
    """SQL that reads a CSV file with a header, `columns` as these SQL types and the rest as text.

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
    return _from_text(
        f"read_csv({file_literal(path)}, header = true, auto_detect = false, delim = ',', quote = '\"', escape = '\"'",
        {name: columns.get(name) or "VARCHAR" for name in names},
    )


def delimited_reader(path: Path, delimiter: str, columns: Mapping[str, str]) -> str:
    """SQL that reads a text file without a header, with these columns and SQL types in order."""
    if not path.stat().st_size:
        raise ValueError(f"{path} is empty")
    return _from_text(
        f"read_csv({file_literal(path)}, header = false, auto_detect = false, delim = {literal(delimiter)}, "
        "quote = '', escape = ''",
        columns,
    )


def json_reader(path: Path, fields: Mapping[str, str]) -> str:
    """SQL that reads these fields of a file of JSON lines."""
    if not path.stat().st_size:
        raise ValueError(f"{path} is empty")
    return _from_text(f"read_json({file_literal(path)}, format = 'newline_delimited'", fields)


def _from_text(call: str, columns: Mapping[str, str]) -> str:
    """SQL that reads these columns of a file of text by a table function; its `call` ends before `columns`."""
    stored = {name: "VARCHAR" if kind in WHOLE else kind for name, kind in columns.items()}
    types = ", ".join(f"{literal(name)}: {literal(kind)}" for name, kind in stored.items())
    return _reader(f"{call}, columns = {{{types}}})", columns, stored)


def parquet_reader(connection: duckdb.DuckDBPyConnection, path: Path, columns: Mapping[str, str | None]) -> str:
    """SQL that reads these columns of a Parquet file as these types (None: as stored).

    Where a type is asked for, NaN is a missing value.  Raises ValueError if a column is missing, or holds lists and a
    type is asked for.
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
    return _reader(file, columns, stored)


def check_rows(
    connection: duckdb.DuckDBPyConnection,
    reader: str,
    path: Path,
    rules: Mapping[str, str],
    first_line: int = 2,
    *,
    unit: str = "line",
) -> None:
    """Raise ValueError with file and line for the first row of `reader` that cannot be read or breaks a rule (SQL
    condition: text)."""
    logger.info("reading %s", path)
    rules = {f"{UNREADABLE} IS NULL": "", **rules}
    bad = " OR ".join(f"(({rule}) IS NOT TRUE)" for rule in rules)
    count = execute(connection, f"SELECT count(*) FROM {reader} WHERE {bad}", path)[0][0]
    if not count:
        return
    which = ", ".join(f"({rule}) IS NOT TRUE" for rule in rules)
    connection.execute("SET preserve_insertion_order = true")
    numbered = f"SELECT row_number() OVER () AS line_number, {UNREADABLE}, {which} FROM {reader}"
    names = ", ".join(f"r{i}" for i in range(len(rules)))
    ordered = f"SELECT * FROM ({numbered}) AS rows(line_number, {UNREADABLE}, {names})"
    any_rule = " OR ".join(f"r{i}" for i in range(len(rules)))
    row = connection.execute(f"{ordered} WHERE {any_rule} ORDER BY line_number LIMIT 1").fetchall()[0]
    connection.execute("SET preserve_insertion_order = false")
    reason = row[1] or next(text for text, broken in zip(rules.values(), row[2:], strict=True) if broken)
    raise ValueError(f"{path}, {unit} {row[0] - 1 + first_line}: {reason} ({count} such row(s))")


def check_one_row_each(connection: duckdb.DuckDBPyConnection, reader: str, path: Path, column: str) -> None:
    """Raise ValueError if a value of `column` stands in several rows: each of its events would count several times."""
    found = execute(
        connection, f"SELECT {column} FROM {reader} GROUP BY 1 HAVING count(*) > 1 ORDER BY 1 LIMIT 1", path
    )
    if found:
        raise ValueError(f"{path}: {column} {found[0][0]} stands in several rows; give one row a user")


def _reader(table: str, columns: Mapping[str, str | None], stored: Mapping[str, str]) -> str:
    """SQL for columns of `table`, stored in these types, as others, and `UNREADABLE`."""
    values = "".join(f"{_cast(quoted(name), kind, stored[name])} AS {quoted(name)}, " for name, kind in columns.items())
    wrong = "".join(
        f"{_not_whole(name, kind, stored[name])}, "
        for name, kind in columns.items()
        if kind is not None and _is_rounded(kind, stored[name])
    )
    return f"(SELECT {values}coalesce({wrong}NULL::VARCHAR) AS {UNREADABLE} FROM {table})"


def _cast(column: str, kind: str | None, stored: str) -> str:
    """SQL for a stored column as another type; NaN is missing."""
    if kind is None or kind == stored == "VARCHAR":
        return column
    if _is_rounded(kind, stored):
        return f"TRY_CAST({column} AS {kind})"
    return f"CASE WHEN {_known(column, stored)} THEN {column}::{kind} END"


def _is_rounded(kind: str, stored: str) -> bool:
    """Whether the engine's cast may change a number."""
    return kind in WHOLE and (stored in (*FLOATS, "VARCHAR") or stored.startswith("DECIMAL"))


def _known(column: str, stored: str) -> str:
    """SQL that is true where there is a value."""
    if stored not in FLOATS:
        return f"{column} IS NOT NULL"
    # Not isnan, which is answered from a Parquet file's statistics: they leave NaNs out.
    return f"(isfinite({column}) OR abs({column}) = 'inf'::DOUBLE)"


def _not_whole(name: str, kind: str, stored: str) -> str:
    """SQL of what is wrong with a value that the engine would round, or that has no place in this type."""
    column = quoted(name)
    whole = f"{column} = floor({column})"
    if stored == "VARCHAR":
        exact = f"TRY_CAST({column} AS DECIMAL(38, 18))"
        whole = f"(NOT regexp_matches({column}, '[.eE]') OR {exact} = floor({exact}))"
    good = f"TRY_CAST({column} AS {kind}) IS NOT NULL AND {whole}"
    said = f"{literal(f'column {name} holds ')} || {column} || ', which is no whole number of {WHOLE[kind]} bits'"
    return f"CASE WHEN {_known(column, stored)} AND ({good}) IS NOT TRUE THEN {said} END"
