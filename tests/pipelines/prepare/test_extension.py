"""The next day's log into a prepared data set: ids stay, histories reach back, and nothing is lost on the way."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines.prepare.__main__ import main
from pipelines.storage.dataset_json import read_dataset_info
from pipelines.storage.vocabulary import check_same_ids, vocabularies
from tests.pipelines.prepare.test_event_log import HOUR, keys_of
from tests.pipelines.prepare.test_prepare import read_back, write_lines

DAY = 86_400
SCHEMA = """
user = "who"
item = "what"
time = "when"
actions = ["buy", "like"]
[event]
dwell = "number"
tags = ["tag"]
[candidate]
surface = "surface"
[sample]
land = "land"
[items]
files = "items.parquet"
columns = { brand = "brand" }
[spaces.item]
rows = 40
"""

ATTRIBUTES = """
user = "who"
item = "what"
time = "when"
actions = ["buy"]
[users]
files = "users.parquet"
columns = { age = "number", club = "club" }
[items]
files = "items.parquet"
columns = { brand = "brand", tags = ["tag"] }
"""


def day_of(day: int, users: Iterable[int], items: int, seed: int = 0) -> list[dict[str, Any]]:
    """A day's events, no two of a user in one second; later days have more items and tags."""
    generator = np.random.default_rng((seed, day))
    rows = []
    for user in users:
        for time in np.sort(generator.choice(DAY, 10, replace=False)):
            row = {"who": f"u{user}", "what": f"i{generator.integers(items)}", "when": HOUR + day * DAY + int(time)}
            row |= {"buy": int(generator.integers(2)), "like": int(generator.integers(2))}
            row |= {"dwell": float(generator.integers(100)), "surface": f"s{generator.integers(day + 2)}"}
            row |= {"tags": [f"t{tag}" for tag in generator.integers(0, 3 * day + 3, 2)]}
            rows.append(row | {"land": None if generator.random() < 0.5 else f"l{user % (day + 2)}"})
    return rows


def write_day(folder: Path, rows: list[dict[str, Any]], brands: dict[str, str] | None = None) -> Path:
    folder.mkdir()
    pq.write_table(pa.Table.from_pylist(rows), folder / "log.parquet")
    if brands is not None:
        table = pa.table({"what": list(brands), "brand": list(brands.values())})
        pq.write_table(table, folder / "items.parquet")
    return folder


def run(source: Path, *options: object) -> int:
    return main(["event_log", "--source", str(source), "--memory-gib", "1", *map(str, options)])


def first_day(tmp_path: Path, *options: object) -> tuple[Path, list[dict[str, Any]]]:
    """A data set of one day."""
    rows = day_of(0, range(6), 8)
    (tmp_path / "schema.toml").write_text(SCHEMA)
    source = write_day(tmp_path / "day0", rows, {f"i{item}": f"b{item % 3}" for item in range(8)})
    out = tmp_path / "shop"
    options = ("--schema", tmp_path / "schema.toml", "--samples-per-user", 0, "--candidates", 3, *options)
    assert run(source, "--out", out, *options) == 0
    return out, rows


def rows_in(out: Path, split: str, part: str) -> list[dict[str, Any]]:
    return [row for path in sorted((out / split / part).glob("*.parquet")) for row in pq.read_table(path).to_pylist()]


def files_of(out: Path) -> dict[str, bytes]:
    return {str(path.relative_to(out)): path.read_bytes() for path in sorted(out.rglob("*")) if path.is_file()}


