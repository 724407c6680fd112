"""Malformed prepared data: one clear line each, naming the file."""

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines.config import DataConfig
from pipelines.reading.loader import build_loader, dataset_info
from pipelines.selection import select
from pipelines.storage.dataset_json import read_dataset_info
from tests.pipelines.made_up import START, dataset_json, made_up_rows, table_of, write_dataset

Rows = list[dict[str, Any]]


def write(folder: Path, rows: Rows, change: Callable[[pa.Table], pa.Table] = lambda table: table) -> str:
    for split in ("train", "eval"):
        (folder / split).mkdir(parents=True)
        pq.write_table(change(table_of(rows)), folder / split / "part-0.parquet")
    (folder / "dataset.json").write_text(json.dumps(dataset_json({"train": rows, "eval": rows})))
    return str(folder)


def read_all(
    path: str, threads: int = 1, labels: Sequence[str] = (), counts: Sequence[str] | None = (), **options: Any
) -> None:
    config = DataConfig(
        path=path, global_batch_size=4, max_history_len=64, reader_threads=threads, prefetch_batches=2, **options
    )
    selection = select(dataset_info(config), labels=labels, counts=counts)
    for _ in build_loader(config, split="train", rank=0, world_size=1, selection=selection):
        pass


def too_large(rows: Rows) -> None:
    rows[3]["history_item_id"][0] = 500


def negative(rows: Rows) -> None:
    rows[3]["candidate_item_id"][0] = -1


def context(rows: Rows) -> None:
    rows[3]["country"] = 7


def label(rows: Rows) -> None:
    rows[3]["candidate_action"][0] = 4


def shorter(rows: Rows) -> None:
    rows[3]["history_action"].pop()


def unsorted(rows: Rows) -> None:
    rows[3]["history_timestamp"][-2:] = [START + 50, START + 49]


def leak(rows: Rows) -> None:
    rows[3]["history_timestamp"][-1] = START + 20_000


def same_time(rows: Rows) -> None:
    rows[3]["history_timestamp"][-1] = rows[3]["candidate_timestamp"][0]


def negative_time(rows: Rows) -> None:
    rows[3]["history_timestamp"][0] = -2


def null_id(rows: Rows) -> None:
    rows[3]["history_item_id"][0] = None


def null_row(rows: Rows) -> None:
    rows[3]["user_id"] = None


def no_events(rows: Rows) -> None:
    rows[3].update({name: [] for name in rows[3] if name not in ("user_id", "country")})


CASES = {
    too_large: r"history_item_id of row 3 is 500, outside \[0, 500\)",
    negative: r"candidate_item_id of row 3 is -1, outside",
    context: r"column country of row 3 is 7, outside \[0, 7\)",
    label: r"candidate_action of row 3 is 4, outside \[0, 4\)",
    shorter: r"row 3: history_action holds \d+ values, but history_item_id holds \d+",
    unsorted: "row 3: history_timestamp falls",
    leak: "row 3: the history reaches the time of the first candidate, which leaks",
    same_time: "row 3: the history reaches the time of the first candidate, which leaks",
    negative_time: "row 3: history_timestamp -2 is negative",
    null_id: "column history_item_id holds missing values; only numbers may be null",
    null_row: "column user_id holds missing values",
    no_events: "row 3: user 3 has no events at all",
}


@pytest.mark.parametrize("threads", [0, 2])
@pytest.mark.parametrize("spoil", CASES, ids=lambda spoil: spoil.__name__)
def test_bad_rows_are_named(tmp_path: Path, spoil: Callable[[Rows], None], threads: int) -> None:
    rows = [row for row in made_up_rows(40) if len(row["history_item_id"]) > 4][:10]
    for user, row in enumerate(rows):
        row["user_id"] = user
    spoil(rows)
    with pytest.raises(ValueError, match=CASES[spoil]) as caught:
        read_all(write(tmp_path / "d", rows), threads)
    assert "part-0.parquet" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_equal_times_are_the_order_of_places_where_the_data_says_so(tmp_path: Path) -> None:
    rows = [row for row in made_up_rows(40) if len(row["history_item_id"]) > 4][:10]
    same_time(rows)
    path = write(tmp_path / "d", rows)
    description = json.loads((tmp_path / "d" / "dataset.json").read_text())
    (tmp_path / "d" / "dataset.json").write_text(json.dumps(description | {"cut": "by_place"}))
    read_all(path, 0)
    leak(rows)
    path = write(tmp_path / "e", rows)
    (tmp_path / "e" / "dataset.json").write_text(json.dumps(description | {"cut": "by_place"}))
    with pytest.raises(ValueError, match="row 3: the history reaches"):
        read_all(path, 0)


