"""A generic event log: Parquet or CSV files with one row an event, whose columns are named on the command line.

This is the path that a company's own data takes.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import duckdb

from pipelines.prepare.engine import (
    check_rows,
    csv_reader,
    execute,
    find_files,
    literal,
    parquet_reader,
    plain_file,
    quoted,
)
from pipelines.prepare.raw_log import number_context, number_ids
from pipelines.prepare.source import Description
from pipelines.prepare.stages import Load

TIME_UNITS: Mapping[str, int] = {"s": 1, "ms": 1_000, "us": 1_000_000, "ns": 1_000_000_000}


@dataclass(frozen=True, kw_only=True, slots=True)
class EventLogOptions:
    """Names of the log's columns."""

    user_column: str
    """Who: any type."""
    item_column: str
    """What: any type."""
    time_column: str
    """When: whole numbers since 1970 in time_unit."""
    time_unit: str = "s"
    """Unit of the time column: s, ms, us or ns."""
    action_columns: str = ""
    """Columns of 0 and 1, separated by commas, that become the actions; or one column of words with action_values."""
    action_values: str = ""
    """Words, separated by commas, that the one action column may hold; each is an action."""
    context_columns: str = ""
    """Columns, separated by commas, of which a user's first known value becomes a context feature."""
    history_columns: str = ""
    """Columns of whole numbers, separated by commas, that become further history lists."""

    def __post_init__(self) -> None:
        if self.time_unit not in TIME_UNITS:
            raise ValueError(f"--time-unit must be one of {', '.join(TIME_UNITS)}, got {self.time_unit}")
        if not self.action_columns:
            raise ValueError("--action-columns must name at least one column: the labels that a model learns")
        if self.action_values and len(names(self.action_columns)) != 1:
            raise ValueError("--action-values needs exactly one column in --action-columns")


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
    types = {options.user_column: "VARCHAR", options.item_column: "VARCHAR", options.time_column: "BIGINT"}
    types |= dict.fromkeys(names(options.action_columns), "VARCHAR" if options.action_values else "BIGINT")
    types |= dict.fromkeys(history, "BIGINT") | dict.fromkeys(context, "VARCHAR")
    further = "".join(f", coalesce({quoted(name)}, 0) AS {quoted(name)}" for name in history)
    further += "".join(f", {quoted(name)}" for name in context)
    user, item, time = (quoted(name) for name in (options.user_column, options.item_column, options.time_column))
    rules |= {f"{user} IS NOT NULL": f"{options.user_column} must not be missing"}
    rules |= {f"{item} IS NOT NULL": f"{options.item_column} must not be missing"}
    rules |= {f"{time} >= 0": f"{options.time_column} must not be negative or missing"}
    for number, (path, unit) in enumerate(files):
        plain = plain_file(path, scratch)
        # Keys of Parquet files keep their type: whole numbers are far smaller than words.
        stored = {**types, options.user_column: None, options.item_column: None}
        reader = csv_reader(plain, types) if unit == "line" else parquet_reader(connection, plain, stored)
        check_rows(connection, reader, path, rules, 2 if unit == "line" else 1, unit=unit)
        execute(
            connection,
            f"{'INSERT INTO raw' if number else 'CREATE TABLE raw AS'} SELECT {user} AS user_key, {item} AS item_key, "
            f"{time} // {TIME_UNITS[options.time_unit]} AS time, {time} AS rank, ({mask})::INTEGER AS action{further} "
            f"FROM {reader}",
            path,
        )
        if plain != path:
            plain.unlink()
    first = "".join(f", arg_min({quoted(name)}, rank) AS {quoted(name)}" for name in context)
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


def _actions(options: EventLogOptions) -> tuple[tuple[str, ...], str, dict[str, str]]:
    """The actions' names, SQL for their bits, and the rules that rows must keep."""
    columns, values = names(options.action_columns), names(options.action_values)
    if values:
        column = quoted(columns[0])
        terms = [
            f"(CASE WHEN {column} = {literal(value)} THEN {1 << bit} ELSE 0 END)" for bit, value in enumerate(values)
        ]
        rule = f"{column} IN ({', '.join(map(literal, values))})"
        return values, " + ".join(terms), {rule: f"{columns[0]} must be one of {', '.join(values)}"}
    mask = " + ".join(f"({quoted(name)} << {bit})" for bit, name in enumerate(columns))
    return columns, mask, {f"{quoted(name)} IN (0, 1)": f"label {name} must be 0 or 1" for name in columns}
