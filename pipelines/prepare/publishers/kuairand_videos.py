"""What KuaiRand's publisher says of its videos: author, music, tags, kinds, duration."""

from pathlib import Path

import duckdb

from pipelines.features import Column, Space
from pipelines.prepare.engine import execute, plain_file, quoted, require_files
from pipelines.prepare.log.schema import SpaceOptions
from pipelines.prepare.publishers.files import check_rows, csv_reader
from pipelines.prepare.spaces import Keys, Lookup, look_up, number_keys

IDS = {"author": "author_id", "music": "nullif(music_id, 0)"}
"""Columns of ids of which one of a single video says nothing that the video's own id does not."""
KINDS = ("video_type", "upload_type", "music_type")
"""Columns of a few words."""
NUMBERS = {"duration_s": "video_duration / 1000"}
"""Columns of numbers."""
TYPES = {"video_id": "BIGINT", "author_id": "BIGINT", "music_id": "BIGINT", "tag": "VARCHAR"}
TYPES |= {**dict.fromkeys(KINDS, "VARCHAR"), "video_duration": "DOUBLE"}


def load_videos(
    connection: duckdb.DuckDBPyConnection, source: Path, scratch: Path
) -> tuple[dict[str, Space], tuple[Column, ...]]:
    """Fill `items` for the videos that have ids from the publisher's files of videos; returns spaces and columns."""
    values = {**IDS, **{name: name for name in KINDS}, **NUMBERS}
    texts = ", ".join(f"{value} AS {name}" for name, value in values.items())
    for number, path in enumerate(require_files(source, "video_features_basic_*.csv", "the videos' features")):
        reader = csv_reader(plain_file(path, scratch), TYPES)
        check_rows(connection, reader, path, {"video_id >= 0": "video_id must not be negative or missing"})
        rows = f"SELECT video_id, {texts}, coalesce(string_split(tag, ','), []) AS tags FROM {reader}"
        known = f"{rows} SEMI JOIN item_ids ON video_id = item_key"
        execute(connection, f"{'INSERT INTO videos' if number else 'CREATE TABLE videos AS'} {known}", path)
    twice = connection.execute("SELECT min(video_id) FROM videos GROUP BY video_id HAVING count(*) > 1").fetchall()
    if twice:
        raise ValueError(f"{source}: video_id {twice[0][0]} stands in several rows of the videos' features; give one")
    shared = SpaceOptions(min_count=2)
    spaces = {name: number_keys(connection, name, [Keys(table="videos", column=name)], shared) for name in IDS}
    spaces |= {
        name: number_keys(connection, name, [Keys(table="videos", column=name)], SpaceOptions()) for name in KINDS
    }
    spaces["tag"] = number_keys(connection, "tag", [Keys(table="videos", column="tags", many=True)], SpaceOptions())
    lookups = [Lookup(space=spaces[name], column=name) for name in (*IDS, *KINDS)]
    ids, joins = look_up(connection, "videos", [*lookups, Lookup(space=spaces["tag"], column="tags", many=True)])
    columns = "".join(f", {value} AS {quoted(name)}" for value, name in zip(ids, (*IDS, *KINDS, "tags"), strict=True))
    columns += "".join(f", coalesce(t.{name}, 'nan'::DOUBLE)::DOUBLE AS {name}" for name in NUMBERS)
    connection.execute(
        f"CREATE TABLE items AS SELECT item_ids.item_id{columns} FROM videos AS t{joins} "
        "JOIN item_ids ON item_key = video_id"
    )
    return spaces, (
        *(Column(name=name, part="item", kind="id", space=name) for name in (*IDS, *KINDS)),
        Column(name="tags", part="item", kind="ids", space="tag"),
        *(Column(name=name, part="item", kind="number") for name in NUMBERS),
    )
