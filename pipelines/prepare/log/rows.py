"""Rows of files into a table: each read as its file stores it, and checked against the rules of that reading."""

import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import duckdb

from pipelines.prepare.engine import ROWS_OF_A_FILE, execute, quoted
from pipelines.prepare.log.files import ROW, LogFile
from pipelines.prepare.log.readings import Reading, Rule

logger = logging.getLogger(__name__)

NOT_MET = "where"
"""What rows that do not meet the condition are counted under."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RowOptions:
    """Which rows are left out."""

    where: str | None = None
    """An SQL condition on the files' columns that rows must meet."""
    skip_invalid: bool = False
    """Whether rows that break a rule are left out and counted, instead of ending the preparation."""


def read_rows(
    connection: duckdb.DuckDBPyConnection,
    files: Sequence[LogFile],
    table: str,
    columns: Mapping[str, tuple[str, Callable[[LogFile], Reading]]],
    scratch: Path,
    options: RowOptions,
) -> dict[str, int]:
    """Fill a new table with the rows of all files; returns how many were left out, by what was wrong with them.

    Args:
        columns: (SQL type, how a file's value is read) by name; the table gets `log_row` besides, the row's place in
            the order of files and rows.

    Raises:
        ValueError: a row breaks a rule; the message names file, row and rule.
    """
    types = "".join(f", {quoted(name)} {kind}" for name, (kind, _) in columns.items())
    connection.execute(f"CREATE TABLE {table} (log_row BIGINT, broken SMALLINT{types})")
    # The engine concludes from a Parquet file's statistics, which leave NaN out, that no value is NaN.
    connection.execute("SET disabled_optimizers = 'statistics_propagation'")
    # One transaction: the disk is waited for once, not once a file.
    connection.execute("BEGIN")
    left_out: Counter[str] = Counter()
    for number, file in enumerate(files):
        readings = {name: read(file) for name, (_, read) in columns.items()}
        logger.info("reading %s", file.path)
        with file.reader(scratch, skip_invalid=options.skip_invalid) as (rows, of_file):
            rules = list(dict.fromkeys([*of_file, *(rule for each in readings.values() for rule in each.rules)]))
            values = [reading.value for reading in readings.values()]
            first = number * ROWS_OF_A_FILE
            left_out += _insert(connection, table, rows, values, rules, file=file, first=first, options=options)
    connection.execute("COMMIT; RESET disabled_optimizers")
    for what, count in left_out.items():
        logger.info("%d row(s) left out: %s", count, what)
    if set(left_out) - {NOT_MET}:
        connection.execute(f"DELETE FROM {table} WHERE broken IS NOT NULL")
    return dict(left_out)


def _insert(
    connection: duckdb.DuckDBPyConnection,
    table: str,
    rows: str,
    values: Sequence[str],
    rules: Sequence[Rule],
    *,
    file: LogFile,
    first: int,
    options: RowOptions,
) -> Counter[str]:
    """One file's rows, numbered behind `first`; returns how many break each rule, whose number stands with them."""
    rows = f"(SELECT * REPLACE ({first} + {ROW} AS {ROW}) FROM {rows})"
    cases = " ".join(f"WHEN ({rule.condition}) IS NOT TRUE THEN {number}" for number, rule in enumerate(rules))
    broken = f"CASE {cases} END" if rules else "NULL"
    chosen = ""
    if options.where:
        chosen = f"WHERE ({options.where})"
        _check_where(connection, f"SELECT 1 FROM {rows} {chosen}", options.where, file)
    execute(
        connection, f"INSERT INTO {table} SELECT {', '.join([ROW, broken, *values])} FROM {rows} {chosen}", file.path
    )
    found = connection.execute(
        f"SELECT broken, count(*), min(log_row) FROM {table} WHERE log_row > {first} AND broken IS NOT NULL "
        "GROUP BY broken ORDER BY min(log_row)"
    ).fetchall()
    if found and not options.skip_invalid:
        number, count, row = found[0]
        rule = rules[number]
        shown = execute(connection, f"SELECT {quoted(rule.column)}::VARCHAR FROM {rows} WHERE {ROW} = {row}")[0][0]
        got = "nothing" if shown is None else repr(shown[:100])
        if rule.explain is not None and shown is not None:
            got += f"; {rule.explain(shown)}"
        raise ValueError(f"{_place_in(file, row)}: {rule.text} ({count} such row(s)); got {got}")
    counts = file.rejected(connection) if options.skip_invalid else Counter()
    counts += Counter({rules[number].text: count for number, count, _ in found})
    if options.where:
        sql = f"SELECT count(*) FROM {rows} WHERE ({options.where}) IS NOT TRUE"
        counts[NOT_MET] = execute(connection, sql, file.path)[0][0]
    return +counts


