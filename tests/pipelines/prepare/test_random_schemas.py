"""Any columns: what a run reads of random schemas equals a plain reading of the same rows, on 1, 2 and 3 ranks."""

import json
import math
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines.batches.batch import Batch
from pipelines.config import DataConfig
from pipelines.features import Column, DatasetInfo
from pipelines.reading.loader import build_loader
from pipelines.selection import Selection, select, unread_columns
from pipelines.storage.dataset_json import read_dataset_info

MAX_HISTORY = 5
Row = dict[str, Any]


@dataclass
class World:
    """A data set and the Python objects that it was written from."""

    info: DatasetInfo
    rows: list[Row]
    items: dict[int, Row]
    selection: Selection
    path: str


def value(draw: random.Random, column: Column, spaces: dict[str, Any]) -> Any:
    """A random value of a column; numbers may be missing."""
    if column.kind == "number":
        return draw.choice([math.nan, 0.0, -2.5, 1e6, draw.random()])
    rows = spaces[column.space or ""]["rows"]
    if column.kind == "id":
        return draw.randrange(rows)
    return [draw.randrange(rows) for _ in range(draw.randrange(4))]


def arrow_type(column: Column) -> pa.DataType:
    base = pa.float64() if column.kind == "number" else pa.int64()
    return pa.list_(base) if column.kind == "ids" else base


def make_world(folder: Path, seed: int) -> World:
    draw = random.Random(seed)
    spaces = {"item": {"rows": 12}, **{f"space_{n}": {"rows": draw.randrange(1, 9)} for n in range(3)}}

    def columns(part: str, most: int) -> dict[str, Any]:
        words = ["number", *spaces, *([name] for name in spaces if part != "label")]
        return {f"{part}_{n}": draw.choice(words) for n in range(draw.randrange(most + 1))}

    shared = {"both": draw.choice(["number", "space_0", ["space_1"]])} if draw.random() < 0.5 else {}
    values: dict[str, Any] = {
        "format_version": 2,
        "name": "random",
        "spaces": spaces,
        "sample": columns("sample", 3),
        "event": {"item_id": "item", **shared, **columns("event", 3)},
        "candidate": {"item_id": "item", **shared, **columns("candidate", 3)},
        "item": columns("item", 3),
        "label": columns("label", 2),
        "actions": ["click", "like"],
        "clock": "relative",
        "splits": {"train": {"samples": 20, "history_events": 0, "candidates": 0}},
        "source": "made up",
        "licence": "none",
    }
    folder.mkdir()
    (folder / "dataset.json").write_text(json.dumps(values))
    info = read_dataset_info(str(folder))
    # Some items have no row; they have what is missing.
    items = {
        item: {column.name: value(draw, column, spaces) for column in info.of("item")}
        for item in range(12)
        if draw.random() < 0.7
    }
    if info.of("item"):
        (folder / "items").mkdir()
        fields = [pa.field("item_id", pa.int64()), *(pa.field(c.name, arrow_type(c)) for c in info.of("item"))]
        table = [{"item_id": item, **row} for item, row in draw.sample(sorted(items.items()), len(items))]
        pq.write_table(pa.Table.from_pylist(table, pa.schema(fields)), folder / "items" / "part-0.parquet")
    rows = [random_row(draw, info, spaces, user) for user in range(20)]
    fields = [pa.field("user_id", pa.int64())]
    for part in ("history", "candidate"):
        for name, kind in (("item_id", pa.int64()), ("action", pa.int32()), ("timestamp", pa.int64())):
            fields.append(pa.field(f"{part}_{name}", pa.list_(kind)))
    for column in info.columns:
        if column.part != "item" and column.name != "item_id":
            kind = arrow_type(column)
            fields.append(pa.field(column.stored, kind if column.part == "sample" else pa.list_(kind)))
    for split in ("train", "eval"):
        (folder / split).mkdir()
        pq.write_table(
            pa.Table.from_pylist(rows, pa.schema(fields)), folder / split / "part-0.parquet", row_group_size=6
        )
    labels = tuple(column.name for column in info.of("label"))
    chosen = select(info, labels=labels) if draw.random() < 0.5 else random_selection(draw, info, labels)
    return World(info=info, rows=rows, items=items, selection=chosen, path=str(folder))


def random_selection(draw: random.Random, info: DatasetInfo, labels: tuple[str, ...]) -> Selection:
    """Some of the columns, in any order."""

    def some(part: str) -> list[str]:
        names = [column.name for column in info.columns if column.part == part]
        names += [f"item.{column.name}" for column in info.of("item")] if part != "sample" else []
        return draw.sample(names, draw.randrange(len(names) + 1))

    return select(info, event=some("event"), candidate=some("candidate"), context=some("sample"), labels=labels)


def random_row(draw: random.Random, info: DatasetInfo, spaces: dict[str, Any], user: int) -> Row:
    history, candidates = draw.randrange(9), draw.randrange(1, 4)
    row: Row = {"user_id": user}
    for part, size, first in (("history", history, 0), ("candidate", candidates, 1000)):
        row[f"{part}_item_id"] = [draw.randrange(12) for _ in range(size)]
        row[f"{part}_action"] = [draw.randrange(4) for _ in range(size)]
        row[f"{part}_timestamp"] = [first + place for place in range(size)]
    for column in info.columns:
        if column.part == "sample":
            row[column.stored] = value(draw, column, spaces)
        elif column.part != "item" and column.name != "item_id":
            size = history if column.part == "event" else candidates
            row[column.stored] = [value(draw, column, spaces) for _ in range(size)]
    return row


