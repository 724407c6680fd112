"""From the keys of a described log to ids: the tables that the later stages read.

events   user_id, item_id, time, rank, log_row, request_key, action, candidate, a `value_column` a column, a
         `sample_column` a column of samples that the log tells
users    user_id, a column a column of samples: attributes, and what earlier parts of the log told last
items    item_id, a column a column of items
"""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

import duckdb

from pipelines.features import ITEM_SPACE, NUMBER_KEYS, TEXT_KEYS, DatasetInfo, Space
from pipelines.prepare.engine import quoted, table_exists
from pipelines.prepare.log.readings import TEXT, WIDEST, IdType, Stored
from pipelines.prepare.log.schema import ROW_LISTS, LogColumn, LogSchema, SpaceOptions
from pipelines.prepare.log.tables import ITEMS, RAW, USERS, log_columns, raw_name
from pipelines.prepare.log.times import NANOSECONDS
from pipelines.prepare.source import MISSING, USER_SPACE, sample_column, value_column
from pipelines.prepare.spaces import Keys, Lookup, look_up, number_keys
from pipelines.prepare.state import BEFORE, EVENTS, USERS_BEFORE
from pipelines.storage.dataset_json import DATASET_FILE

logger = logging.getLogger(__name__)


def stored_keys(connection: duckdb.DuckDBPyConnection, known: DatasetInfo) -> list[tuple[str, Stored]]:
    """The columns of the dictionaries that earlier parts of the data have made, with their spaces; of keys that are ids
    themselves, as what they were read."""
    found = []
    for space in known.spaces.values():
        if space.key_kind is not None:
            kind = TEXT if space.key_kind == TEXT_KEYS else "BIGINT"
            found.append((space.name, Stored(path=Path(DATASET_FILE), name=space.name, type=kind)))
        if space.keys is not None:
            table = connection.execute(f"DESCRIBE {quoted(f'{space.name}_ids')}").fetchall()
            types = {name: kind for name, kind, *_ in table}
            key = f"{space.name}_key"
            found.append((space.name, Stored(path=Path(space.keys), name=key, type=types[key])))
    return found


def check_key_kinds(known: DatasetInfo, types: Mapping[str, IdType]) -> None:
    """Raise ValueError if whole numbers that are ids themselves are text in a delivery: they would be other ids."""
    for space in known.spaces.values():
        if space.key_kind == NUMBER_KEYS and types[space.name].name == TEXT:
            raise ValueError(
                f"space {space.name}: its keys are ids themselves, and those of the deliveries before were whole "
                "numbers, in this one some are text (as all of CSV and JSON files are): store them as whole numbers"
            )


def leave_out_late_rows(connection: duckdb.DuckDBPyConnection, schema: LogSchema, *, skip: bool) -> dict[str, int]:
    """Rows that are older than the end of the parts before belong into those, and their histories are written.

    Raises ValueError if there are any, or with `skip` leaves them out and returns their number.
    """
    [(end, shown)] = connection.execute(f"SELECT max(rank), {_date('max(rank)')} FROM {EVENTS}").fetchall()
    late = f"FROM {RAW} WHERE rank < {end}"
    [(count, first)] = connection.execute(f"SELECT count(*), {_date('min(rank)')} {late}").fetchall()
    if not count:
        return {}
    text = f"{schema.time} lies before the end of the parts before"
    if not skip:
        raise ValueError(
            f"{text} in {count} row(s), the earliest at {first}, the end at {shown}: a delivery goes on where the "
            "last one ended; --skip-invalid leaves such rows out"
        )
    connection.execute(f"DELETE {late}")
    return {text: count}


def _date(rank: str) -> str:
    """SQL of a time as messages show it."""
    return f"make_timestamp_ns({rank})::VARCHAR"


def number_spaces(
    connection: duckdb.DuckDBPyConnection,
    schema: LogSchema,
    types: Mapping[str, IdType],
    known: DatasetInfo | None = None,
) -> dict[str, Space]:
    """The dictionaries of all spaces, from every column that has keys of them; ids of `known` stay.

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
    earlier = known.spaces if known is not None else {}
    for name in set(earlier) & set(types):
        key = quoted(f"{name}_key")
        if table_exists(connection, f"{name}_ids"):
            connection.execute(f"ALTER TABLE {quoted(f'{name}_ids')} ALTER {key} TYPE {types[name].name}")
    labels = {column.space for column in schema.of("label")}
    found = {}
    for name, sources in keys.items():
        options = schema.spaces.get(name, SpaceOptions())
        found[name] = number_keys(
            connection,
            name,
            sources,
            options,
            earlier.get(name),
            is_text=types[name].name == TEXT,
            of_label=name in labels,
        )
    return found


def make_events(connection: duckdb.DuckDBPyConnection, schema: LogSchema, spaces: Mapping[str, Space]) -> None:
    """The table `events`, of the log's rows."""
    columns = {value_column(column.name): column for part in ROW_LISTS for column in schema.of(part)}
    columns |= {sample_column(column.name): column for column in schema.told}
    lookups = [Lookup(space=spaces[USER_SPACE], column="user_key"), Lookup(space=spaces[ITEM_SPACE], column="item_key")]
    (user, item, *values), joins = _encoded(connection, RAW, lookups, list(columns.values()), spaces)
    further = "".join(f", {value} AS {quoted(name)}" for value, name in zip(values, columns, strict=True))
    # Behind equal times, the log's own order, or that of the sequence: numbers by their size, in text as well.
    row = "t.log_row"
    if schema.sequence is not None:
        order = f"t.rank, TRY_CAST(t.sequence::VARCHAR AS {WIDEST}), t.sequence, t.log_row"
        row = f"row_number() OVER (ORDER BY {order})"
    connection.execute(
        f"CREATE TABLE events AS SELECT {user} AS user_id, {item} AS item_id, t.rank // {NANOSECONDS} "
        f"AS time, t.rank, {row} AS log_row, t.request_key, t.action, true AS candidate{further} FROM {RAW} AS t{joins}"
    )


