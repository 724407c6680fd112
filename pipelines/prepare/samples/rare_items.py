"""Items too rare to learn anything of: they share one id, whose row is trained in their place."""

from dataclasses import replace

import duckdb

from pipelines.features import UNKNOWN_ID, Space
from pipelines.prepare.engine import table_exists
from pipelines.prepare.state import waiting


def merge_rare_items(connection: duckdb.DuckDBPyConnection, items: Space, min_count: int, before: int) -> Space:
    """Give id 0 to items with fewer than `min_count` events before the time `before`, and number the others anew.

    Changes `events`, `item_ids` and, where it exists, `items`; the order of the remaining ids stays, and keys that lose
    theirs wait for one (`waiting`).  Returns the space that is left of `items`; rows that it had to grow stay.  Raises
    ValueError if ids are made from the keys.
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
    if table_exists(connection, "item_ids"):
        # In later deliveries all events count, those after `before` too.
        connection.execute(
            f"CREATE TABLE {waiting(items.name)} AS SELECT item_key::VARCHAR AS key, n FROM item_ids JOIN (SELECT "
            "item_id, count(*) AS n FROM events GROUP BY item_id) USING (item_id) "
            "WHERE item_id NOT IN (SELECT old_id FROM kept_items)"
        )
    connection.execute(
        f"CREATE OR REPLACE TABLE events AS SELECT * EXCLUDE (old_id, new_id) REPLACE (coalesce(new_id, {UNKNOWN_ID}) "
        "AS item_id) FROM events LEFT JOIN kept_items ON item_id = old_id"
    )
    for table in ("item_ids", "items"):
        if table_exists(connection, table):
            connection.execute(
                f"CREATE OR REPLACE TABLE {table} AS SELECT * EXCLUDE (old_id, new_id) REPLACE (new_id AS item_id) "
                f"FROM {table} JOIN kept_items ON item_id = old_id"
            )
    used = int(connection.execute("SELECT count(*) FROM kept_items").fetchall()[0][0]) + UNKNOWN_ID + 1
    return replace(items, used=used, rows=used if items.rows == items.used else items.rows)