def test_missing_column(tmp_path: Path) -> None:
    path = write(tmp_path / "d", made_up_rows(5), lambda table: table.drop_columns("candidate_action"))
    with pytest.raises(ValueError, match=r"part-0.parquet lacks the column candidate_action"):
        read_all(path)


def test_wrong_type(tmp_path: Path) -> None:
    def change(table: pa.Table) -> pa.Table:
        index = table.schema.get_field_index("country")
        return table.set_column(index, "country", table["country"].cast(pa.float64()))

    with pytest.raises(ValueError, match="column country must have the type int64, got double"):
        read_all(write(tmp_path / "d", made_up_rows(5), change))


def test_labels_that_may_be_nan(tmp_path: Path) -> None:
    rows = made_up_rows(5)

    def change(table: pa.Table) -> pa.Table:
        values = [[float("nan")] * len(row["candidate_item_id"]) for row in rows]
        index = table.schema.get_field_index("candidate_action")
        return table.set_column(index, "candidate_action", pa.array(values, pa.list_(pa.float32())))

    with pytest.raises(ValueError, match="column candidate_action must have the type list<int32>, got list<"):
        read_all(write(tmp_path / "d", rows, change))


def with_watch_times(rows: Rows, first: float) -> Callable[[pa.Table], pa.Table]:
    """Lets each history's first watch time be this."""

    def change(table: pa.Table) -> pa.Table:
        values = [[first] + [1.0] * (len(row["history_item_id"]) - 1) for row in rows]
        index = table.schema.get_field_index("history_watch_time")
        return table.set_column(index, "history_watch_time", pa.array(values, pa.list_(pa.float64())))

    return change


@pytest.mark.parametrize("wrong", [float("-inf"), 1e39, -1e300])
def test_a_number_may_be_missing_and_not_infinite(tmp_path: Path, wrong: float) -> None:
    rows = [row for row in made_up_rows(20) if len(row["history_item_id"]) > 2][:5]
    read_all(write(tmp_path / "missing", rows, with_watch_times(rows, float("nan"))))
    with pytest.raises(ValueError, match="column history_watch_time of row 0 is infinite"):
        read_all(write(tmp_path / "infinite", rows, with_watch_times(rows, wrong)))


@pytest.mark.parametrize(
    ("role", "wrong", "rule"),
    [
        ("weight", -1.0, "a weight is at least 0"),
        ("weight", None, "a weight is at least 0"),
        ("weight", float("nan"), "a weight is at least 0"),
        ("keep_rate", 0.0, "a keep rate is above 0 and at most 1"),
        ("keep_rate", 1.5, "a keep rate is above 0 and at most 1"),
    ],
)
def test_a_weight_that_cannot_be_is_refused_without_statistics(
    tmp_path: Path, role: str, wrong: float | None, rule: str
) -> None:
    rows = made_up_rows(5)

    def change(table: pa.Table) -> pa.Table:
        values: list[list[float | None]] = [[1.0] * len(row["candidate_item_id"]) for row in rows]
        values[3][-1] = wrong
        return table.append_column("label_sold", pa.array(values, pa.list_(pa.float64())))

    path = write(tmp_path / "d", rows, change)
    description = dataset_json({"train": rows, "eval": rows})
    description |= {"format_version": 2, "spaces": {"item": {"rows": 500}, "country": {"rows": 7}}, role: "sold"}
    description |= {"event": {"item_id": "item"}, "candidate": {"item_id": "item"}, "label": {"sold": "number"}}
    (tmp_path / "d" / "dataset.json").write_text(json.dumps(description))
    with pytest.raises(ValueError, match=f"column label_sold of row 3 is .*; {rule}, and never missing"):
        read_all(path, 0, labels=("sold",))


