"""The stage between publishers' own ids and ours, for data sets whose ids are words or have gaps.

A data set's module fills the table

    raw     user_key, item_key (any type), time, rank, log_row, request_key, action and further columns of `events`

and this stage numbers users and items in the order of their keys and makes `events` and `users` of it.  The numbers
are kept in `item_ids` and `user_ids`, which are stored beside the samples.
"""

from collections.abc import Sequence

import duckdb

from pipelines.prepare.engine import quoted

UNKNOWN_ITEM = 0
"""Item id that no event has: room for items that appear after the preparation."""


def number_ids(connection: duckdb.DuckDBPyConnection, history: Sequence[str] = ()) -> int:
    """Replace `raw` by `events` with whole numbers for users and items; returns the number of item ids."""
    connection.execute(
        f"CREATE TABLE item_ids AS SELECT item_key, {UNKNOWN_ITEM} + row_number() OVER (ORDER BY item_key) AS item_id "
        "FROM (SELECT DISTINCT item_key FROM raw)"
    )
    connection.execute(
        "CREATE TABLE user_ids AS SELECT user_key, row_number() OVER (ORDER BY user_key) - 1 AS user_id "
        "FROM (SELECT DISTINCT user_key FROM raw)"
    )
    columns = "".join(f", {quoted(name)}" for name in history)
    connection.execute(
        f"CREATE TABLE events AS SELECT user_id, item_id, time, rank, log_row, request_key, action, "
        f"true AS candidate{columns} FROM raw JOIN item_ids USING (item_key) JOIN user_ids USING (user_key)"
    )
    connection.execute("DROP TABLE raw")
    return int(connection.execute("SELECT count(*) FROM item_ids").fetchall()[0][0]) + UNKNOWN_ITEM + 1


def number_context(connection: duckdb.DuckDBPyConnection, table: str, names: Sequence[str]) -> dict[str, list[str]]:
    """Make `users` of `table` (user_key and context columns of text); returns the values behind the numbers."""
    values, numbered = number_values(connection, table, names)
    columns = "".join(f", {quoted(name)}" for name in names)
    connection.execute(
        f"CREATE TABLE users AS SELECT user_id{columns} FROM ({numbered}) JOIN user_ids USING (user_key)"
    )
    return values


def number_values(
    connection: duckdb.DuckDBPyConnection, table: str, names: Sequence[str]
) -> tuple[dict[str, list[str]], str]:
    """(the values of these columns of text, SQL for `table` with numbers in their place).

    A value's number is its place among the sorted values, from 1 on; 0 is unknown.
    """
    values, numbers, joins = {}, [], ""
    for place, name in enumerate(names):
        connection.execute(
            f"CREATE TABLE context_{place} AS SELECT value, row_number() OVER (ORDER BY value) AS number FROM "
            f"(SELECT DISTINCT {quoted(name)} AS value FROM {table} WHERE {quoted(name)} IS NOT NULL)"
        )
        rows = connection.execute(f"SELECT value FROM context_{place} ORDER BY number").fetchall()
        values[name] = [str(row[0]) for row in rows]
        numbers.append(f"coalesce(context_{place}.number, 0)::BIGINT AS {quoted(name)}")
        joins += f" LEFT JOIN context_{place} ON t.{quoted(name)} = context_{place}.value"
    replaced = f" REPLACE ({', '.join(numbers)})" if numbers else ""
    return values, f"SELECT t.*{replaced} FROM {table} AS t{joins}"


def rating_mask(rating: str) -> str:
    """SQL for the action bits of a rating from 0.5 to 5."""
    return " + ".join(f"(CASE WHEN {rating} >= {least} THEN {1 << bit} ELSE 0 END)" for bit, least in RATING_BITS)


RATING_BITS = tuple(enumerate((2, 3, 4, 5)))
RATING_ACTIONS = ("rated_2_or_more", "rated_3_or_more", "rated_4_or_more", "rated_5")
"""A rating as ordered bits, so that one model reads and predicts it like any other action."""
