"""Counts what the log knew of each candidate before it came (`pipelines.counts`), in two passes over sorted events.

A group is the events of one item, of one user, of a user and an item or a value of another column of ids, or of such a
value alone, where that is asked for.
Events of many users are counted first, group by group, and kept in a table a column.  What follows from one user's
events alone is counted as these are read, in their order, to be cut into samples.

Labelled events count that lie strictly before an event's time or, if that is earlier, before its request began, which
showed all its candidates together, or before the time from which none counts, if there is one.  Tables
`counts_GROUP_before` hold what earlier parts of the data counted, where there are any: counting goes on from them.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipelines.counts import ITEM, USER, USER_ITEM, Counts, group_counts
from pipelines.features import ITEM_ID, UNKNOWN_ID, USER_ID, Column, Part
from pipelines.prepare.engine import quoted, table_exists
from pipelines.prepare.options import SampleOptions
from pipelines.prepare.samples.sorted_groups import READ_ROWS, whole_groups
from pipelines.prepare.source import CountedGroup, value_column

IntArray = NDArray[np.int64]
OF_ITEM = "item."
"""Stands before a column of items."""


def counted_groups(columns: Sequence[Column], num_actions: int, options: SampleOptions) -> tuple[CountedGroup, ...]:
    """What the options say that is counted, if anything: a candidate's item, its user, both, the user with each other
    column of one id, and columns over all users, those of items as `item.NAME`.

    Raises:
        ValueError: a name is no column of one id, or two groups would have the same name.
    """
    if not options.counted:
        return ()
    known = {column.name: value_column(column.name) for column in _of_one_id(columns, "candidate")}
    known |= {OF_ITEM + column.name: OF_ITEM + column.name for column in _of_one_id(columns, "item")}
    for name in options.counted_columns:
        if name not in known:
            have = ", ".join(known) or "none"
            raise ValueError(f"--count-columns names {name!r}, which is no column of one id; there are: {have}")
    keys: dict[str, tuple[str, ...]] = {ITEM: (ITEM_ID,), USER: (USER_ID,), USER_ITEM: (USER_ID, ITEM_ID)}
    for name, column in known.items():
        group = name.replace(OF_ITEM, f"{ITEM}_")
        found: dict[str, tuple[str, ...]] = {group: (column,)} if name in options.counted_columns else {}
        found |= {f"{USER}_{group}": (USER_ID, column)} if options.count_user_columns else {}
        for each, of_group in found.items():
            if each.lower() in map(str.lower, keys):
                raise ValueError(
                    f"what is counted of the column {name} would be called {each}, as something else is: rename the "
                    "column, or prepare with --no-count-user-columns"
                )
            keys[each] = of_group
    return tuple(CountedGroup(counts=group_counts(name, num_actions), keys=each) for name, each in keys.items())


def _of_one_id(columns: Sequence[Column], part: Part) -> Iterator[Column]:
    return (each for each in columns if each.part == part and each.kind == "id" and each.name != ITEM_ID)


def count_shared(
    connection: duckdb.DuckDBPyConnection, groups: Sequence[CountedGroup], frozen_at: int | None = None
) -> None:
    """Make a table of each group that is not a user's: of every labelled event its rowid (`event`), the time before
    which was counted (`known`), and the counts; none counts events from the time `frozen_at` on."""
    # The connection itself hands over what is read here.
    writer = connection.cursor()
    for group in groups:
        if group.of_user:
            continue
        columns = "".join(f", {quoted(name)} BIGINT" for name in group.counts.columns)
        connection.execute(f"CREATE TABLE {_shared(group)} (event BIGINT, known BIGINT{columns})")
        reader = connection.sql(_by_key(connection, group.keys[0], frozen_at)).to_arrow_reader(READ_ROWS)
        for table in shared_totals(whole_groups(reader, ("key", "moment")), group.counts):
            writer.from_arrow(table).insert_into(f"{group.counts.group}_counts")
    writer.close()


def shared_totals(pieces: Iterable[pa.Table], counts: Counts) -> Iterator[pa.Table]:
    """Rows of a table of `count_shared` from events in the order of keys and moments; no moment of a key is in two
    pieces.

    Columns of a piece: key, moment, event (null: no row is asked for), action, counts (whether it counts).
    """
    last, before_piece = None, np.zeros(len(counts.columns), dtype=np.int64)
    for piece in pieces:
        key, moment, action = (piece[name].to_numpy() for name in ("key", "moment", "action"))
        amounts = _amounts(action, len(counts.taken)) * piece["counts"].to_numpy()[:, None]
        totals = earlier_totals(_numbers(key), moment, amounts, moment)
        # Only the last key of a piece may go on in the next.
        totals[key == last] += before_piece
        before_piece = totals[-1] + amounts[(key == key[-1]) & (moment == moment[-1])].sum(axis=0)
        last = key[-1]
        columns = {"event": piece["event"], "known": moment, **dict(zip(counts.columns, totals.T, strict=True))}
        yield pa.table(columns).filter(piece["event"].is_valid())


def _by_key(connection: duckdb.DuckDBPyConnection, key: str, frozen_at: int | None) -> str:
    """SQL of the labelled events in the order of a key and times, each where it counts and where it is counted for.

    These are one row where both are at one time; elsewhere the row that only counts has no `event`.
    """
    known, joined = "e.time", _items([key])
    if connection.execute("SELECT 1 FROM events WHERE request_key IS NOT NULL LIMIT 1").fetchall():
        known = "coalesce(r.began, e.time)"
        joined += (
            " LEFT JOIN (SELECT user_id, request_key, min(time) AS began FROM events WHERE request_key IS NOT NULL "
            "GROUP BY user_id, request_key) AS r USING (user_id, request_key)"
        )
    if frozen_at is not None:
        known = f"least({known}, {frozen_at})"
    rows = (
        f"(SELECT e.rowid AS event, {_key(key)} AS key, e.time, {known} AS known, e.action "
        f"FROM events AS e{joined} WHERE e.candidate)"
    )
    asked = f"SELECT key, known AS moment, event, action, known = time AS counts FROM {rows}"
    if known != "e.time":
        asked += f" UNION ALL SELECT key, time, NULL, action, true FROM {rows} WHERE known < time"
    return f"{asked} ORDER BY key, moment"


def counted_before(connection: duckdb.DuckDBPyConnection, groups: Sequence[CountedGroup]) -> tuple[str, str]:
    """(SQL of what is known of each event before its user's events are counted, SQL of the joins that it takes).

    That is the time before which was counted, `known`, columns of counts, as columns of `events` are called, and the
    columns of items that tell groups apart; the joins stand behind `events AS e`.
    """
    keys = list(dict.fromkeys(key for group in groups for key in group.keys))
    values, joins = "", _items(keys)
    for group in groups:
        tables = []
        if not group.of_user:
            tables.append(_shared(group))
            joins += f" LEFT JOIN {_shared(group)} ON e.rowid = {_shared(group)}.event"
            values = values or f", coalesce({_shared(group)}.known, e.time) AS known"
        if table_exists(connection, _before(group)):
            tables.append(quoted(_before(group)))
            same = " AND ".join(f"{_key(key)} = {quoted(_before(group))}.{quoted(key)}" for key in group.keys)
            joins += f" LEFT JOIN {quoted(_before(group))} ON {same}"
        for name in group.counts.columns:
            sums = " + ".join(["0::BIGINT", *(f"coalesce({table}.{quoted(name)}, 0)" for table in tables)])
            values += f", ({sums})::BIGINT AS {quoted(value_column(name))}"
    values += "".join(f", {_key(key)} AS {quoted(key)}" for key in keys if key.startswith(OF_ITEM))
    return values, joins


def with_user_counts(pieces: Iterable[pa.Table], groups: Sequence[CountedGroup]) -> Iterator[pa.Table]:
    """The events of whole users, in their order, with counts: to what was `counted_before` comes what a user's own
    say."""
    of_users = [group for group in groups if group.of_user]
    names = {"time", "known", "action", *(key for group in of_users for key in group.keys)}
    for piece in pieces:
        labelled = piece["candidate"].to_numpy()
        events = {name: piece[name].to_numpy()[labelled] for name in names}
        for name, values in _count_users(events, of_users).items():
            column = value_column(name)
            counts = piece[column].to_numpy().copy()
            counts[labelled] += values
            piece = piece.set_column(piece.column_names.index(column), column, pa.array(counts))
        yield piece


def _count_users(events: Mapping[str, NDArray[Any]], groups: Sequence[CountedGroup]) -> dict[str, IntArray]:
    """Columns of groups of users, [E] each, by name; `events` are the labelled ones of whole users, in order."""
    columns: dict[str, IntArray] = {}
    for group in groups:
        amounts = _amounts(events["action"], len(group.counts.taken))
        keys = [events[name] for name in group.keys]
        # Stable: events of a group stay in the order of their times.
        order = np.lexsort(keys[::-1])
        totals = np.empty_like(amounts)
        numbers = _numbers(*(key[order] for key in keys))
        totals[order] = earlier_totals(numbers, events["time"][order], amounts[order], events["known"][order])
        columns |= dict(zip(group.counts.columns, totals.T, strict=True))
    return columns


def keep_totals(connection: duckdb.DuckDBPyConnection, groups: Sequence[CountedGroup]) -> None:
    """Make the tables `counts_GROUP_before` of all labelled events, those of earlier parts included."""
    for group in groups:
        before, keys = quoted(_before(group)), ", ".join(map(quoted, group.keys))
        seen, *taken = map(quoted, group.counts.columns)
        values = ", ".join(f"{_key(key)} AS {quoted(key)}" for key in group.keys) + f", count(*) AS {seen}"
        values += "".join(f", count(*) FILTER (e.action & {1 << bit} != 0) AS {name}" for bit, name in enumerate(taken))
        rows = f"SELECT {values} FROM events AS e{_items(group.keys)} WHERE e.candidate GROUP BY ALL"
        if table_exists(connection, _before(group)):
            sums = "".join(f", sum({name})::BIGINT AS {name}" for name in (seen, *taken))
            earlier = f"SELECT {', '.join([keys, seen, *taken])} FROM {before}"
            rows = f"SELECT {keys}{sums} FROM ({rows} UNION ALL {earlier}) GROUP BY {keys}"
        connection.execute(f"CREATE OR REPLACE TABLE {before} AS {rows}")


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


def _key(key: str) -> str:
    """SQL of a key of a group, of `events AS e` and `items AS i`."""
    if key.startswith(OF_ITEM):
        return f"coalesce(i.{quoted(key.removeprefix(OF_ITEM))}, {UNKNOWN_ID})"
    return f"e.{quoted(key)}"


def _items(keys: Iterable[str]) -> str:
    """SQL of the join that keys take."""
    return " LEFT JOIN items AS i ON e.item_id = i.item_id" if any(key.startswith(OF_ITEM) for key in keys) else ""


def _shared(group: CountedGroup) -> str:
    return quoted(f"{group.counts.group}_counts")


def _before(group: CountedGroup) -> str:
    return f"counts_{group.counts.group}_before"
