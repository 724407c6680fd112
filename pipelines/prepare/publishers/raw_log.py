"""The stage between publishers' own ids and ours, for data sets whose ids are words or have gaps.

A data set's module fills the table

    raw     user_key, item_key (any type), time, rank, log_row, request_key, action and further columns of `events`

and this stage numbers users and items in the order of their keys and makes `events` and `users` of it.  The numbers
are kept in `item_ids` and `user_ids`, which are stored beside the samples.
"""

from collections.abc import Sequence

import duckdb

from pipelines.prepare.engine import quoted
from pipelines.prepare.source import value_column


def number_ids(
    connection: duckdb.DuckDBPyConnection, numbers: Sequence[str] = (), *, candidate: str = "true"
) -> tuple[int, int]:
    """Replace `raw` by `events` with whole numbers for users and items; returns the rows that their tables need.

    Both count from 1: 0 is the unknown.  `candidate` is SQL that tells which events have labels.
    """
    for name in ("item", "user"):
        connection.execute(
            f"CREATE TABLE {name}_ids AS SELECT {name}_key, row_number() OVER (ORDER BY {name}_key) AS {name}_id "
            f"FROM (SELECT DISTINCT {name}_key FROM raw)"
        )
    values = "".join(f", {quoted(name)} AS {quoted(value_column(name))}" for name in numbers)
    connection.execute(
        f"CREATE TABLE events AS SELECT user_id, item_id, time, rank, log_row, request_key, action, {candidate} AS "
        f"candidate{values} FROM raw JOIN item_ids USING (item_key) JOIN user_ids USING (user_key)"
    )
    connection.execute("DROP TABLE raw")
    [(items, users)] = connection.execute(
        "SELECT (SELECT count(*) FROM item_ids), (SELECT count(*) FROM user_ids)"
    ).fetchall()
    return items + 1, users + 1


def number_context(connection: duckdb.DuckDBPyConnection, table: str, names: Sequence[str]) -> dict[str, int]:
    """Make `users` of `table` (user_key and context columns of text); returns the rows that each one's table needs."""
    rows, numbered = number_values(connection, table, names)
    columns = "".join(f", {quoted(name)}" for name in names)
    connection.execute(
        f"CREATE TABLE users AS SELECT user_id{columns} FROM ({numbered}) JOIN user_ids USING (user_key)"
    )
    return rows


def number_values(
    connection: duckdb.DuckDBPyConnection, table: str, names: Sequence[str]
) -> tuple[dict[str, int], str]:
    """(rows that the table of each of these columns of text needs, SQL for `table` with numbers in their place).

    A value's number is its place among the sorted values, from 1 on; 0 is unknown.
    """
    rows, numbers, joins = {}, [], ""
    for name in names:
        ids, key, identifier = (quoted(f"{name}_{part}") for part in ("ids", "key", "id"))
        connection.execute(
            f"CREATE TABLE {ids} AS SELECT value AS {key}, row_number() OVER (ORDER BY value) AS {identifier} FROM "
            f"(SELECT DISTINCT {quoted(name)} AS value FROM {table} WHERE {quoted(name)} IS NOT NULL)"
        )
        rows[name] = int(connection.execute(f"SELECT count(*) FROM {ids}").fetchall()[0][0]) + 1
        numbers.append(f"coalesce({ids}.{identifier}, 0)::BIGINT AS {quoted(name)}")
        joins += f" LEFT JOIN {ids} ON t.{quoted(name)} = {ids}.{key}"
    replaced = f" REPLACE ({', '.join(numbers)})" if numbers else ""
    return rows, f"SELECT t.*{replaced} FROM {table} AS t{joins}"


def rating_mask(rating: str) -> str:
    """SQL for the action bits of a rating from 0.5 to 5."""
    return " + ".join(f"(CASE WHEN {rating} >= {least} THEN {1 << bit} ELSE 0 END)" for bit, least in RATING_BITS)


RATING_BITS = tuple(enumerate((2, 3, 4, 5)))
RATING_ACTIONS = ("rated_2_or_more", "rated_3_or_more", "rated_4_or_more", "rated_5")
"""A rating as ordered bits, so that one model reads and predicts it like any other action."""