def check_part(out: Path, part: str, log: list[dict[str, Any]], since: int, max_history: int = 1 << 20) -> None:
    """Every sample of a part equals a plain reading of all days up to it."""
    keys = {space: keys_of(out, space) for space in ("user", "item", "tag", "surface", "land")}
    samples = rows_in(out, "train", part) + rows_in(out, "eval", part)
    taught = 0
    for sample in samples:
        user = keys["user"][sample["user_id"]]
        ours = [row for row in log if row["who"] == user]
        middle = next(i for i, row in enumerate(ours) if row["when"] == sample["candidate_timestamp"][0])
        past, future = ours[max(middle - max_history, 0) : middle], ours[middle : middle + sample["num_candidates"]]
        assert [keys["item"][item] for item in sample["history_item_id"]] == [row["what"] for row in past]
        assert sample["history_timestamp"] == [row["when"] for row in past]
        assert sample["history_dwell"] == [row["dwell"] for row in past]
        assert [[keys["tag"][tag] for tag in tags] for tags in sample["history_tags"]] == [row["tags"] for row in past]
        assert [keys["item"][item] for item in sample["candidate_item_id"]] == [row["what"] for row in future]
        assert [keys["surface"][each] for each in sample["candidate_surface"]] == [row["surface"] for row in future]
        lands = [row["land"] for row in ours[:middle] if row["land"] is not None]
        assert keys["land"].get(sample["land"]) == (lands[-1] if lands else None)
        for place, row in enumerate(future):
            before = [each for each in log if each["when"] < row["when"] and each["what"] == row["what"]]
            assert sample["candidate_item_seen"][place] == len(before)
            assert sample["candidate_item_taken_0"][place] == sum(each["buy"] for each in before)
            together = [each for each in before if each["who"] == user]
            assert sample["candidate_user_item_seen"][place] == len(together)
        assert all(row["when"] >= since for row in future)
        taught += len(future)
    assert taught > 0


def test_days_one_after_another(tmp_path: Path) -> None:
    out, log = first_day(tmp_path)
    for day, users in ((1, (1, 2, 3, 8)), (2, (0, 2, 8, 9))):
        before, known = files_of(out), {space: keys_of(out, space) for space in ("user", "item", "tag", "brand")}
        digests = vocabularies(read_dataset_info(str(out)))
        rows = day_of(day, users, 8 + 4 * day)
        brands = {"i1": "new", f"i{8 + 4 * day - 1}": "later"} if day == 1 else None
        assert run(write_day(tmp_path / f"day{day}", rows, brands), "--extend", out) == 0
        log = sorted(log + rows, key=lambda row: row["when"])
        after, part = files_of(out), f"part={day:05d}"
        data = {name: content for name, content in before.items() if name.startswith(("train", "eval"))}
        assert all(after[name] == content for name, content in data.items())
        assert {space: dict(list(keys_of(out, space).items())[: len(ids)]) for space, ids in known.items()} == known
        check_part(out, part, log, since=HOUR + day * DAY)
        info = read_dataset_info(str(out))
        assert info.parts == (".", *(f"part={number:05d}" for number in range(1, day + 1)))
        assert info.details["deliveries"][part]["statistics"]["events"] == len(rows)
        # All parts are trained on, the newest is for evaluation.
        assert read_back(out) == info.splits["train"].samples + len(rows_in(out, "eval", part))
        assert info.splits["eval"].samples == sum(len(rows_in(out, "eval", each)) for each in info.parts)
        check_same_ids(digests, info, data="grown", other="earlier")
        names = [path.name for path in out.iterdir()]
        assert not [name for name in names if name.startswith(".")]
        assert [name for name in names if name.startswith("state")] == [f"state-{day:05d}"]
    items = {row["item_id"]: row["brand"] for row in pq.read_table(out / "items").to_pylist()}
    brands_by_item = {key: keys_of(out, "brand").get(items[item]) for item, key in keys_of(out, "item").items()}
    assert brands_by_item["i0"] == "b0"
    assert brands_by_item["i1"] == "new"
    assert info.spaces["item"].rows == 40


