"""A generic event log: files with one row an event, whose columns are named on the command line or in a schema file.

This is the path that a company's own data takes.  Every column's meaning is in a `LogSchema`, wherever it comes from.
"""

import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import duckdb

from pipelines.features import ITEM_SPACE, USER_ID, Space
from pipelines.prepare.engine import quoted
from pipelines.prepare.log_files import open_files
from pipelines.prepare.log_rows import RowOptions, read_rows
from pipelines.prepare.log_schema import USER_SPACE, LogColumn, LogSchema, SpaceOptions
from pipelines.prepare.log_tables import LogSources, check_columns, log_columns, raw_columns, raw_name, space_types
from pipelines.prepare.source import Description
from pipelines.prepare.spaces import Keys, Lookup, look_up, number_keys
from pipelines.prepare.stages import Load
from pipelines.prepare.times import PER_SECOND, check_end

logger = logging.getLogger(__name__)

RAW = "raw"
"""The table of the log's rows as they are read."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EventLogOptions:
    """Names of the log's columns."""

    user_column: str
    """Who: any type."""
    item_column: str
    """What: any type."""
    time_column: str
    """When, in time_unit."""
    time_unit: str = "s"
    """What the time column holds: whole numbers of s, ms, us or ns since 1970, or timestamp: dates and times, in UTC
    where they name no zone."""
    action_columns: str = ""
    """Columns of 0 and 1, separated by commas, that become the actions; or one column of words with action_values."""
    action_values: str = ""
    """Words, separated by commas, that the one action column may hold; each is an action."""
    context_columns: str = ""
    """Columns, separated by commas, of which a user's first known value becomes a context feature."""
    history_columns: str = ""
    """Columns of numbers, separated by commas, that become further history lists; a missing value becomes NaN."""
    request_column: str = ""
    """What was shown together: any type.  A user's events of one request become candidates of one sample, as events of
    one second always do; a missing value is no request."""
    where: str = ""
    """An SQL condition on the log's columns, which are text in CSV files; rows that do not meet it are left out and
    counted."""
    skip_invalid: bool = False
    """Leave out and count rows that break a rule, by the rule, instead of ending at the first."""
    drop_duplicates: bool = False
    """Keep one of rows that are equal in every column read; otherwise they are only counted."""

    def schema(self) -> LogSchema:
        """The description of the log that these options are.  Raises ValueError if they contradict each other."""
        context = tuple(
            LogColumn(name=name, column=name, kind="id", space=USER_SPACE if name == USER_ID else name)
            for name in names(self.context_columns)
        )
        history = tuple(LogColumn(name=name, column=name, kind="number") for name in names(self.history_columns))
        return LogSchema(
            user=self.user_column,
            item=self.item_column,
            time=self.time_column,
            time_unit=self.time_unit,
            actions=names(self.action_columns),
            action_values=names(self.action_values),
            columns={"sample": context, "event": history},
            request=self.request_column or None,
            where=self.where or None,
            skip_invalid=self.skip_invalid,
            drop_duplicates=self.drop_duplicates,
        )


def names(text: str) -> tuple[str, ...]:
    """The parts of a list separated by commas."""
    return tuple(part.strip() for part in text.split(",") if part.strip())


def loader(options: EventLogOptions) -> Load:
    """What `prepare` calls for a log with these columns."""
    return partial(_load, options.schema())


def _load(schema: LogSchema, connection: duckdb.DuckDBPyConnection, source: Path, scratch: Path) -> Description:
    """Fill `events` and `users` from the files of data under `source`."""
    sources = LogSources(log=open_files(connection, source, scratch))
    check_columns(schema, sources)
    columns = raw_columns(schema, space_types(schema, sources))
    options = RowOptions(where=schema.where, skip_invalid=schema.skip_invalid)
    left_out = read_rows(connection, sources.log, RAW, columns, scratch, options)
    [(rows, last)] = connection.execute(f"SELECT count(*), max(rank) FROM {RAW}").fetchall()
    if not rows:
        reasons = "".join(f"; left out: {what} ({count} rows)" for what, count in left_out.items())
        raise ValueError(f"the source holds no events with labels{reasons}")
    check_end(last, schema.time_unit, schema.time)
    duplicates = _duplicates(connection, columns, drop=schema.drop_duplicates)
    spaces = _number_spaces(connection, schema)
    _make_events(connection, schema, spaces)
    _make_users(connection, schema, spaces)
    return Description(
        name="event_log",
        num_items=spaces[ITEM_SPACE].rows,
        context_features={column.name: spaces[column.space].rows for column in schema.of("sample") if column.space},
        actions=schema.action_values or schema.actions,
        history_features=tuple(column.name for column in schema.of("event")),
        source=f"event log in {source.resolve()}",
        licence="not stated",
        details={"left_out": left_out, "duplicates": duplicates},
    )


