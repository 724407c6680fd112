"""Counts what the log knew of each candidate before it came (`pipelines.counts`), as columns of the table `events`.

A group's totals are added up over time once; each event then takes them as they stood before its time.
"""

from collections.abc import Mapping

import duckdb

from pipelines.counts import ITEM, USER, USER_ITEM, Counts, group_counts
from pipelines.prepare.engine import quoted, table_exists
from pipelines.prepare.source import value_column

GROUPS: Mapping[str, tuple[str, ...]] = {ITEM: ("item_id",), USER: ("user_id",), USER_ITEM: ("user_id", "item_id")}
"""The columns of `events` that the events of a group have in common."""


def prepared_counts(num_actions: int) -> tuple[Counts, ...]:
    """The columns that `add_counts` makes."""
    return tuple(group_counts(group, num_actions) for group in GROUPS)


def add_counts(
    connection: duckdb.DuckDBPyConnection, num_actions: int, frozen_at: int | None = None, *, keep: bool = False
) -> None:
    """Give `events` the columns of `prepared_counts`; with `keep`, the totals stay in tables `GROUP_before`.

    Where such tables exist already, they are what earlier parts of the data counted, from which counting goes on.

    They count labelled events strictly before an event's time or, if that is earlier, before its request began, which
    showed all its candidates together; none counts events from the time `frozen_at` on, if there is one.
    """
    counts = prepared_counts(num_actions)
    for each in counts:
        _add_totals(connection, each)
    known = "time"
    if connection.execute("SELECT 1 FROM events WHERE request_key IS NOT NULL LIMIT 1").fetchall():
        known = "CASE WHEN request_key IS NULL THEN time ELSE min(time) OVER (PARTITION BY user_id, request_key) END"
    if frozen_at is not None:
        known = f"least({known}, {frozen_at})"
    columns = "".join(
        f", coalesce({each.group}.{column}, 0)::BIGINT AS {quoted(value_column(column))}"
        for each in counts
        for column in each.columns
    )
    joins = "".join(f" ASOF LEFT JOIN {_totals(each)} AS {each.group} ON {_same(each.group)}" for each in counts)
    connection.execute(
        f"CREATE TABLE counted AS SELECT e.* EXCLUDE (known){columns} "
        f"FROM (SELECT *, {known} AS known FROM events) AS e{joins}"
    )
    connection.execute("DROP TABLE events; ALTER TABLE counted RENAME TO events")
    for each in counts:
        if keep:
            keys, newest = ", ".join(GROUPS[each.group]), ", ".join(f"max({name}) AS {name}" for name in each.columns)
            totals = f"SELECT {keys}, {newest} FROM {_totals(each)} GROUP BY {keys}"
            connection.execute(f"CREATE OR REPLACE TABLE {_before(each)} AS {totals}")
        connection.execute(f"DROP TABLE {_totals(each)}")


def _add_totals(connection: duckdb.DuckDBPyConnection, counts: Counts) -> None:
    """A table with the counts of a group up to and including each time at which it has events."""
    keys = ", ".join(GROUPS[counts.group])
    taken = "".join(f", count(*) FILTER (action & {1 << bit} != 0) AS {name}" for bit, name in enumerate(counts.taken))
    sums = "".join(f", sum({name}) OVER past AS {name}" for name in counts.columns)
    earlier = ""
    if table_exists(connection, _before(counts)):
        earlier = f" UNION ALL SELECT {keys}, -2, {', '.join(counts.columns)} FROM {_before(counts)}"
    connection.execute(
        f"CREATE TABLE {_totals(counts)} AS SELECT {keys}, time{sums} FROM (SELECT {keys}, time, count(*) AS "
        f"{counts.seen}{taken} FROM events WHERE candidate GROUP BY {keys}, time{earlier}) "
        f"WINDOW past AS (PARTITION BY {keys} ORDER BY time)"
    )


def _totals(counts: Counts) -> str:
    return f"{counts.group}_totals"


def _before(counts: Counts) -> str:
    return f"{counts.group}_before"


def _same(group: str) -> str:
    """SQL of the join of an event with its group's totals: the newest before it was known."""
    return " AND ".join([*(f"e.{key} = {group}.{key}" for key in GROUPS[group]), f"e.known > {group}.time"])
