"""From the keys of a described log to ids: the tables that the later stages read.

events   user_id, item_id, time, rank, log_row, request_key, action, candidate, a `value_column` a column
users    user_id, a column a column of samples
items    item_id, a column a column of items
"""

from collections.abc import Mapping, Sequence

import duckdb

from pipelines.features import ITEM_SPACE, USER_ID, Space
from pipelines.prepare.engine import quoted
from pipelines.prepare.log_schema import ROW_LISTS, LogColumn, LogSchema, SpaceOptions
from pipelines.prepare.log_tables import ITEMS, RAW, USERS, log_columns, raw_name
from pipelines.prepare.source import USER_SPACE, value_column
from pipelines.prepare.spaces import Keys, Lookup, look_up, number_keys
from pipelines.prepare.times import PER_SECOND


def number_spaces(connection: duckdb.DuckDBPyConnection, schema: LogSchema) -> dict[str, Space]:
    """The dictionaries of all spaces, from every column that has keys of them.

    Users and items are those of the log: others, of which only files of attributes know, get no id.
    """
    keys = {
        USER_SPACE: [Keys(table=RAW, column="user_key")],
        ITEM_SPACE: [Keys(table=RAW, column="item_key")],
    }
    tables = [(RAW, log_columns(schema))]
    tables += [(USERS, list(schema.users.columns))] if schema.users else []
    tables += [(ITEMS, list(schema.items.columns))] if schema.items else []
    for table, columns in tables:
        for column in columns:
            if column.space is not None:
                source = Keys(table=table, column=raw_name(column), many=column.kind == "ids")
                keys.setdefault(column.space, []).append(source)
    return {
        name: number_keys(connection, name, sources, schema.spaces.get(name, SpaceOptions()))
        for name, sources in keys.items()
    }


def make_events(connection: duckdb.DuckDBPyConnection, schema: LogSchema, spaces: Mapping[str, Space]) -> None:
    """The table `events`, of the log's rows."""
    columns = {column.name: column for part in ROW_LISTS for column in schema.of(part)}
    lookups = [Lookup(space=spaces[USER_SPACE], column="user_key"), Lookup(space=spaces[ITEM_SPACE], column="item_key")]
    (user, item, *values), joins = _encoded(connection, RAW, lookups, list(columns.values()), spaces)
    further = "".join(f", {value} AS {quoted(value_column(name))}" for value, name in zip(values, columns, strict=True))
    connection.execute(
        f"CREATE TABLE events AS SELECT {user} AS user_id, {item} AS item_id, t.rank // {PER_SECOND[schema.time_unit]} "
        f"AS time, t.rank, t.log_row, t.request_key, t.action, true AS candidate{further} FROM {RAW} AS t{joins}"
    )


def make_users(connection: duckdb.DuckDBPyConnection, schema: LogSchema, spaces: Mapping[str, Space]) -> None:
    """The table `users`: a user's first known values in the log, and attributes."""
    of_log = [column for column in schema.columns.get("sample", ()) if column.name != USER_ID]
    known = "".join(f", {_first_known(column)} AS {quoted(raw_name(column))}" for column in of_log)
    connection.execute(f"CREATE TABLE users_of_log AS SELECT user_key AS key{known} FROM {RAW} GROUP BY user_key")
    _join_attributes(connection, "users", USER_SPACE, of_log, schema.users.columns if schema.users else (), spaces)


def make_items(connection: duckdb.DuckDBPyConnection, schema: LogSchema, spaces: Mapping[str, Space]) -> None:
    """The table `items`: attributes of the items that have an id of their own."""
    if schema.items is not None:
        connection.execute(f"CREATE TABLE items_of_log AS SELECT DISTINCT item_key AS key FROM {RAW}")
        _join_attributes(connection, "items", ITEM_SPACE, (), schema.items.columns, spaces)
        connection.execute("DELETE FROM items WHERE item_id = 0")


def _first_known(column: LogColumn) -> str:
    """SQL of a user's first value that is not missing."""
    value = quoted(raw_name(column))
    if column.kind == "ids":
        value = f"nullif({value}, [])"
    return f"arg_min({value}, (rank, log_row))"


def _join_attributes(
    connection: duckdb.DuckDBPyConnection,
    table: str,
    space: str,
    of_log: Sequence[LogColumn],
    attributes: Sequence[LogColumn],
    spaces: Mapping[str, Space],
) -> None:
    """Make `users` or `items` of `TABLE_of_log` and the rows of the files of attributes, where there are any."""
    joined = f"{table}_of_log"
    if attributes:
        joined = f"{table}_joined"
        further = "".join(f", a.{quoted(raw_name(column))}" for column in attributes)
        connection.execute(
            f"CREATE TABLE {joined} AS SELECT t.*{further} FROM {table}_of_log AS t "
            f"LEFT JOIN {USERS if space == USER_SPACE else ITEMS} AS a USING (key)"
        )
    columns = [*of_log, *attributes]
    lookup = Lookup(space=spaces[space], column="key")
    (identifier, *values), joins = _encoded(connection, joined, [lookup], columns, spaces)
    further = "".join(f", {value} AS {quoted(each.name)}" for value, each in zip(values, columns, strict=True))
    connection.execute(f"CREATE TABLE {table} AS SELECT {identifier} AS {space}_id{further} FROM {joined} AS t{joins}")


def _encoded(
    connection: duckdb.DuckDBPyConnection,
    table: str,
    lookups: Sequence[Lookup],
    columns: Sequence[LogColumn],
    spaces: Mapping[str, Space],
) -> tuple[list[str], str]:
    """(SQL of ids for the lookups and then of the columns' values, SQL of the joins that it takes)."""
    keyed = [
        Lookup(space=spaces[column.space], column=raw_name(column), many=column.kind == "ids")
        for column in columns
        if column.space is not None
    ]
    ids, joins = look_up(connection, table, [*lookups, *keyed])
    rest = iter(ids[len(lookups) :])
    values = [
        next(rest) if column.space is not None else f"coalesce(t.{quoted(raw_name(column))}, 'nan'::DOUBLE)"
        for column in columns
    ]
    return [*ids[: len(lookups)], *values], joins
