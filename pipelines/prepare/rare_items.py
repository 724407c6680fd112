"""Items too rare to learn anything of: they share one id, whose row is trained in their place."""

from dataclasses import replace

import duckdb

from pipelines.features import UNKNOWN_ID, Space


def merge_rare_items(connection: duckdb.DuckDBPyConnection, items: Space, min_count: int, before: int) -> Space:
    """Give id 0 to items with fewer than `min_count` events before the time `before`, and number the others anew.

    Changes `events`, `item_ids` and, where it exists, `items`; the order of the remaining ids stays.  Returns the space
    that is left of `items`; rows that it had to grow stay.  Raises ValueError if ids are made from the keys.
    """
    if items.hash is not None or items.unbounded:
        raise ValueError(
            "--min-count needs items with ids of their own, but those of the items are a hash or unbounded"
        )
    counted = f"SELECT item_id FROM events WHERE time < {before} GROUP BY item_id HAVING count(*) >= {min_count}"
    connection.execute(
        f"CREATE TABLE kept_items AS SELECT item_id AS old_id, {UNKNOWN_ID} + row_number() OVER (ORDER BY item_id) "
        f"AS new_id FROM ({counted})"
    )
    connection.execute(
        f"CREATE OR REPLACE TABLE events AS SELECT * EXCLUDE (old_id, new_id) REPLACE (coalesce(new_id, {UNKNOWN_ID}) "
        "AS item_id) FROM events LEFT JOIN kept_items ON item_id = old_id"
    )
    for table in ("item_ids", "items"):
        if connection.execute("SELECT 1 FROM duckdb_tables() WHERE table_name = ?", [table]).fetchall():
            connection.execute(
                f"CREATE OR REPLACE TABLE {table} AS SELECT * EXCLUDE (old_id, new_id) REPLACE (new_id AS item_id) "
                f"FROM {table} JOIN kept_items ON item_id = old_id"
            )
    used = int(connection.execute("SELECT count(*) FROM kept_items").fetchall()[0][0]) + UNKNOWN_ID + 1
    return replace(items, used=used, rows=used if items.rows == items.used else items.rows)