def expected_values(world: World, feature: Any, rows: list[Row]) -> list[Any]:
    """A feature's values over its rows, read plainly."""
    if feature.parts == ("sample",):
        return [row[feature.column] for row in rows]
    found = []
    for part, prefix, cut in (
        ("event", "history_", slice(-MAX_HISTORY, None)),
        ("candidate", "candidate_", slice(None)),
    ):
        if part not in feature.parts:
            continue
        for row in rows:
            if feature.of_item:
                missing = {"id": 0, "ids": [], "number": math.nan}[feature.kind]
                ids = row[f"{prefix}item_id"][cut]
                found += [world.items.get(item, {}).get(feature.column, missing) for item in ids]
            else:
                found += row[prefix + feature.column][cut]
    return found


def same(left: list[float], right: list[float]) -> bool:
    return len(left) == len(right) and all(
        a == pytest.approx(b) or (math.isnan(a) and math.isnan(b)) for a, b in zip(left, right, strict=True)
    )


def check(world: World, batch: Batch) -> None:
    """One rank's batch against its rows."""
    inputs = batch.inputs
    rows = [world.rows[user] for user in inputs.user_id.tolist() if user >= 0]
    if not rows:
        return
    for feature in world.selection.features:
        expected = expected_values(world, feature, rows)
        if feature.kind == "number":
            assert same(inputs.numbers[feature.name].tolist(), expected), feature
        elif feature.kind == "id":
            assert inputs.ids_host(feature.name).tolist() == expected, feature
        else:
            assert inputs.ids_host(feature.name).tolist() == [one for many in expected for one in many], feature
            assert inputs.lens[feature.name].tolist() == [len(many) for many in expected], feature
    for label in world.selection.labels:
        assert same(batch.labels.values[label.name].tolist(), [one for row in rows for one in row[label.stored]])


@pytest.mark.parametrize("seed", range(25))
def test_batches_equal_a_plain_reading_on_any_number_of_ranks(tmp_path: Path, seed: int) -> None:
    world = make_world(tmp_path / "data", seed)
    config = DataConfig(
        path=world.path, global_batch_size=7, max_history_len=MAX_HISTORY, reader_threads=int(seed % 10 == 0)
    )
    for world_size in (1, 2, 3):
        seen: list[int] = []
        for rank in range(world_size):
            loader = build_loader(config, split="train", rank=rank, world_size=world_size, selection=world.selection)
            for batch in loader:
                check(world, batch)
                seen += [user for user in batch.inputs.user_id.tolist() if user >= 0]
        assert sorted(seen) == list(range(20))


@pytest.mark.parametrize("seed", range(5))
def test_each_column_is_read_or_named_as_unread(tmp_path: Path, seed: int) -> None:
    info = make_world(tmp_path / "data", seed).info
    columns = [(column.part, column.name) for column in info.columns if column.name != "item_id"]
    labels = tuple(name for part, name in columns if part == "label")
    assert unread_columns(select(info, labels=labels), info) == []
    none = select(info, event=("item_id",), candidate=("item_id",), context=())
    assert unread_columns(none, info) == [f"{part}.{name}" for part, name in columns]
    for part, name in columns:
        given = {"labels": (name,)} if part == "label" else {"context": (name,)} if part == "sample" else {}
        given |= (
            {part: (name,)}
            if part in ("event", "candidate")
            else {"event": (f"item.{name}",)}
            if part == "item"
            else {}
        )
        alone = select(info, **{"event": (), "candidate": (), "context": (), "labels": (), **given})
        assert unread_columns(alone, info) == [f"{p}.{n}" for p, n in columns if (p, n) != (part, name)]


def test_what_an_items_file_lacks_or_repeats_is_refused(tmp_path: Path) -> None:
    seed = next(seed for seed in range(100) if random_world_has_item_columns(tmp_path / f"try-{seed}", seed))
    for name, change, message in (
        ("no folder", None, "items does not exist"),
        ("twice", lambda table: pa.concat_tables([table, table.slice(0, 1)]), "an item_id stands in two rows"),
        ("unknown", lambda table: table.set_column(0, "item_id", pa.array([99] * len(table))), r"outside \[0, 12\)"),
        ("without", lambda table: table.drop_columns(table.column_names[-1]), "lacks the column item_"),
    ):
        world = make_world(tmp_path / name, seed)
        file = Path(world.path) / "items" / "part-0.parquet"
        table = pq.read_table(file)
        file.unlink()
        if change is None:
            file.parent.rmdir()
        else:
            pq.write_table(change(table), file)
        config = DataConfig(path=world.path, global_batch_size=7, max_history_len=MAX_HISTORY, reader_threads=0)
        with pytest.raises(ValueError, match=message):
            list(build_loader(config, split="train", rank=0, world_size=1, selection=select(world.info)))


def random_world_has_item_columns(folder: Path, seed: int) -> bool:
    return bool(make_world(folder, seed).info.of("item"))
