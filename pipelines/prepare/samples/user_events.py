"""Events of whole users, in their order, out of the table `events`: what samples are cut from."""

import logging
import time
from collections.abc import Iterator

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipelines.features import ITEM_ID, UNKNOWN_ID, USER_ID, Column, Part
from pipelines.prepare.engine import PROGRESS_SECONDS, quoted
from pipelines.prepare.options import SampleOptions
from pipelines.prepare.samples.counts import counted_before, with_user_counts
from pipelines.prepare.samples.cut import BoolArray, UserEvents, Values
from pipelines.prepare.samples.sorted_groups import READ_ROWS, whole_groups
from pipelines.prepare.source import MISSING, Description, sample_column, value_column

logger = logging.getLogger(__name__)

LISTED: tuple[Part, ...] = ("event", "candidate", "label")
"""Parts whose columns are lists of a sample, made of the columns of `events`."""
OF_USER = "user."
"""Before the names of columns of `users` where they stand beside those of `events`."""
EVERYWHERE = ("item_id", "action", "timestamp")
"""What every event and candidate has."""


def listed(about: Description) -> list[Column]:
    """The columns of events, candidates and labels, less their items."""
    return [column for column in about.columns if column.part in LISTED and column.name != ITEM_ID]


def whole_users(
    connection: duckdb.DuckDBPyConnection, about: Description, options: SampleOptions
) -> Iterator[UserEvents]:
    """Events of whole users, sorted, in the order of a hash of the users' ids."""
    logger.info("sorting")
    reader = connection.sql(_by_user(connection, about, options)).to_arrow_reader(READ_ROWS)
    pieces = whole_groups(_in_order(reader), (USER_ID,))
    if about.counted:
        pieces = with_user_counts(pieces, about.counted)
    for piece in pieces:
        yield _user_events(piece, about)


def _by_user(connection: duckdb.DuckDBPyConnection, about: Description, options: SampleOptions) -> str:
    """SQL of all that samples are made of, sorted."""
    values, joins = counted_before(connection, about.counted) if about.counted else ("", "")
    made = {name for each in about.counted for name in each.counts.columns}
    names = {value_column(column.name) for column in listed(about) if column.name not in made}
    values += "".join(f", e.{quoted(name)}" for name in sorted(names))
    for column in _of_samples(about):
        values += f", coalesce(u.{quoted(column.name)}, {MISSING[column.kind]}) AS {quoted(OF_USER + column.name)}"
        if column.name in about.changing:
            name = quoted(sample_column(column.name))
            values += f", coalesce(e.{name}, {MISSING[column.kind]}) AS {name}"
    chosen = ""
    if options.max_users is not None:
        chosen = (
            "SEMI JOIN (SELECT DISTINCT user_id FROM events WHERE candidate "
            f"ORDER BY hash(user_id), user_id LIMIT {options.max_users}) AS c USING (user_id)"
        )
    return (
        "SELECT hash(e.user_id) AS place, e.user_id, e.item_id, e.time, e.action, e.candidate, e.request_key, e.log_row"
        f"{values} FROM events AS e {chosen}{joins} LEFT JOIN users AS u ON e.user_id = u.user_id "
        # In equal times the log's own order: nothing that a model predicts may decide.
        "ORDER BY place, e.user_id, e.candidate, e.rank, e.log_row"
    )


def _in_order(reader: pa.RecordBatchReader) -> Iterator[pa.RecordBatch]:
    """What the engine hands over, seen to be sorted; the log tells how far it is."""
    num_read, reported, last = 0, time.monotonic(), np.zeros(1, dtype=np.uint64)
    for batch in reader:
        place = np.concatenate((last, batch["place"].to_numpy()))
        assert (place[:-1] <= place[1:]).all(), "the engine's sort is out of order"
        last = place[-1:]
        num_read += batch.num_rows
        if time.monotonic() - reported >= PROGRESS_SECONDS:
            reported = time.monotonic()
            logger.info("%d events done", num_read)
        yield batch


def _user_events(table: pa.Table, about: Description) -> UserEvents:
    """One piece of the sorted events as arrays."""
    lists = listed(about)
    names = ("item_id", "action", *(value_column(column.name) for column in lists))
    history = {column.stored: value_column(column.name) for column in lists if column.part == "event"}
    candidates = {column.stored: value_column(column.name) for column in lists if column.part != "event"}
    return UserEvents(
        user_id=table["user_id"].to_numpy(),
        time=table["time"].to_numpy(),
        request=pc.fill_null(table["request_key"], 0).to_numpy(),
        candidate=table["candidate"].to_numpy(),
        columns={**{name: _values(table[name]) for name in names}, "timestamp": table["time"].to_numpy()},
        history={**{f"history_{name}": name for name in EVERYWHERE}, **history},
        candidates={**{f"candidate_{name}": name for name in EVERYWHERE}, **candidates},
        sample={column.name: _known_before(table, column, about) for column in _of_samples(about)},
    )


def _of_samples(about: Description) -> list[Column]:
    """The columns of samples, less their users."""
    return [column for column in about.columns if column.part == "sample" and column.name != USER_ID]


def _known_before(table: pa.Table, column: Column, about: Description) -> Values:
    """[E] what was known of each event's user before it: the newest that earlier events tell, else what users have."""
    of_user = _values(table[OF_USER + column.name])
    if column.name not in about.changing:
        return of_user
    told = _values(table[sample_column(column.name)])
    user, place = table["user_id"].to_numpy(), np.arange(table.num_rows)
    start = np.maximum.accumulate(np.where(np.diff(user, prepend=user[0]) != 0, place, 0))
    newest = np.maximum.accumulate(np.where(_is_known(told), place, -1))
    before = np.append(-1, newest[:-1])
    chosen = np.where(before >= start, before, len(place) + place)
    if isinstance(told, pa.ListArray):
        return pa.concat_arrays([told, of_user]).take(pa.array(chosen))
    values: Values = np.concatenate((told, of_user))[chosen]
    return values


def _is_known(values: Values) -> BoolArray:
    """[E] which values are not missing."""
    if isinstance(values, pa.ListArray):
        known: BoolArray = values.value_lengths().to_numpy() > 0
        return known
    return ~np.isnan(values) if values.dtype.kind == "f" else values != UNKNOWN_ID


def _values(column: pa.ChunkedArray) -> Values:
    """A column in one piece."""
    return column.combine_chunks() if pa.types.is_list(column.type) else column.to_numpy()
