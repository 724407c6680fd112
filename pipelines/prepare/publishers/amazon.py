"""Amazon reviews of 2014, 2018 and 2023: the ratings-only CSV files or the review files (JSON lines) of any categories.

The three editions differ in the order and names of columns and in the unit of time.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import duckdb

from pipelines.prepare.engine import execute, find_files, numbered, plain_file, shuffled
from pipelines.prepare.publishers.files import check_rows, csv_reader, delimited_reader, json_reader
from pipelines.prepare.publishers.raw_log import RATING_ACTIONS, number_context, number_ids, rating_mask
from pipelines.prepare.source import Description, narrow_columns, narrow_spaces

RULES = {
    "user_key IS NOT NULL": "the user must not be missing",
    "item_key IS NOT NULL": "the item must not be missing",
    "rating BETWEEN 1 AND 5": "the rating must lie between 1 and 5",
    "time > 0": "the time must be above 0",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Edition:
    """How one edition writes a rating."""

    csv_columns: tuple[str, ...]
    """Columns of the CSV files, in order, by our names."""
    csv_header: bool
    """Whether a header line precedes them."""
    json_names: Mapping[str, str]
    """Our names of the fields of the review files."""
    time_divisor: int
    """Units of time in a second."""
    source: str
    """Attribution, as the data's description gives it."""


OLD_JSON = {"reviewerID": "user_key", "asin": "item_key", "overall": "rating", "unixReviewTime": "time"}
NEW_JSON = {"user_id": "user_key", "parent_asin": "item_key", "rating": "rating", "timestamp": "time"}
EDITIONS = {
    2014: Edition(
        csv_columns=("user_key", "item_key", "rating", "time"),
        csv_header=False,
        json_names=OLD_JSON,
        time_divisor=1,
        source="Amazon reviews 2014: R. He and J. McAuley, WWW 2016; J. McAuley et al., SIGIR 2015",
    ),
    2018: Edition(
        csv_columns=("item_key", "user_key", "rating", "time"),
        csv_header=False,
        json_names=OLD_JSON,
        time_divisor=1,
        source="Amazon reviews 2018: J. Ni, J. Li, J. McAuley, EMNLP 2019",
    ),
    2023: Edition(
        csv_columns=("user_id", "parent_asin", "rating", "timestamp"),
        csv_header=True,
        json_names=NEW_JSON,
        time_divisor=1000,
        source="Amazon reviews 2023: Y. Hou et al., arXiv 2403.03952",
    ),
}
ASIN_LEN = 10
"""Characters of Amazon's item numbers; reviewers' are longer."""
TYPES = {"user_key": "VARCHAR", "item_key": "VARCHAR", "rating": "DOUBLE", "time": "BIGINT"}


def _load(edition: Edition, connection: duckdb.DuckDBPyConnection, source: Path, scratch: Path) -> Description:
    """Fill `events` and `users` from all rating or review files under `source`."""
    connection.execute(
        "CREATE TABLE raw (user_key VARCHAR, item_key VARCHAR, time BIGINT, rank BIGINT, log_row BIGINT, "
        "request_key UBIGINT, action INTEGER)"
    )
    files = [path for pattern in ("*.csv", "*.json", "*.jsonl") for path in find_files(source, pattern)]
    if not files:
        raise ValueError(f"--source {source} holds no .csv, .json or .jsonl file (also .gz, .xz, .zip)")
    for number, path in enumerate(files):
        plain = plain_file(path, scratch)
        reader, first_line = _reader(plain, edition)
        check_rows(connection, reader, path, RULES, first_line)
        if plain.suffix == ".csv" and not edition.csv_header:
            _check_columns_order(connection, reader, path)
        execute(
            connection,
            f"INSERT INTO raw SELECT user_key, item_key, time // {edition.time_divisor}, time, "
            # The files are sorted by item, and most times are days.
            f"{shuffled('user_key, item_key')}, NULL, ({rating_mask('rating')})::INTEGER "
            f"FROM {numbered(reader, number)}",
            path,
        )
        if plain != path:
            plain.unlink()
    num_items, num_users = number_ids(connection)
    number_context(connection, "(SELECT user_key FROM user_ids)", ())
    return Description(
        name="amazon",
        spaces=narrow_spaces(num_items, num_users, {}),
        columns=narrow_columns({}),
        actions=RATING_ACTIONS,
        source=edition.source,
        licence="the publisher states none; research use",
    )


def _check_columns_order(connection: duckdb.DuckDBPyConnection, reader: str, path: Path) -> None:
    """Raise ValueError if the items look like users: the CSV files of 2014 and 2018 differ in nothing else.

    Reads the file once more, for which only files that name no columns give reason.
    """
    share = f"SELECT avg((length(item_key) = {ASIN_LEN})::INTEGER) FROM {reader}"
    if (execute(connection, share, path)[0][0] or 0) < 0.5:
        raise ValueError(
            f"{path}: most items have not the {ASIN_LEN} characters of Amazon's item numbers; the files of 2014 begin "
            "with the user, those of 2018 with the item: is this the edition?"
        )


def _reader(path: Path, edition: Edition) -> tuple[str, int]:
    """SQL that reads a file as user_key, item_key, rating and time, and the number of its first row's line."""
    if path.suffix != ".csv":
        fields = {name: TYPES[ours] for name, ours in edition.json_names.items()}
        renamed = ", ".join(f"{name} AS {ours}" for name, ours in edition.json_names.items())
        return f"(SELECT * RENAME ({renamed}) FROM {json_reader(path, fields)})", 1
    if edition.csv_header:
        fields = {name: TYPES[edition.json_names[name]] for name in edition.csv_columns}
        renamed = ", ".join(f"{name} AS {edition.json_names[name]}" for name in edition.csv_columns)
        return f"(SELECT * RENAME ({renamed}) FROM {csv_reader(path, fields)})", 2
    return delimited_reader(path, ",", {name: TYPES[name] for name in edition.csv_columns}), 1


load_2014 = partial(_load, EDITIONS[2014])
load_2018 = partial(_load, EDITIONS[2018])
load_2023 = partial(_load, EDITIONS[2023])