def _duplicates(connection: duckdb.DuckDBPyConnection, columns: Iterable[str], *, drop: bool) -> dict[str, Any]:
    """Count rows that are equal to an earlier one in every column, and with `drop` leave them out."""
    equal = ", ".join(map(quoted, columns))
    [(count,)] = connection.execute(
        "SELECT coalesce(sum(n - 1), 0)::BIGINT FROM "
        f"(SELECT count(*) AS n FROM {RAW} GROUP BY hash({equal}) HAVING n > 1)"
    ).fetchall()
    if count:
        logger.info("%d row(s) are equal to another in every column; %s", count, "left out" if drop else "kept")
    if count and drop:
        connection.execute(
            f"CREATE TABLE kept AS SELECT * FROM {RAW} "
            f"QUALIFY row_number() OVER (PARTITION BY {equal} ORDER BY log_row) = 1; "
            f"DROP TABLE {RAW}; ALTER TABLE kept RENAME TO {RAW}"
        )
    return {"rows": count, "dropped": drop}


def _number_spaces(connection: duckdb.DuckDBPyConnection, schema: LogSchema) -> dict[str, Space]:
    """The dictionaries of all spaces, from every column that has keys of them."""
    keys = {
        USER_SPACE: [Keys(table=RAW, column="user_key", many=False)],
        ITEM_SPACE: [Keys(table=RAW, column="item_key", many=False)],
    }
    for column in log_columns(schema):
        if column.space is not None:
            source = Keys(table=RAW, column=raw_name(column), many=column.kind == "ids")
            keys.setdefault(column.space, []).append(source)
    return {
        name: number_keys(connection, name, sources, schema.spaces.get(name, SpaceOptions()))
        for name, sources in keys.items()
    }


def _make_events(connection: duckdb.DuckDBPyConnection, schema: LogSchema, spaces: Mapping[str, Space]) -> None:
    """The table `events`, with ids in place of keys."""
    lookups = [
        Lookup(space=spaces[USER_SPACE], column="user_key"),
        Lookup(space=spaces[ITEM_SPACE], column="item_key"),
    ]
    (user, item), joins = look_up(connection, RAW, lookups)
    further = "".join(
        f", coalesce(t.{quoted(raw_name(column))}, 'nan'::DOUBLE) AS {quoted(column.name)}"
        for column in schema.of("event")
    )
    connection.execute(
        f"CREATE TABLE events AS SELECT {user} AS user_id, {item} AS item_id, t.rank // {PER_SECOND[schema.time_unit]} "
        f"AS time, t.rank, t.log_row, t.request_key, t.action, true AS candidate{further} FROM {RAW} AS t{joins}"
    )


def _make_users(connection: duckdb.DuckDBPyConnection, schema: LogSchema, spaces: Mapping[str, Space]) -> None:
    """The table `users`: a user's first known values."""
    columns = [column for column in schema.of("sample") if column.name != USER_ID]
    first = "".join(
        f", arg_min({quoted(raw_name(column))}, (rank, log_row)) AS {quoted(column.name)}" for column in columns
    )
    connection.execute(f"CREATE TABLE user_values AS SELECT user_key{first} FROM {RAW} GROUP BY user_key")
    lookups = [Lookup(space=spaces[USER_SPACE], column="user_key")]
    lookups += [Lookup(space=spaces[column.space or ""], column=column.name) for column in columns]
    (user, *ids), joins = look_up(connection, "user_values", lookups)
    values = "".join(f", {value} AS {quoted(column.name)}" for value, column in zip(ids, columns, strict=True))
    connection.execute(f"CREATE TABLE users AS SELECT {user} AS user_id{values} FROM user_values AS t{joins}")