@pytest.mark.parametrize(("seen", "taken"), [(3, 4), (-1, -1), (3, -1), (-1, 0)])
def test_counts_that_cannot_be_are_refused(tmp_path: Path, seen: int, taken: int) -> None:
    rows = made_up_rows(5)

    def change(table: pa.Table) -> pa.Table:
        for name, wrong in (("seen", seen), ("clicked", taken), ("liked", 0)):
            values: list[list[float | None]] = [[None] * len(row["candidate_item_id"]) for row in rows]
            values[3][-1] = wrong
            table = table.append_column(f"candidate_{name}", pa.array(values, pa.list_(pa.float64())))
        return table

    path = write(tmp_path / "d", rows, change)
    description = dataset_json({"train": rows, "eval": rows})
    description |= {"format_version": 2, "spaces": {"item": {"rows": 500}}, "event": {"item_id": "item"}}
    description["candidate"] = {"item_id": "item", **dict.fromkeys(("seen", "clicked", "liked"), "number")}
    description["counts"] = {"item": {"seen": "seen", "taken": ["clicked", "liked"]}}
    (tmp_path / "d" / "dataset.json").write_text(json.dumps(description))
    with pytest.raises(ValueError, match=r"row 3: of -?\d\.0 events in candidate_seen, -?\d\.0 are counted in"):
        read_all(path, 0, counts=None)


def test_wrong_length_column(tmp_path: Path) -> None:
    rows = made_up_rows(5)

    def change(table: pa.Table) -> pa.Table:
        lens = pa.array([len(row["history_item_id"]) + (index == 2) for index, row in enumerate(rows)], pa.int32())
        candidates = pa.array([len(row["candidate_item_id"]) for row in rows], pa.int32())
        return table.append_column("history_length", lens).append_column("num_candidates", candidates)

    with pytest.raises(ValueError, match="row 2: history_length says"):
        read_all(write(tmp_path / "d", rows, change))

    def as_text(table: pa.Table) -> pa.Table:
        changed = change(table)
        return changed.set_column(changed.column_names.index("history_length"), "history_length", [["9"] * 5])

    with pytest.raises(ValueError, match="column history_length must hold whole numbers, got string"):
        read_all(write(tmp_path / "text", rows, as_text))


def test_truncated_parquet(tmp_path: Path) -> None:
    path = write(tmp_path / "d", made_up_rows(50))
    file = tmp_path / "d" / "train" / "part-0.parquet"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"part-0.parquet is not a readable Parquet file"):
        read_all(path)


def test_damaged_pages(tmp_path: Path) -> None:
    path = write(tmp_path / "d", made_up_rows(50))
    file = tmp_path / "d" / "train" / "part-0.parquet"
    content = bytearray(file.read_bytes())
    content[4:600] = bytes(596)
    file.write_bytes(bytes(content))
    with pytest.raises(ValueError, match=r"part-0.parquet"):
        read_all(path)


def test_empty_file_and_empty_folder(tmp_path: Path) -> None:
    path = write(tmp_path / "d", made_up_rows(3), lambda table: table.slice(0, 0))
    with pytest.raises(ValueError, match="train holds no rows"):
        read_all(path)
    (tmp_path / "d" / "train" / "part-0.parquet").write_bytes(b"")
    with pytest.raises(ValueError, match="not a readable Parquet file"):
        read_all(path)
    (tmp_path / "d" / "train" / "part-0.parquet").unlink()
    with pytest.raises(ValueError, match=r"train holds no \.parquet file"):
        read_all(path)


