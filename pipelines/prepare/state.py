"""What a data set keeps beside its samples, so that the next day's log can be added to it.

    events_before         each user's newest events
    users_before          columns of samples, by user
    TABLE_before          the newest row of each user and item in files of attributes, also of those without an id yet
    counts_GROUP_before   what was counted of each group (`pipelines.prepare.samples.counts`)
    SPACE_waiting_before  keys that are too rare for an id yet, as text, and how often they came (`waiting`)

The dictionaries of its spaces are stored already.  In an extension these tables stand beside those of the new log.
"""

from collections.abc import Sequence
from pathlib import Path

import duckdb
import pyarrow.parquet as pq

from pipelines.features import USER_ID, DatasetInfo
from pipelines.prepare.engine import file_literal, literal, quoted, table_exists
from pipelines.prepare.log.schema import ROW_LISTS, schema_from_dict
from pipelines.prepare.log.tables import ITEMS, USERS, raw_name
from pipelines.prepare.log.times import NANOSECONDS, YEAR_1990
from pipelines.prepare.source import MISSING, CountedGroup, Description, sample_column, value_column

STATE = "state"
"""The folder of the state, followed by the number of the part that it includes, if that is not the first."""
EARLIER = "an earlier version of this project kept the state, so no log can be added; prepare the data set again"
OF_EVENTS = ("log_row", "user_id", "item_id", "time", "rank", "request_key", "action")
"""What is kept of every event, beside its values."""
BEFORE = "_before"
EVENTS, USERS_BEFORE = f"events{BEFORE}", f"users{BEFORE}"


def waiting(space: str) -> str:
    """The table (key, n) of a space's keys that have come too rarely for an id, where the space has a min_count."""
    return f"{space}_waiting{BEFORE}"


def write_state(
    connection: duckdb.DuckDBPyConnection, about: Description, folder: Path, max_history: int, values: list[str]
) -> None:
    """Store the state that follows from the tables of a preparation or an extension in a new folder.

    `values` are the columns of `events` that hold values of the log, without what was counted.
    """
    folder.mkdir(parents=True)
    names = ", ".join((*OF_EVENTS[1:], *map(quoted, values)))
    older = f" UNION ALL BY NAME SELECT log_row, {names} FROM {EVENTS}" if table_exists(connection, EVENTS) else ""
    connection.execute(
        # Of equal ranks, those of an earlier delivery come first: their rows count up to -1.
        f"CREATE OR REPLACE TABLE {EVENTS} AS SELECT -age AS log_row, {names} FROM (SELECT *, row_number() OVER "
        f"(PARTITION BY user_id ORDER BY rank DESC, log_row DESC) AS age FROM "
        f"(SELECT log_row, {names} FROM events WHERE candidate{older})) WHERE age <= {max_history}"
    )
    _keep_users(connection, about)
    for table in (USERS, ITEMS):
        if table_exists(connection, table):
            rows = f"SELECT * EXCLUDE (log_row, broken) FROM {table}"
            connection.execute(f"CREATE OR REPLACE TABLE {table + BEFORE} AS {rows}")
    tables = connection.execute("SELECT table_name FROM duckdb_tables() WHERE ends_with(table_name, ?)", [BEFORE])
    for (table,) in tables.fetchall():
        path = literal(str(folder / f"{table}.parquet"))
        connection.execute(f"COPY {quoted(table)} TO {path} (FORMAT parquet, COMPRESSION zstd)")


def _keep_users(connection: duckdb.DuckDBPyConnection, about: Description) -> None:
    """Make the table USERS_BEFORE: `users`, with what events told last."""
    changing = [column for column in about.columns if column.part == "sample" and column.name in about.changing]
    newest = "".join(
        # Missing values count as none.
        f", arg_max(nullif({quoted(sample_column(each.name))}, {MISSING[each.kind]}), (rank, log_row)) AS "
        f"{quoted(each.name)}"
        for each in changing
    )
    values = ", ".join(
        f"coalesce(n.{quoted(each.name)}, u.{quoted(each.name)}) AS {quoted(each.name)}" for each in changing
    )
    connection.execute(
        f"CREATE OR REPLACE TABLE {USERS_BEFORE} AS SELECT u.*{f' REPLACE ({values})' if changing else ''} FROM users "
        f"AS u LEFT JOIN (SELECT user_id{newest} FROM events WHERE candidate GROUP BY user_id) AS n USING (user_id)"
    )


def check_state(folder: Path, state: str, info: DatasetInfo, groups: Sequence[CountedGroup]) -> None:
    """See that the state in `folder / state` is what this version goes on from; `groups` are what candidates count.

    Raises:
        ValueError: a table or a column is missing, or times are in another unit: an earlier version wrote it.
    """
    schema = schema_from_dict(info.details["log"])
    values = [value_column(column.name) for part in ROW_LISTS for column in schema.of(part)]
    needed = {
        EVENTS: [*OF_EVENTS, *values],
        USERS_BEFORE: [USER_ID, *(each.name for each in schema.of("sample") if each.name != USER_ID)],
        **{f"counts_{group.counts.group}{BEFORE}": [*group.keys, *group.counts.columns] for group in groups},
    }
    for table, attributes in ((USERS, schema.users), (ITEMS, schema.items)):
        if attributes is not None:
            needed[table + BEFORE] = ["key", *(raw_name(column) for column in attributes.columns)]
    for table, columns in needed.items():
        path = folder / state / f"{table}.parquet"
        lacking = set(columns) - set(pq.read_schema(path).names) if path.exists() else {"the file"}
        if lacking:
            raise ValueError(f"{path} lacks {', '.join(sorted(lacking))}: {EARLIER}")
    path = folder / state / f"{EVENTS}.parquet"
    [(newest,)] = duckdb.execute(f"SELECT max(rank) FROM read_parquet({file_literal(path)})").fetchall()
    if newest < YEAR_1990 * NANOSECONDS:
        raise ValueError(f"the times in {folder / state} are no nanoseconds: {EARLIER}")


def read_state(connection: duckdb.DuckDBPyConnection, folder: Path, state: str, info: DatasetInfo) -> None:
    """Make the tables of the state in `folder / state`, and of the dictionaries of the data set in `folder`."""
    paths = [(path.stem, path) for path in sorted((folder / state).glob("*.parquet"))]
    for table, path in paths:
        connection.execute(f"CREATE TABLE {quoted(table)} AS SELECT * FROM read_parquet({file_literal(path)})")
    for space in info.spaces.values():
        if space.keys is not None:
            keys = f"SELECT * FROM read_parquet({file_literal(folder / space.keys)})"
            # An extension that ended early may have left keys that the description does not know.
            known = f"{quoted(f'{space.name}_id')} < {space.used}"
            connection.execute(f"CREATE TABLE {quoted(f'{space.name}_ids')} AS {keys} WHERE {known}")