def add_earlier_events(connection: duckdb.DuckDBPyConnection, *, drop: bool) -> int:
    """Add what earlier parts tell of the users of `events`, if there are any.

    Returns how many rows of the log stood at the end of the parts before already, equal in all that is kept of events;
    with `drop` they are left out.
    """
    if not table_exists(connection, EVENTS):
        return 0
    kept = [name for name, *_ in connection.execute(f"DESCRIBE {EVENTS}").fetchall() if name != "log_row"]
    equal = " AND ".join(f"e.{quoted(name)} IS NOT DISTINCT FROM b.{quoted(name)}" for name in kept)
    ended = f"(SELECT * FROM {EVENTS} WHERE rank = (SELECT max(rank) FROM {EVENTS}))"
    twice = f"FROM events AS e WHERE EXISTS (SELECT 1 FROM {ended} AS b WHERE {equal})"
    [(count,)] = connection.execute(f"SELECT count(*) {twice}").fetchall()
    if count:
        logger.warning(
            "%d row(s) are equal to one with which the parts before ended, as where a delivery begins with the moment "
            "at which the last one ended; %s",
            *(count, "left out" if drop else "kept, so they count twice: --drop-duplicates leaves them out"),
        )
    if count and drop:
        connection.execute(f"DELETE FROM events WHERE log_row IN (SELECT log_row {twice})")
    connection.execute(
        f"INSERT INTO events BY NAME SELECT *, false AS candidate FROM {EVENTS} "
        "WHERE user_id IN (SELECT user_id FROM events)"
    )
    return int(count)


def make_users(connection: duckdb.DuckDBPyConnection, schema: LogSchema, spaces: Mapping[str, Space]) -> None:
    """The table `users`: attributes, and what earlier parts of the log told last."""
    connection.execute(f"CREATE TABLE users_of_log AS SELECT DISTINCT user_key AS key FROM {RAW}")
    attributes = schema.users.columns if schema.users else ()
    _join_attributes(connection, "users", USER_SPACE, attributes, spaces)
    known, joined = [f"{MISSING[each.kind]} AS {quoted(each.name)}" for each in schema.told], ""
    if table_exists(connection, USERS_BEFORE):
        known = [
            f"coalesce(b.{quoted(each.name)}, {MISSING[each.kind]}) AS {quoted(each.name)}" for each in schema.told
        ]
        joined = f"FULL JOIN {USERS_BEFORE} AS b USING (user_id)"
    values = "".join(f", {each}" for each in [*known, *(f"t.{quoted(each.name)}" for each in attributes)])
    connection.execute(f"CREATE OR REPLACE TABLE users AS SELECT user_id{values} FROM users AS t {joined}")


def make_items(connection: duckdb.DuckDBPyConnection, schema: LogSchema, spaces: Mapping[str, Space]) -> None:
    """The table `items`: attributes of the items that have an id of their own."""
    if schema.items is not None:
        connection.execute("CREATE TABLE items_of_log AS SELECT item_key AS key FROM item_ids")
        _join_attributes(connection, "items", ITEM_SPACE, schema.items.columns, spaces)


def add_earlier_attributes(connection: duckdb.DuckDBPyConnection, schema: LogSchema) -> None:
    """Add what earlier deliveries said of users and items that this one says nothing of."""
    for table, attributes in ((USERS, schema.users), (ITEMS, schema.items)):
        if attributes is None:
            continue
        connection.execute(
            f"CREATE TABLE completed AS SELECT * FROM {table} UNION ALL BY NAME SELECT * FROM {table + BEFORE} "
            # A delivery may store keys in another type.
            f"WHERE key::VARCHAR NOT IN (SELECT key::VARCHAR FROM {table}); DROP TABLE {table}; "
            f"ALTER TABLE completed RENAME TO {table}"
        )


def _join_attributes(
    connection: duckdb.DuckDBPyConnection,
    table: str,
    space: str,
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
    lookup = Lookup(space=spaces[space], column="key")
    (identifier, *values), joins = _encoded(connection, joined, [lookup], attributes, spaces)
    further = "".join(f", {value} AS {quoted(each.name)}" for value, each in zip(values, attributes, strict=True))
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