def test_the_newest_row_of_attributes_counts_as_a_whole_and_waits_for_its_item(tmp_path: Path) -> None:
    """As one preparation of both logs with the newest row of each user and item has it."""
    (tmp_path / "schema.toml").write_text(ATTRIBUTES)
    first_items = {
        "keeps": ("b1", ["t1"]),
        "changes": ("b1", ["t1", "t2"]),
        "loses": ("b2", ["t1"]),
        "waits": ("b3", ["t3"]),
    }
    then_items = {"changes": ("b4", ["t4"]), "loses": (None, [])}
    first_users = {"stays": (1.0, "c1"), "moves": (2.0, "c2"), "comes": (3.0, "c3")}
    then_users = {"moves": (None, "c4")}

    def write(name: str, events: list[tuple[str, str]], start: int, items: Any, users: Any) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        log = [{"who": u, "what": i, "when": start + 60 * n, "buy": n % 2} for n, (u, i) in enumerate(events)]
        pq.write_table(pa.Table.from_pylist(log), folder / "log.parquet")
        rows = [{"what": key, "brand": brand, "tags": tags} for key, (brand, tags) in items.items()]
        pq.write_table(pa.Table.from_pylist(rows), folder / "items.parquet")
        rows = [{"who": key, "age": age, "club": club} for key, (age, club) in users.items()]
        pq.write_table(pa.Table.from_pylist(rows), folder / "users.parquet")
        return folder

    events = [(user, item) for item in ("keeps", "changes", "loses") for user in ("stays", "moves")] * 2
    quiet = [("stays", "keeps"), ("stays", "changes")]
    later = [(user, item) for item in ("waits", "keeps") for user in ("stays", "moves", "comes")]
    out = tmp_path / "out"
    first = write("day0", events, HOUR, first_items, first_users)
    options = ("--schema", tmp_path / "schema.toml", "--min-history", 0, "--split-time", HOUR + 360)
    assert run(first, "--out", out, *options) == 0
    # The user who moves is not in this day's log.
    for name, day, rows, items, users in (
        ("day1", 1, quiet, then_items, then_users),
        ("day2", 2, later, {"keeps": ("b1", ["t1"])}, {"stays": (1.0, "c1")}),
    ):
        source = write(name, rows, HOUR + day * DAY, items, users)
        assert run(source, "--extend", out, "--split-time", HOUR + (day + 1) * DAY) == 0
    keys = {space: keys_of(out, space) for space in ("item", "user", "brand", "tag", "club")}
    found = {
        keys["item"][row["item_id"]]: (keys["brand"].get(row["brand"]), [keys["tag"][tag] for tag in row["tags"]])
        for row in pq.read_table(out / "items").to_pylist()
        if row["item_id"]
    }
    assert found == {**first_items, **then_items}
    samples = {keys["user"][row["user_id"]]: row for row in rows_in(out, "train", "part=00002")}
    told = {user: (row["age"], keys["club"][row["club"]]) for user, row in samples.items()}
    assert told.pop("moves") == (pytest.approx(float("nan"), nan_ok=True), "c4")
    assert told == {"stays": (1.0, "c1"), "comes": (3.0, "c3")}


def test_histories_are_as_long_as_the_state(tmp_path: Path) -> None:
    out, log = first_day(tmp_path, "--max-history", 4)
    rows = day_of(1, range(4), 9)
    assert run(write_day(tmp_path / "day1", rows), "--extend", out) == 0
    check_part(out, "part=00001", sorted(log + rows, key=lambda row: row["when"]), HOUR + DAY, max_history=4)


def test_a_part_may_be_all_for_training(tmp_path: Path) -> None:
    out, _ = first_day(tmp_path)
    rows = day_of(1, range(4), 9)
    assert run(write_day(tmp_path / "day1", rows), "--extend", out, "--split-time", HOUR + 2 * DAY) == 0
    assert sum(row["num_candidates"] for row in rows_in(out, "train", "part=00001")) == len(rows)
    assert rows_in(out, "eval", "part=00001") == []


def test_keys_widen_without_losing_their_ids(tmp_path: Path) -> None:
    lines = ["who,what,when,buy", *(f"u{n % 3},{n},{HOUR + 60 * n},{n % 2}" for n in range(30))]
    options = ("--user-column", "who", "--item-column", "what", "--time-column", "when", "--action-columns", "buy")
    (tmp_path / "day0").mkdir()
    columns = {"who": [f"u{n % 3}" for n in range(30)], "what": list(range(30)), "buy": [n % 2 for n in range(30)]}
    pq.write_table(pa.table({**columns, "when": [HOUR + 60 * n for n in range(30)]}), tmp_path / "day0" / "log.parquet")
    out = tmp_path / "out"
    assert run(tmp_path / "day0", "--out", out, *options, "--split-time", HOUR + 1500) == 0
    assert keys_of(out, "item") == {n + 1: n for n in range(30)}
    write_lines(tmp_path / "day1" / "log.csv", [lines[0], *(f"u1,{key},{HOUR + DAY},1" for key in ("7", "red", "99"))])
    assert run(tmp_path / "day1", "--extend", out, "--split-time", HOUR + 2 * DAY) == 0
    assert keys_of(out, "item") == {**{n + 1: str(n) for n in range(30)}, 31: "99", 32: "red"}
    [row] = rows_in(out, "train", "part=00001")
    assert row["candidate_item_id"] == [8, 32, 31]


