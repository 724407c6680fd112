"""Counts what the log knew of each candidate before it came (`pipelines.counts`), in two passes over sorted events.

Events of one item lie in all users' histories, so those are counted first, item by item, and kept in a table.  What
follows from one user's events alone is counted as these are read, in their order, to be cut into samples.

Labelled events count that lie strictly before an event's time or, if that is earlier, before its request began, which
showed all its candidates together, or before the time from which none counts, if there is one.  Tables `GROUP_before`
hold what earlier parts of the data counted, where there are any: counting goes on from them.
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipelines.counts import ITEM, USER, USER_ITEM, Counts, group_counts
from pipelines.features import ITEM_ID, USER_ID
from pipelines.prepare.engine import quoted, table_exists
from pipelines.prepare.sorted_groups import READ_ROWS, whole_groups
from pipelines.prepare.source import Description, value_column

IntArray = NDArray[np.int64]
GROUPS: Mapping[str, tuple[str, ...]] = {ITEM: (ITEM_ID,), USER: (USER_ID,), USER_ITEM: (USER_ID, ITEM_ID)}
"""The columns of `events` that the events of a group have in common."""
ITEM_COUNTS = "item_counts"
"""The table of what was counted of items: event (its rowid in `events`), known (the time before which), counts."""
COUNTED = "counted"
"""The table of all counts of labelled events, from which their statistics are made."""


def prepared_counts(num_actions: int) -> tuple[Counts, ...]:
    """The columns that are made of events that are counted."""
    return tuple(group_counts(group, num_actions) for group in GROUPS)


def counted(about: Description) -> tuple[Counts, ...]:
    """The columns that events of this description get: none unless it says so."""
    return prepared_counts(len(about.actions)) if "counts" in about.details else ()


def count_items(connection: duckdb.DuckDBPyConnection, num_actions: int, frozen_at: int | None = None) -> None:
    """Make the table ITEM_COUNTS of the labelled events; none counts events from the time `frozen_at` on."""
    columns = "".join(f", {name} BIGINT" for name in group_counts(ITEM, num_actions).columns)
    connection.execute(f"CREATE TABLE {ITEM_COUNTS} (event BIGINT, known BIGINT{columns})")
    # The connection itself hands over what is read here.
    writer = connection.cursor()
    reader = connection.sql(_by_item(connection, frozen_at)).to_arrow_reader(READ_ROWS)
    for table in item_totals(whole_groups(reader, ("item_id", "moment")), num_actions):
        writer.from_arrow(table).insert_into(ITEM_COUNTS)
    writer.close()


def item_totals(pieces: Iterable[pa.Table], num_actions: int) -> Iterator[pa.Table]:
    """Rows of ITEM_COUNTS from events in the order of items and moments; no moment of an item is in two pieces.

    Columns of a piece: item_id, moment, event (null: no row is asked for), action, counts (whether it counts).
    """
    names = group_counts(ITEM, num_actions).columns
    last, before_piece = None, np.zeros(len(names), dtype=np.int64)
    for piece in pieces:
        item, moment, action = (piece[name].to_numpy() for name in ("item_id", "moment", "action"))
        amounts = _amounts(action, num_actions) * piece["counts"].to_numpy()[:, None]
        totals = earlier_totals(_numbers(item), moment, amounts, moment)
        # Only the last item of a piece may go on in the next.
        totals[item == last] += before_piece
        before_piece = totals[-1] + amounts[(item == item[-1]) & (moment == moment[-1])].sum(axis=0)
        last = item[-1]
        columns = {"event": piece["event"], "known": moment, **dict(zip(names, totals.T, strict=True))}
        yield pa.table(columns).filter(piece["event"].is_valid())


def _by_item(connection: duckdb.DuckDBPyConnection, frozen_at: int | None) -> str:
    """SQL of the labelled events in the order of items and times, each where it counts and where it is counted for.

    These are one row where both are at one time; elsewhere the row that only counts has no `event`.
    """
    known, joined = "e.time", ""
    if connection.execute("SELECT 1 FROM events WHERE request_key IS NOT NULL LIMIT 1").fetchall():
        known = "coalesce(r.began, e.time)"
        joined = (
            " LEFT JOIN (SELECT user_id, request_key, min(time) AS began FROM events WHERE request_key IS NOT NULL "
            "GROUP BY user_id, request_key) AS r USING (user_id, request_key)"
        )
    if frozen_at is not None:
        known = f"least({known}, {frozen_at})"
    rows = (
        f"(SELECT e.rowid AS event, item_id, time, {known} AS known, action FROM events AS e{joined} WHERE candidate)"
    )
    asked = f"SELECT item_id, known AS moment, event, action, known = time AS counts FROM {rows}"
    if known != "e.time":
        asked += f" UNION ALL SELECT item_id, time, NULL, action, true FROM {rows} WHERE known < time"
    return f"{asked} ORDER BY item_id, moment"


def counted_before(connection: duckdb.DuckDBPyConnection, num_actions: int) -> tuple[str, str]:
    """(SQL of what is known of each event before its user's events are counted, SQL of the joins that it takes).

    That is the time before which was counted, `known`, and columns of counts, as columns of `events` are called; the
    joins stand behind `events AS e`.
    """
    values = f", coalesce({ITEM_COUNTS}.known, e.time) AS known"
    joins = f" LEFT JOIN {ITEM_COUNTS} ON e.rowid = {ITEM_COUNTS}.event"
    for counts in prepared_counts(num_actions):
        tables = [ITEM_COUNTS] * (counts.group == ITEM)
        if table_exists(connection, _before(counts)):
            tables.append(_before(counts))
            same = " AND ".join(f"e.{key} = {_before(counts)}.{key}" for key in GROUPS[counts.group])
            joins += f" LEFT JOIN {_before(counts)} ON {same}"
        for name in counts.columns:
            sums = " + ".join(["0::BIGINT", *(f"coalesce({table}.{name}, 0)" for table in tables)])
            values += f", ({sums})::BIGINT AS {quoted(value_column(name))}"
    return values, joins


def with_user_counts(
    connection: duckdb.DuckDBPyConnection, pieces: Iterable[pa.Table], num_actions: int, split_time: int
) -> Iterator[pa.Table]:
    """The events of whole users, in their order, with counts: to what was `counted_before` comes what a user's own say.

    The table COUNTED gets those of labelled events before `split_time`, for statistics.
    """
    names = [value_column(name) for each in prepared_counts(num_actions) for name in each.columns]
    columns = "".join(f", 0::BIGINT AS {quoted(name)}" for name in names)
    # The connection itself hands over what is read here.
    writer = connection.cursor()
    writer.execute(f"CREATE TABLE {COUNTED} AS SELECT user_id, log_row{columns} FROM events LIMIT 0")
    for piece in pieces:
        labelled = piece["candidate"].to_numpy()
        events = {name: piece[name].to_numpy()[labelled] for name in (USER_ID, ITEM_ID, "time", "known", "action")}
        for name, values in _count_users(events, num_actions).items():
            column = value_column(name)
            counts = piece[column].to_numpy().copy()
            counts[labelled] += values
            piece = piece.set_column(piece.column_names.index(column), column, pa.array(counts))
        chosen = pa.array(labelled & (piece["time"].to_numpy() < split_time))
        writer.from_arrow(piece.select(["user_id", "log_row", *names]).filter(chosen)).insert_into(COUNTED)
        yield piece
    writer.close()


def _count_users(events: Mapping[str, NDArray[Any]], num_actions: int) -> dict[str, IntArray]:
    """Columns of the groups of users, [E] each, by name; `events` are the labelled ones of whole users, in order."""
    amounts = _amounts(events["action"], num_actions)
    columns: dict[str, IntArray] = {}
    for group in (USER, USER_ITEM):
        keys = [events[name] for name in GROUPS[group]]
        # Stable: events of a group stay in the order of their times.
        order = np.lexsort(keys[::-1])
        totals = np.empty_like(amounts)
        numbers = _numbers(*(key[order] for key in keys))
        totals[order] = earlier_totals(numbers, events["time"][order], amounts[order], events["known"][order])
        columns |= dict(zip(group_counts(group, num_actions).columns, totals.T, strict=True))
    return columns


def keep_totals(connection: duckdb.DuckDBPyConnection, num_actions: int) -> None:
    """Make the tables `GROUP_before` of all labelled events, those of earlier parts included."""
    for counts in prepared_counts(num_actions):
        keys = ", ".join(GROUPS[counts.group])
        taken = "".join(
            f", count(*) FILTER (action & {1 << bit} != 0) AS {name}" for bit, name in enumerate(counts.taken)
        )
        rows = f"SELECT {keys}, count(*) AS {counts.seen}{taken} FROM events WHERE candidate GROUP BY {keys}"
        if table_exists(connection, _before(counts)):
            sums = "".join(f", sum({name})::BIGINT AS {name}" for name in counts.columns)
            earlier = f"SELECT {keys}, {', '.join(counts.columns)} FROM {_before(counts)}"
            rows = f"SELECT {keys}{sums} FROM ({rows} UNION ALL {earlier}) GROUP BY {keys}"
        connection.execute(f"CREATE OR REPLACE TABLE {_before(counts)} AS {rows}")


def earlier_totals(group: IntArray, time: IntArray, amounts: IntArray, known: IntArray) -> IntArray:
    """[E, columns] for each event the sum of its group's amounts at times strictly before `known`.

    Args:
        group: [E] numbers of groups, not falling.
        time: [E] not falling within a group.
        amounts: [E, columns]
        known: [E] at most the event's own time.
    """
    first = known.min()
    begin = group * (time.max() - first + 1)
    sums = np.zeros((len(group) + 1, amounts.shape[1]), dtype=np.int64)
    np.cumsum(amounts, axis=0, out=sums[1:])
    end = np.searchsorted(begin + (time - first), begin + (known - first))
    totals: IntArray = sums[end] - sums[np.searchsorted(group, group)]
    return totals


def _numbers(*keys: IntArray) -> IntArray:
    """[E] consecutive numbers of groups of events that are equal in all keys and stand together."""
    changes = np.zeros(len(keys[0]), dtype=np.bool_)
    for key in keys:
        changes[1:] |= key[1:] != key[:-1]
    return np.cumsum(changes)


def _amounts(action: NDArray[np.int32], num_actions: int) -> IntArray:
    """[E, 1 + actions] what an event adds to the columns of a group."""
    bits = (action[:, None] >> np.arange(num_actions)) & 1
    return np.concatenate((np.ones((len(action), 1), dtype=np.int64), bits), axis=1, dtype=np.int64)


def _before(counts: Counts) -> str:
    return f"{counts.group}_before"
