"""A generic event log: Parquet or CSV files with one row an event, whose columns are named on the command line.

This is the path that a company's own data takes.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import duckdb

from pipelines.features import MAX_ACTIONS
from pipelines.prepare.engine import (
    check_rows,
    csv_reader,
    execute,
    find_files,
    literal,
    numbered,
    parquet_reader,
    plain_file,
    quoted,
)
from pipelines.prepare.raw_log import number_context, number_ids
from pipelines.prepare.source import Description
from pipelines.prepare.stages import Load

TIMESTAMP = "timestamp"
PER_SECOND: Mapping[str, int] = {"s": 1, "ms": 1_000, "us": 1_000_000, "ns": 1_000_000_000, TIMESTAMP: 1_000_000}
"""Units of time in a second; dates and times are counted in microseconds."""
YEAR_2100 = 4_102_444_800
"""Later times are in a smaller unit than was said."""
TAKEN = (
    *("user_id", "item_id", "user_key", "item_key", "time", "timestamp", "rank", "log_row", "request_key"),
    *("action", "candidate", "place"),
)
"""Names of the preparation's own columns."""


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
    """Columns of whole numbers, separated by commas, that become further history lists; a missing value becomes 0."""
    request_column: str = ""
    """What was shown together: any type.  A user's events of one request become candidates of one sample, as events of
    one second always do; a missing value is no request."""

    def __post_init__(self) -> None:
        if self.time_unit not in PER_SECOND:
            raise ValueError(f"--time-unit must be one of {', '.join(PER_SECOND)}, got {self.time_unit}")
        if not self.action_columns:
            raise ValueError("--action-columns must name at least one column: the labels that a model learns")
        if self.action_values and len(names(self.action_columns)) != 1:
            raise ValueError("--action-values needs exactly one column in --action-columns")
        actions = names(self.action_values or self.action_columns)
        if len(set(actions)) != len(actions):
            raise ValueError(f"each action must be named once, got {', '.join(actions)}")
        if len(actions) > MAX_ACTIONS:
            raise ValueError(f"at most {MAX_ACTIONS} actions fit into a bit mask, got {len(actions)}: leave some out")
        self._check_names()

    def _check_names(self) -> None:
        """Who, what and when are three columns; context and history columns keep their names, which must be free."""
        key = [self.user_column, self.item_column, self.time_column]
        if len(set(key)) < len(key):
            raise ValueError(
                f"--user-column, --item-column and --time-column name {', '.join(key)}: these must be three columns"
            )
        chosen = [*names(self.context_columns), *names(self.history_columns)]
        for name in chosen:
            if name in TAKEN or name.startswith(("history_", "candidate_")):
                raise ValueError(f"column {name} cannot be a context or history column under this name; rename it")
            if chosen.count(name) > 1:
                raise ValueError(
                    f"column {name} is named twice in --context-columns and --history-columns; name it once"
                )


def names(text: str) -> tuple[str, ...]:
    """The parts of a list separated by commas."""
    return tuple(part.strip() for part in text.split(",") if part.strip())


def loader(options: EventLogOptions) -> Load:
    """What `prepare` calls for a log with these columns."""
    return partial(_load, options)