def place_of(files: Sequence[LogFile], row: int) -> str:
    """How messages name a row of a table that `read_rows` made of these files, by its `log_row`."""
    return _place_in(files[row // ROWS_OF_A_FILE], row)


def _place_in(file: LogFile, row: int) -> str:
    return f"{file.path}, {file.place(row % ROWS_OF_A_FILE)}"


def _check_where(connection: duckdb.DuckDBPyConnection, sql: str, where: str, file: LogFile) -> None:
    """Raise ValueError if the condition is no condition, or not one on this file's columns."""
    try:
        if len(connection.extract_statements(sql)) != 1:
            raise ValueError(f"--where {where!r} must be one condition")
        connection.execute(f"EXPLAIN {sql}")
    except duckdb.Error as error:
        reason = " ".join(str(error).split("\n\n")[0].split())
        raise ValueError(f"--where {where!r} is no condition on the columns of {file.path}: {reason}") from error


def check_one_row_a_key(
    connection: duckdb.DuckDBPyConnection, table: str, files: Sequence[LogFile], column: str, *, skip: bool
) -> dict[str, int]:
    """See that each key stands in one row of attributes: which of several would be true of it?

    With `skip` all but the first row of a key are left out; returns how many.

    Raises:
        ValueError: a key stands in several rows, without `skip`.
    """
    if skip:
        earlier = f"SELECT key, min(log_row) AS log_row FROM {table} GROUP BY key"
        [(count,)] = connection.execute(
            f"DELETE FROM {table} AS t USING ({earlier}) AS e WHERE t.key = e.key AND t.log_row > e.log_row"
        ).fetchall()
        return {f"{column} stands in an earlier row, too": count} if count else {}
    found = connection.execute(
        f"SELECT key::VARCHAR, max(log_row) FROM {table} GROUP BY key HAVING count(*) > 1 ORDER BY 2 LIMIT 1"
    ).fetchall()
    if found:
        key, row = found[0]
        raise ValueError(
            f"{place_of(files, row)}: {column} {key!r} stands in an earlier row, too; give one row each "
            "(docs/own_data.md keeps the newest), or let --skip-invalid keep the first"
        )
    return {}


def count_duplicates(connection: duckdb.DuckDBPyConnection, table: str, *, drop: bool) -> dict[str, int | bool]:
    """Count rows that are equal to an earlier one in every column read, and with `drop` leave them out."""
    names = [row[0] for row in connection.execute(f"DESCRIBE {table}").fetchall()]
    equal = ", ".join(quoted(name) for name in names if name not in ("log_row", "broken"))
    [(count,)] = connection.execute(
        "SELECT coalesce(sum(n - 1), 0)::BIGINT FROM "
        f"(SELECT count(*) AS n FROM {table} GROUP BY hash({equal}) HAVING n > 1)"
    ).fetchall()
    if count:
        logger.info("%d row(s) are equal to another in every column; %s", count, "left out" if drop else "kept")
    if count and drop:
        connection.execute(
            f"CREATE TABLE kept AS SELECT * FROM {table} "
            f"QUALIFY row_number() OVER (PARTITION BY {equal} ORDER BY log_row) = 1; "
            f"DROP TABLE {table}; ALTER TABLE kept RENAME TO {table}"
        )
    return {"rows": count, "dropped": drop}
