"""Yambda (50M, 500M, 5B): the publisher's flat files of one size, and what is known of all its tracks.

    flat/SIZE/multi_event.parquet               all events, or instead of it
    flat/SIZE/listens.parquet, likes.parquet, dislikes.parquet, unlikes.parquet, undislikes.parquet
    artist_item_mapping.parquet, album_item_mapping.parquet

Its timestamps count from an unstated beginning in steps of 5; they are taken as they are.

With --histories gathered it becomes the data of MLPerf Training v6.1's recommender (DLRMv4): 300 days before the last
one and half an hour; each listening is a sample; a history holds the newest third of each of listenings of half a track
or more, likes, and shorter listenings; the columns of samples are the user and seven crosses.
"""

from pathlib import Path

import duckdb

from pipelines.features import Column, Space
from pipelines.prepare.engine import execute, find_files, numbered
from pipelines.prepare.log.schema import SpaceOptions
from pipelines.prepare.publishers.files import check_rows, parquet_reader
from pipelines.prepare.publishers.raw_log import number_context, number_ids
from pipelines.prepare.source import Cross, Description, GatheredRules, narrow_columns, narrow_spaces
from pipelines.prepare.spaces import Keys, Lookup, look_up, number_keys

ACTIONS = ("listen", "listen_plus", "like", "dislike", "unlike", "undislike", "organic")
MULTI_EVENT = "multi_event.parquet"
EVENTS = ("listen", "like", "dislike", "unlike", "undislike")
TYPES = {"uid": "BIGINT", "item_id": "BIGINT", "timestamp": "BIGINT", "is_organic": "INTEGER"}
LISTENED = {"played_ratio_pct": "DOUBLE"}
"""Numbers that only listenings have."""
KIND = {"event_type": "VARCHAR"}
RULES = {
    "uid >= 0": "uid must not be negative or missing",
    "item_id >= 0": "item_id must not be negative or missing",
    "timestamp >= 0": "timestamp must not be negative or missing",
    "is_organic IN (0, 1)": "is_organic must be 0 or 1",
    f"event_type IN {EVENTS}": f"event_type must be one of {', '.join(EVENTS)}",
}
OF_TRACKS = {"artist": "artist_item_mapping.parquet", "album": "album_item_mapping.parquet"}

DAY_S = 86_400
TEST_S, TRAIN_DAYS = DAY_S + 1800, 300
"""The benchmark's split: a day of test and half an hour before it are left out, and what is older than 300 days."""
DLRM_V4 = GatheredRules(
    pools={"listen_plus": "action & 2 > 0", "like": "action & 4 > 0", "skip": "action & 3 = 1"},
    samples="action & 1 > 0",
    within=f"time < (SELECT max(time) FROM events) - {TEST_S} "
    f"AND time >= (SELECT max(time) FROM events) - {TEST_S + TRAIN_DAYS * DAY_S}",
    crosses={
        "user_x_artist": Cross(("user_id", "item.artist"), 100_000_000),
        "user_x_album": Cross(("user_id", "item.album"), 40_000_000),
        "user_x_hour": Cross(("user_id", "hour"), 24_000_000),
        "item_x_hour": Cross(("item_id", "hour"), 40_000_000),
        "artist_x_hour": Cross(("item.artist", "hour"), 32_000_000),
        "user_x_organic": Cross(("user_id", "action.organic"), 2_000_000),
        "user_x_artist_x_hour": Cross(("user_id", "item.artist", "hour"), 40_000_000),
    },
    users=1_000_000,
)
"""As MLPerf's reference has it (mlcommons/training, recommendation_v4)."""


