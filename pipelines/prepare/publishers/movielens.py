"""MovieLens 1M (`ratings.dat`, `users.dat`) and 20M, 25M, 32M (`ratings.csv`), as GroupLens distributes them.

F. Maxwell Harper and Joseph A. Konstan, "The MovieLens Datasets: History and Context", TiiS 5(4), 2015.
"""

from dataclasses import dataclass
from functools import partial
from pathlib import Path

import duckdb
import numpy as np
import pyarrow as pa

from pipelines.prepare.engine import execute, find_files, numbered, plain_file, shuffled
from pipelines.prepare.publishers.files import check_one_row_each, check_rows, csv_reader, delimited_reader
from pipelines.prepare.publishers.raw_log import RATING_ACTIONS, number_context, number_ids, rating_mask
from pipelines.prepare.samples.stages import Load
from pipelines.prepare.source import Description, narrow_columns, narrow_spaces

USER_COLUMNS = ("gender", "age", "occupation")
RULES = {
    "user_key > 0": "the user id must be above 0",
    "item_key > 0": "the movie id must be above 0",
    "rating BETWEEN 0.5 AND 5": "the rating must lie between 0.5 and 5",
    "time > 0": "the timestamp must be above 0",
}
TYPES = {"user_key": "BIGINT", "item_key": "BIGINT", "rating": "DOUBLE", "time": "BIGINT"}


@dataclass(frozen=True, kw_only=True, slots=True)
class MovielensOptions:
    """What is left open by the publisher's files."""

    ties: str = "log"
    """Order of a user's ratings of one second.  log: that of ratings.dat; ratings.csv, which is sorted by film, has
    none, so a hash.  gr: as generative-recommenders' preprocessing leaves them, on which published tables rest."""

    def __post_init__(self) -> None:
        if self.ties not in ("log", "gr"):
            raise ValueError(f"--ties must be log or gr, got {self.ties}")


def loader(options: MovielensOptions) -> Load:
    """What `prepare` calls for these options."""
    return partial(_load, options)


def _load(options: MovielensOptions, connection: duckdb.DuckDBPyConnection, source: Path, scratch: Path) -> Description:
    """Fill `events` and `users` from the publisher's files under `source`."""
    old, new = find_files(source, "ratings.dat"), find_files(source, "ratings.csv")
    if len(old) + len(new) != 1:
        raise ValueError(f"--source {source} must hold one ratings.dat or ratings.csv, found {len(old) + len(new)}")
    path = (old + new)[0]
    plain = plain_file(path, scratch)
    if old:
        reader, first_line = delimited_reader(plain, "::", TYPES), 1
    else:
        names = {"userId": "BIGINT", "movieId": "BIGINT", "rating": "DOUBLE", "timestamp": "BIGINT"}
        renamed = "userId AS user_key, movieId AS item_key, timestamp AS time"
        reader, first_line = f"(SELECT * RENAME ({renamed}) FROM {csv_reader(plain, names)})", 2
    check_rows(connection, reader, path, RULES, first_line)
    rows, order = numbered(reader), "log_row"
    if options.ties == "gr":
        connection.register("gr_places", _gr_places(connection, rows))
        rows, order = f"({rows} JOIN gr_places USING (log_row))", "gr_place"
    elif new:
        order = shuffled("user_key, item_key")
    execute(
        connection,
        f"CREATE TABLE raw AS SELECT user_key, item_key, time, time AS rank, {order} AS log_row, "
        f"NULL::UBIGINT AS request_key, ({rating_mask('rating')})::INTEGER AS action FROM {rows}",
        path,
    )
    num_items, num_users = number_ids(connection)
    context = (
        _load_users(connection, source, scratch)
        if old
        else number_context(connection, "(SELECT user_key FROM user_ids)", ())
    )
    return Description(
        name="movielens",
        spaces=narrow_spaces(num_items, num_users, context),
        columns=narrow_columns(context),
        actions=RATING_ACTIONS,
        source='GroupLens, https://grouplens.org/datasets/movielens/: F. M. Harper and J. A. Konstan, "The MovieLens '
        'Datasets: History and Context", ACM TiiS 5(4), 2015',
        licence="research use, no redistribution; see the README of the data set",
    )


def _gr_places(connection: duckdb.DuckDBPyConnection, rows: str) -> pa.Table:
    """Every row's place after generative-recommenders' `ratings.sort_values(by=["unix_timestamp"])`.

    Its sort, NumPy's quicksort, is not stable, so only the same algorithm finds its order of equal times again.  For
    integers NumPy now has others, by the processor's instructions; for dates it has that one everywhere.
    """
    found = connection.execute(f"SELECT log_row, time FROM {rows} ORDER BY log_row").fetchnumpy()
    order = np.argsort(found["time"].astype("datetime64[s]"), kind="quicksort")
    places = np.empty(len(order), dtype=np.int64)
    places[order] = np.arange(len(order))
    return pa.table({"log_row": found["log_row"], "gr_place": places})


def _load_users(connection: duckdb.DuckDBPyConnection, source: Path, scratch: Path) -> dict[str, int]:
    """Gender, age group and occupation of MovieLens-1M's users."""
    found = find_files(source, "users.dat")
    if len(found) != 1:
        raise ValueError(f"--source {source} must hold one users.dat beside ratings.dat, found {len(found)}")
    types = {"user_key": "BIGINT", **dict.fromkeys(USER_COLUMNS, "VARCHAR"), "zip": "VARCHAR"}
    reader = delimited_reader(plain_file(found[0], scratch), "::", types)
    check_rows(connection, reader, found[0], {"user_key > 0": RULES["user_key > 0"]}, first_line=1)
    check_one_row_each(connection, reader, found[0], "user_key")
    execute(connection, f"CREATE TABLE user_columns AS SELECT * FROM {reader}", found[0])
    return number_context(connection, "user_columns", USER_COLUMNS)