def test_rare_items_share_id_0_on_every_day(tmp_path: Path) -> None:
    def lines(day: int, items: str) -> list[str]:
        rows = [f"u{n % 2},{item},{HOUR + day * DAY + 60 * n},{n % 2}" for n, item in enumerate(items)]
        return ["who,what,when,buy", *rows]

    options = ("--user-column", "who", "--item-column", "what", "--time-column", "when", "--action-columns", "buy")
    write_lines(tmp_path / "day0" / "log.csv", lines(0, "zzabbaczzzzz"))
    out = tmp_path / "out"
    assert run(tmp_path / "day0", "--out", out, *options, "--min-count", 2, "--split-time", HOUR + 600) == 0
    assert keys_of(out, "item") == {1: "a", 2: "b", 3: "z"}
    write_lines(tmp_path / "day1" / "log.csv", lines(1, "acddbez"))
    assert run(tmp_path / "day1", "--extend", out, "--split-time", HOUR + 2 * DAY) == 0
    # The second c is the one of this day.
    assert keys_of(out, "item") == {1: "a", 2: "b", 3: "z", 4: "c", 5: "d"}
    rows = sorted(rows_in(out, "train", "part=00001"), key=lambda row: int(row["user_id"]))
    assert [row["candidate_item_id"] for row in rows] == [[1, 5, 2, 3], [4, 5, 0]]


@pytest.mark.parametrize("space", ["item", "tag"])
@pytest.mark.parametrize("key", [str, int])
def test_a_rare_key_has_an_id_from_the_delivery_on_by_which_it_has_come_often_enough(
    tmp_path: Path, space: str, key: type
) -> None:
    often, rare, once, seldom = map(key, (1, 2, 3, 4))
    found, out = [], tmp_path / "shop"
    text = 'user = "who"\nitem = "what"\ntime = "when"\nactions = ["buy"]\n[event]\ntags = ["tag"]\n'
    (tmp_path / "schema.toml").write_text(text + f"[spaces.{space}]\nmin_count = 3\n")
    for day in range(4):
        keys = [often, rare, often, *([once] if day == 0 else [seldom] * (day == 3)), often]
        rows = [
            {"who": 7, "what": item if space != "tag" else 5, "tags": [item], "when": HOUR + day * DAY + 9 * place}
            for place, item in enumerate(keys)
        ]
        source = write_day(tmp_path / f"day{day}", [{**row, "buy": place % 2} for place, row in enumerate(rows)])
        options = ("--split-time", rows[-1]["when"])
        new = ("--out", out, "--schema", tmp_path / "schema.toml")
        assert run(source, *(new if day == 0 else ("--extend", out)), *options) == 0
        found.append(keys_of(out, space))
    assert found == [{1: often}, {1: often}, {1: often, 2: rare}, {1: often, 2: rare}]