def _load(options: EventLogOptions, connection: duckdb.DuckDBPyConnection, source: Path, scratch: Path) -> Description:
    """Fill `events` and `users` from all Parquet and CSV files under `source`."""
    context, history = names(options.context_columns), names(options.history_columns)
    files = [(path, "row") for path in find_files(source, "*.parquet")]
    files += [(path, "line") for path in find_files(source, "*.csv")]
    if not files:
        raise ValueError(f"--source {source} holds no .parquet or .csv file (also .csv.gz, .csv.xz, .csv.zip)")
    actions, mask, rules = _actions(options)
    # CSV files are read as text and Parquet files as stored; the rules see what does not convert.
    columns = [options.user_column, options.item_column, options.time_column, *names(options.action_columns), *history]
    columns += [options.request_column] * bool(options.request_column)
    types = {**dict.fromkeys(columns), **dict.fromkeys(context, "VARCHAR")}
    further = "".join(f", coalesce({_whole(name)}, 0)::BIGINT AS {quoted(name)}" for name in history)
    further += "".join(f", {quoted(name)}" for name in context)
    user, item = (quoted(name) for name in (options.user_column, options.item_column))
    rules |= {f"{user} IS NOT NULL": f"{options.user_column} must not be missing"}
    rules |= {f"{item} IS NOT NULL": f"{options.item_column} must not be missing"}
    time, time_rules = _time(options)
    rules |= time_rules
    rules |= {
        f"{quoted(name)} IS NULL OR {_whole(name)} % 1 = 0": f"{name} must hold whole numbers" for name in history
    }
    for number, (path, unit) in enumerate(files):
        plain = plain_file(path, scratch)
        reader = csv_reader(plain, types) if unit == "line" else parquet_reader(connection, plain, types)
        check_rows(connection, reader, path, rules, 2 if unit == "line" else 1, unit=unit)
        execute(
            connection,
            f"{'INSERT INTO raw' if number else 'CREATE TABLE raw AS'} SELECT {user} AS user_key, {item} AS item_key, "
            f"{time} // {PER_SECOND[options.time_unit]} AS time, {time} AS rank, log_row, "
            f"{_request(options)} AS request_key, ({mask})::INTEGER AS action{further} "
            f"FROM {numbered(reader, number)}",
            path,
        )
        if plain != path:
            plain.unlink()
    first = "".join(f", arg_min({quoted(name)}, (rank, log_row)) AS {quoted(name)}" for name in context)
    connection.execute(f"CREATE TABLE user_columns AS SELECT user_key{first} FROM raw GROUP BY user_key")
    num_items = number_ids(connection, history)
    values = number_context(connection, "user_columns", context)
    return Description(
        name="event_log",
        num_items=num_items,
        context_features={name: len(known) + 1 for name, known in values.items()},
        context_values=values,
        actions=actions,
        history_features=history,
        source=f"event log in {source.resolve()}",
        licence="not stated",
    )


def _time(options: EventLogOptions) -> tuple[str, dict[str, str]]:
    """SQL for the time as a whole number, and the rules that it must keep."""
    name, unit = options.time_column, options.time_unit
    if unit == TIMESTAMP:
        count = f"epoch_us(TRY_CAST({quoted(name)} AS TIMESTAMPTZ))"
        rule = f"{name} must hold dates and times from 1970 on, none missing; for numbers give another --time-unit"
    else:
        count = _whole(name)
        rule = (
            f"{name} must hold whole numbers of {unit} since 1970, none negative or missing; for another unit, or "
            "dates and times, give --time-unit"
        )
    rules = {f"{count} >= 0 AND {count} % 1 = 0": rule}
    rules[f"{count} < {YEAR_2100 * PER_SECOND[unit]}"] = (
        f"{name} lies after the year 2100: is --time-unit {unit} right?"
    )
    return f"{count}::BIGINT", rules


def _request(options: EventLogOptions) -> str:
    """SQL that tells requests apart, NULL where none is known."""
    if not options.request_column:
        return "NULL::UBIGINT"
    column = quoted(options.request_column)
    return f"CASE WHEN {column} IS NOT NULL THEN hash({column}::VARCHAR) END"


def _whole(name: str) -> str:
    """SQL for a column's value where it is a number: as exact as any whole number, with its fraction if it has one."""
    return f"TRY_CAST({quoted(name)} AS DECIMAL(38, 9))"


def _actions(options: EventLogOptions) -> tuple[tuple[str, ...], str, dict[str, str]]:
    """The actions' names, SQL for their bits, and the rules that rows must keep."""
    columns, values = names(options.action_columns), names(options.action_values)
    if values:
        column = f"{quoted(columns[0])}::VARCHAR"
        terms = [
            f"(CASE WHEN {column} = {literal(value)} THEN {1 << bit} ELSE 0 END)" for bit, value in enumerate(values)
        ]
        rule = f"{column} IN ({', '.join(map(literal, values))})"
        return values, " + ".join(terms), {rule: f"{columns[0]} must be one of {', '.join(values)}"}
    mask = " + ".join(f"({quoted(name)}::DOUBLE::INTEGER << {bit})" for bit, name in enumerate(columns))
    rules = {f"TRY_CAST({quoted(name)} AS DOUBLE) IN (0, 1)": f"label {name} must be 0 or 1" for name in columns}
    return columns, mask, rules
