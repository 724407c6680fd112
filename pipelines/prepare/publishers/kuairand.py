"""KuaiRand (Pure, 1K, 27K): the publisher's log, user and video files, which have the same columns in all three.

Gao et al., "KuaiRand: An Unbiased Sequential Recommendation Dataset with Randomly Exposed Videos", CIKM 2022.
"""

from pathlib import Path

import duckdb

from pipelines.prepare.engine import execute, find_files, numbered, plain_file, require_files
from pipelines.prepare.publishers.files import check_one_row_each, check_rows, csv_reader, parquet_reader
from pipelines.prepare.publishers.kuairand_videos import load_videos
from pipelines.prepare.publishers.raw_log import number_context, number_ids
from pipelines.prepare.source import Cross, Description, GatheredRules, narrow_columns, narrow_spaces

ACTIONS = ("is_click", "is_like", "is_follow", "is_comment", "is_forward", "is_hate", "long_view", "is_profile_enter")
USER_RANGES = ("follow_user_num_range", "fans_user_num_range", "friend_user_num_range", "register_days_range")
CONTEXT = ("user_active_degree", *USER_RANGES)
SEQUENCES = "user_sequences.parquet"
LONG_VIEW, LIKE, CLICK = (1 << ACTIONS.index(name) for name in ("long_view", "is_like", "is_click"))

SOURCE = (
    'KuaiRand, Kuaishou Technology: Chongming Gao et al., "KuaiRand: An Unbiased Sequential Recommendation Dataset '
    'with Randomly Exposed Videos", CIKM 2022, https://kuairand.com'
)

BY_DAY = GatheredRules(
    pools={
        "like": f"action & {LIKE} > 0",
        "long_view": f"action & {LONG_VIEW} > 0",
        "skip": f"candidate AND action & {CLICK} = 0",
    },
    samples="true",
    crosses={
        "user_x_author": Cross(("user_id", "item.author"), 400_000),
        "user_x_music": Cross(("user_id", "item.music"), 400_000),
        "user_x_hour": Cross(("user_id", "hour"), 200_000),
        "item_x_hour": Cross(("item_id", "hour"), 100_000),
        "author_x_hour": Cross(("item.author", "hour"), 100_000),
        "user_x_video_type": Cross(("user_id", "item.video_type"), 50_000),
        "user_x_author_x_hour": Cross(("user_id", "item.author", "hour"), 400_000),
    },
    users=27_285,
)
"""The nearest that there is to the data of MLPerf's recommender (`publishers.yambda`); rows are Pure's."""


def load(connection: duckdb.DuckDBPyConnection, source: Path, scratch: Path) -> Description:
    """Fill `events`, `users` and `items` from the publisher's files under `source`."""
    _load_log(connection, source, scratch)
    _load_sequences(connection, source)
    num_items, num_users = number_ids(connection, ("watch_time_ms",), candidate="candidate")
    context = _load_users(connection, source, scratch)
    spaces, columns = load_videos(connection, source, scratch)
    return Description(
        name="kuairand",
        spaces={**narrow_spaces(num_items, num_users, context), **spaces},
        columns=(*narrow_columns(context, ("watch_time_ms",)), *columns),
        actions=ACTIONS,
        source=SOURCE,
        licence="CC BY-SA 4.0 (https://creativecommons.org/licenses/by-sa/4.0/)",
        gathered=BY_DAY,
    )


def _load_log(connection: duckdb.DuckDBPyConnection, source: Path, scratch: Path) -> None:
    """Every row of the standard-policy logs as an event."""
    connection.execute(
        "CREATE TABLE raw (user_key BIGINT, item_key BIGINT, time BIGINT, rank BIGINT, log_row BIGINT, "
        "request_key UBIGINT, action INTEGER, candidate BOOLEAN, watch_time_ms INTEGER)"
    )
    types = dict.fromkeys(("user_id", "video_id", "time_ms", "play_time_ms", *ACTIONS), "BIGINT")
    mask = " + ".join(f"({name} << {bit})" for bit, name in enumerate(ACTIONS))
    rules = {"user_id >= 0": "user_id must not be negative or missing"}
    rules["video_id >= 0"] = "video_id must not be negative or missing"
    rules["time_ms > 0"] = "time_ms must be above 0"
    rules |= {f"{name} IN (0, 1)": f"label {name} must be 0 or 1" for name in ACTIONS}
    for number, path in enumerate(require_files(source, "log_standard_*.csv", "the log of the standard policy")):
        plain = plain_file(path, scratch)
        reader = csv_reader(plain, types)
        check_rows(connection, reader, path, rules)
        execute(
            connection,
            f"INSERT INTO raw SELECT user_id, video_id, time_ms // 1000, time_ms, log_row, NULL, {mask}, true, "
            f"least(greatest(coalesce(play_time_ms, 0), 0), 2147483647) FROM {numbered(reader, number)}",
            path,
        )


def _load_sequences(connection: duckdb.DuckDBPyConnection, source: Path) -> None:
    """What users watched before the log begins, where a file of such sequences lies beside it.

    Their times are unknown; of the actions only long_view and is_like are, so they serve as history and never as
    candidates.  Sequences that overlap the user's log are left out, because they would show the future.
    """
    columns = dict.fromkeys(("user_id", "last_time_ms", "watch_seq", "long_watch_seq", "like_seq"))
    for path in find_files(source, SEQUENCES):
        file = parquet_reader(connection, path, columns)
        execute(
            connection,
            f"""
            INSERT INTO raw
            SELECT user_id, item, -1, position - 1000000, position, NULL, action, false, 0 FROM (
                SELECT user_id, unnest(watch_seq) AS item, generate_subscripts(watch_seq, 1) AS position,
                    unnest(list_transform(watch_seq, lambda video:
                        (CASE WHEN list_contains(long_watch_seq, video) THEN {LONG_VIEW} ELSE 0 END)
                        + (CASE WHEN list_contains(like_seq, video) THEN {LIKE} ELSE 0 END))) AS action
                FROM {file} JOIN
                (SELECT user_key AS user_id, min(rank) AS first_ms FROM raw WHERE candidate GROUP BY ALL)
                USING (user_id) WHERE last_time_ms < first_ms)
            """,
            path,
        )


def _load_users(connection: duckdb.DuckDBPyConnection, source: Path, scratch: Path) -> dict[str, int]:
    """Context features, each value as its place among the sorted values of the file, from 1 on; 0 is unknown."""
    found = require_files(source, "user_features_*.csv", "the users' features")
    if len(found) != 1:
        names = ", ".join(path.name for path in found)
        raise ValueError(f"--source {source} must hold one user_features_*.csv, found {names}; name one size's folder")
    path = found[0]
    types = {"user_id": "BIGINT", **dict.fromkeys(CONTEXT, "VARCHAR")}
    reader = csv_reader(plain_file(path, scratch), types)
    check_rows(connection, reader, path, {"user_id >= 0": "user_id must not be negative or missing"})
    check_one_row_each(connection, reader, path, "user_id")
    columns = f"user_id AS user_key, {', '.join(CONTEXT)}"
    execute(connection, f"CREATE TABLE user_columns AS SELECT {columns} FROM {reader}", path)
    return number_context(connection, "user_columns", CONTEXT)