def load(connection: duckdb.DuckDBPyConnection, source: Path, scratch: Path) -> Description:
    """Fill `events`, `users` and, where the tracks' files are there, `items`; nothing goes through `scratch`."""
    bits = {name: f"event_type = '{name}'" for name in EVENTS}
    bits["listen_plus"] = "event_type = 'listen' AND played_ratio_pct >= 50"
    bits["organic"] = "is_organic = 1"
    mask = " + ".join(f"(CASE WHEN {bits[name]} THEN {1 << bit} ELSE 0 END)" for bit, name in enumerate(ACTIONS))
    for number, (path, kind) in enumerate(_event_files(source).items()):
        reader = _reader(connection, path, kind)
        check_rows(connection, reader, path, RULES, first_line=1, unit="row")
        execute(
            connection,
            f"{'INSERT INTO raw' if number else 'CREATE TABLE raw AS'} SELECT uid AS user_key, item_id AS item_key, "
            f"timestamp AS time, timestamp AS rank, log_row, NULL::UBIGINT AS request_key, ({mask})::INTEGER "
            "AS action, least(greatest(coalesce(played_ratio_pct, 0), 0), 1000)::INTEGER AS played_percent "
            f"FROM {numbered(reader, number)}",
            path,
        )
    num_items, num_users = number_ids(connection, ("played_percent",))
    number_context(connection, "(SELECT user_key FROM user_ids)", ())
    spaces, columns = _load_tracks(connection, source)
    both = " and ".join(OF_TRACKS.values())
    return Description(
        name="yambda",
        spaces={**narrow_spaces(num_items, num_users, {}), **spaces},
        columns=(*narrow_columns({}, ("played_percent",)), *columns),
        actions=ACTIONS,
        source="Yambda-5B, Yandex: A. Ploshkin et al., arXiv 2505.22238",
        licence="Apache-2.0",
        clock="relative",
        gathered=DLRM_V4 if spaces else f"put {both} into {source} or a folder above it",
    )


def _event_files(source: Path) -> dict[Path, str | None]:
    """The files of one size's events, and the kind of all events of each; None where a column tells it."""
    found = find_files(source, MULTI_EVENT)
    if len(found) == 1:
        return {found[0]: None}
    single = {kind: find_files(source, f"{kind}s.parquet") for kind in EVENTS}
    if not found and all(len(files) == 1 for files in single.values()):
        return {files[0]: kind for kind, files in single.items()}
    raise ValueError(
        f"--source {source} must hold one {MULTI_EVENT}, found {len(found)}, or else one each of "
        f"{', '.join(f'{kind}s.parquet' for kind in EVENTS)}; name the folder of one size"
    )


def _reader(connection: duckdb.DuckDBPyConnection, path: Path, kind: str | None) -> str:
    """SQL for the rows of a file of events, all of one kind unless it is None."""
    if kind is None:
        return parquet_reader(connection, path, {**TYPES, **LISTENED, **KIND})
    listened = LISTENED if kind == "listen" else {}
    values = "" if listened else ", NULL::DOUBLE AS played_ratio_pct"
    return f"(SELECT *{values}, '{kind}' AS event_type FROM {parquet_reader(connection, path, {**TYPES, **listened})})"


def _load_tracks(connection: duckdb.DuckDBPyConnection, source: Path) -> tuple[dict[str, Space], tuple[Column, ...]]:
    """Fill `items` with the artist and the album of each track of the log, if both files are in `source` or in one of
    the two folders above it, as they are published; returns spaces and columns.

    A track with several artists has the last that the file names.
    """
    folders = (source, source.parent, source.parent.parent)
    found = {name: [each / file for each in folders if (each / file).is_file()] for name, file in OF_TRACKS.items()}
    if not any(found.values()):
        return {}, ()
    for name, paths in found.items():
        if not paths:
            raise ValueError(f"--source {source} lacks {OF_TRACKS[name]}: give both files of the tracks, or neither")
        types = {"item_id": "BIGINT", f"{name}_id": "BIGINT"}
        reader = parquet_reader(connection, paths[0], types)
        rules = {f"{column} >= 0": f"{column} must not be negative or missing" for column in types}
        check_rows(connection, reader, paths[0], rules, first_line=1, unit="row")
        execute(
            connection,
            f"CREATE TABLE of_{name} AS SELECT t.item_id, arg_max({name}_id, log_row) AS {name} "
            f"FROM {numbered(reader)} AS t SEMI JOIN item_ids ON t.item_id = item_key GROUP BY t.item_id",
            paths[0],
        )
    joins = " ".join(f"LEFT JOIN of_{name} ON of_{name}.item_id = item_key" for name in OF_TRACKS)
    connection.execute(f"CREATE TABLE tracks AS SELECT item_ids.item_id, {', '.join(OF_TRACKS)} FROM item_ids {joins}")
    spaces = {
        name: number_keys(connection, name, [Keys(table="tracks", column=name)], SpaceOptions()) for name in OF_TRACKS
    }
    ids, look = look_up(connection, "tracks", [Lookup(space=spaces[name], column=name) for name in OF_TRACKS])
    values = ", ".join(f"{value} AS {name}" for value, name in zip(ids, OF_TRACKS, strict=True))
    connection.execute(f"CREATE TABLE items AS SELECT t.item_id, {values} FROM tracks AS t{look}")
    return spaces, tuple(Column(name=name, part="item", kind="id", space=name) for name in OF_TRACKS)