def test_missing_or_malformed_description(tmp_path: Path) -> None:
    path = write(tmp_path / "d", made_up_rows(3))
    file = tmp_path / "d" / "dataset.json"
    good = json.loads(file.read_text())
    for content, message in (
        ("{", "is not valid JSON"),
        ("[]", "must hold a JSON object"),
        (json.dumps({**good, "actions": []}), "'actions' must name at least one action"),
        (json.dumps({**good, "num_items": 0}), "space 'item': rows and used must be whole numbers above 0"),
        (json.dumps({**good, "format_version": 9}), "format_version is 9, this version reads 1 and 2"),
        (json.dumps({**good, "splits": good["splits"] | {"train": {}}}), "must give samples"),
    ):
        file.write_text(content)
        with pytest.raises(ValueError, match=message):
            read_all(path)
    file.unlink()
    with pytest.raises(ValueError, match=r"dataset\.json does not exist"):
        read_all(path)


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("hdfs://namenode:8020/data", "hdfs:// needs Hadoop's client: JAVA_HOME, HADOOP_HOME and CLASSPATH"),
        ("ftp://host/data", "Unrecognized filesystem type"),
    ],
)
def test_an_address_that_this_machine_cannot_open(
    address: str, message: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in ("JAVA_HOME", "HADOOP_HOME", "ARROW_LIBHDFS_DIR"):
        monkeypatch.setenv(name, str(tmp_path))
    with pytest.raises(ValueError, match="cannot be opened") as caught:
        read_all(address)
    assert address in str(caught.value)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_columns_that_the_data_does_not_have(tmp_path: Path) -> None:
    info = read_dataset_info(write(tmp_path / "d", made_up_rows(3)))
    with pytest.raises(
        ValueError, match=r"names 'dwell', which is none of the event columns of made_up: item_id, watch_time"
    ):
        select(info, event=("dwell",))
    with pytest.raises(ValueError, match=r"names a candidate column twice: item_id, item_id"):
        select(info, candidate=("item_id", "item_id"))
    with pytest.raises(ValueError, match=r"label 'dwell' is none of the data set's label columns: none"):
        select(info, labels=("dwell",))


def test_what_other_systems_keep_beside_the_data_is_not_read(tmp_path: Path) -> None:
    rows = made_up_rows(30)
    path = write(tmp_path / "d", rows)
    train = tmp_path / "d" / "train"
    for name in ("_temporary/0/part-9.parquet", ".hidden/part-9.parquet", "_metadata.parquet", ".part-0.parquet"):
        (train / name).parent.mkdir(parents=True, exist_ok=True)
        (train / name).write_text("no Parquet at all")
    (train / "_day=2024-05-01").mkdir()
    (train / "part-0.parquet").rename(train / "_day=2024-05-01" / "part-0.parquet")
    read_all(path, 0)


@pytest.mark.parametrize("damage", ["a file is missing", "a file too many"])
def test_data_that_is_not_whole_is_refused_when_it_is_opened(tmp_path: Path, damage: str) -> None:
    write_dataset(tmp_path / "d", train=103, files=3)
    part = tmp_path / "d" / "train" / "part-1.parquet"
    if damage == "a file is missing":
        part.unlink()
    else:
        shutil.copy(part, part.with_name("part-9.parquet"))
    with pytest.raises(ValueError, match=r"train holds \d+ samples in \d file\(s\), dataset.json tells of 103"):
        read_all(str(tmp_path / "d"), 0)


@pytest.mark.parametrize(
    ("times", "guess"),
    [(lambda time: time * 1000, "are they milliseconds"), (lambda time: time // 3600, "are they hours")],
)
def test_times_in_another_unit_are_refused_unless_their_clock_is_their_own(
    tmp_path: Path, times: Callable[[int], int], guess: str
) -> None:
    rows = [row for row in made_up_rows(60) if not row["history_item_id"]]
    for row in rows:
        row["candidate_timestamp"] = [times(time) for time in row["candidate_timestamp"]]
    path = write(tmp_path / "d", rows)
    with pytest.raises(ValueError, match=f"as seconds since 1970: {guess}"):
        read_all(path, 0)
    description = json.loads((tmp_path / "d" / "dataset.json").read_text())
    (tmp_path / "d" / "dataset.json").write_text(json.dumps(description | {"clock": "relative"}))
    read_all(path, 0)
