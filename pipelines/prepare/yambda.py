"""Yambda (50M, 500M, 5B): the publisher's flat `multi_event.parquet`.

Its timestamps count from an unstated beginning in steps of 5; they are taken as they are.
"""

from pathlib import Path

import duckdb

from pipelines.prepare.engine import check_rows, execute, find_files, numbered, parquet_reader
from pipelines.prepare.raw_log import number_context, number_ids
from pipelines.prepare.source import Description, narrow_columns, narrow_spaces

ACTIONS = ("listen", "listen_plus", "like", "dislike", "unlike", "undislike", "organic")
TYPES = {
    "uid": "BIGINT",
    "item_id": "BIGINT",
    "timestamp": "BIGINT",
    "is_organic": "INTEGER",
    "event_type": "VARCHAR",
    "played_ratio_pct": "DOUBLE",
}
EVENTS = ("listen", "like", "dislike", "unlike", "undislike")
RULES = {
    "uid >= 0": "uid must not be negative or missing",
    "item_id >= 0": "item_id must not be negative or missing",
    "timestamp >= 0": "timestamp must not be negative or missing",
    f"event_type IN {EVENTS}": f"event_type must be one of {', '.join(EVENTS)}",
}


def load(connection: duckdb.DuckDBPyConnection, source: Path, scratch: Path) -> Description:
    """Fill `events` and `users` from `multi_event.parquet` under `source`; nothing goes through `scratch`."""
    found = find_files(source, "multi_event.parquet")
    if len(found) != 1:
        raise ValueError(
            f"--source {source} must hold one multi_event.parquet, found {len(found)}; name the folder of one size"
        )
    reader = parquet_reader(connection, found[0], TYPES)
    check_rows(connection, reader, found[0], RULES, first_line=1, unit="row")
    bits = {name: f"event_type = '{name}'" for name in EVENTS}
    bits["listen_plus"] = "event_type = 'listen' AND played_ratio_pct >= 50"
    bits["organic"] = "is_organic = 1"
    mask = " + ".join(f"(CASE WHEN {bits[name]} THEN {1 << bit} ELSE 0 END)" for bit, name in enumerate(ACTIONS))
    execute(
        connection,
        "CREATE TABLE raw AS SELECT uid AS user_key, item_id AS item_key, timestamp AS time, timestamp AS rank, "
        f"log_row, NULL::UBIGINT AS request_key, ({mask})::INTEGER AS action, "
        "least(greatest(coalesce(played_ratio_pct, 0), 0), 1000)::INTEGER AS played_percent "
        f"FROM {numbered(reader)}",
        found[0],
    )
    num_items, num_users = number_ids(connection, ("played_percent",))
    number_context(connection, "(SELECT user_key FROM user_ids)", ())
    return Description(
        name="yambda",
        spaces=narrow_spaces(num_items, num_users, {}),
        columns=narrow_columns({}, ("played_percent",)),
        actions=ACTIONS,
        source="Yambda-5B, Yandex: A. Ploshkin et al., arXiv 2505.22238",
        licence="Apache-2.0",
        clock="relative",
    )