@pytest.mark.parametrize(
    ("rows", "classes"), [("", {1: "a", 2: "b"}), ("[spaces.mood]\nrows = 4", {1: "a", 2: "b", 3: "c"})]
)
def test_a_label_keeps_the_classes_that_there_are_rows_for(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, rows: str, classes: dict[int, str]
) -> None:
    text = 'user = "who"\nitem = "what"\ntime = "when"\nactions = ["buy"]\n[label]\nmood = "mood"\n'
    (tmp_path / "schema.toml").write_text(text + rows)
    out = tmp_path / "shop"
    for day, moods in enumerate(("abab", "cdab")):
        columns = {"who": [1] * 4, "what": [5, 6, 7, 8], "buy": [0, 1, 0, 1], "mood": list(moods)}
        times = [HOUR + day * DAY + 60 * place for place in range(4)]
        source = write_day(tmp_path / f"day{day}", pa.table({**columns, "when": times}).to_pylist())
        new = ("--out", out, "--schema", tmp_path / "schema.toml")
        assert run(source, *(("--extend", out) if day else new), "--split-time", times[-1]) == 0
    info = read_dataset_info(str(out))
    assert (keys_of(out, "mood"), info.spaces["mood"].rows) == (classes, 4 if rows else 3)
    labels = [x for split in ("train", "eval") for row in rows_in(out, split, "part=00001") for x in row["label_mood"]]
    ids = {key: number for number, key in classes.items()}
    assert sorted(labels) == sorted(ids.get(mood, 0) for mood in "cdab")
    [told] = [record.message for record in caplog.records if "class(es)" in record.message]
    assert told.startswith(f"{4 - len(classes)} new class(es) of mood, one is ")


def test_attributes_are_found_where_a_delivery_stores_keys_in_another_type(tmp_path: Path) -> None:
    (tmp_path / "schema.toml").write_text(ATTRIBUTES)
    out = tmp_path / "out"
    for day, kind in enumerate((int, str, int)):
        folder = tmp_path / f"day{day}"
        folder.mkdir()
        log = [
            {"who": kind(n % 3), "what": kind(n % 4), "when": HOUR + day * DAY + 60 * n, "buy": n % 2}
            for n in range(24)
        ]
        pq.write_table(pa.Table.from_pylist(log), folder / "log.parquet")
        # Each delivery describes another user and another item.
        user = [{"who": kind(day), "age": 10.0 + day, "club": kind(7)}]
        pq.write_table(pa.Table.from_pylist(user), folder / "users.parquet")
        item = [{"what": kind(day), "brand": kind(day), "tags": [kind(9)]}]
        pq.write_table(pa.Table.from_pylist(item), folder / "items.parquet")
        options = ("--extend", out) if day else ("--out", out, "--schema", tmp_path / "schema.toml")
        assert run(folder, *options) == 0
    keys = {space: keys_of(out, space) for space in ("user", "item", "brand", "tag", "club")}
    rows = pq.read_table(out / "items").to_pylist()
    found = {
        keys["item"][row["item_id"]]: (keys["brand"].get(row["brand"]), row["tags"]) for row in rows if row["tags"]
    }
    assert found == {str(day): (str(day), [1]) for day in range(3)}
    told = {keys["user"][row["user_id"]]: (row["age"], row["club"]) for row in rows_in(out, "train", "part=00002")}
    assert told == {str(day): (10.0 + day, 1) for day in range(3)}


@pytest.mark.parametrize("drop", [True, False])
def test_what_two_deliveries_both_hold_counts_once_where_asked(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, drop: bool
) -> None:
    """A delivery that begins with the moment at which the last one ended, both included."""
    out, rows = first_day(tmp_path)
    rows.sort(key=lambda row: row["when"])
    newest = rows[-1]
    other = newest | {"what": "i7" if newest["what"] != "i7" else "i6"}  # another event of the same moment
    later = [newest | {"when": newest["when"] + 100 * n, "buy": 1} for n in (1, 2)]
    source = write_day(tmp_path / "day1", [newest, other, *later], {"i0": "b0"})
    options = ["--drop-duplicates"] * drop
    assert run(source, "--extend", out, "--split-time", newest["when"] + DAY, *options) == 0
    assert "1 row(s) are equal to one with which the parts before ended" in caplog.text
    told = read_dataset_info(str(out)).details["deliveries"]["part=00001"]["duplicates"]
    assert told == {"rows": 1, "dropped": drop}
    items = keys_of(out, "item")
    ours = [row["what"] for row in rows if row["who"] == newest["who"]]
    [sample] = rows_in(out, "train", "part=00001")
    history = [items[item] for item in sample["history_item_id"]]
    assert history == [*ours, *[newest["what"]] * (not drop), other["what"]]
    assert sample["candidate_user_seen"] == [len(history), len(history) + 1]
