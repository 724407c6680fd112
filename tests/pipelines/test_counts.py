"""Counts of what the log knew before a candidate, against a plain count over the raw rows."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipelines.counts import Counts, counts_as_dict, counts_of
from pipelines.features import parse_dataset_info
from pipelines.prepare.__main__ import main
from pipelines.selection import select
from tests.pipelines.prepare.test_prepare import prepare, rows_of, write_lines

START = 1_600_000_000
ACTIONS = ("click", "buy")
GROUPS = ("item", "user", "user_item")


def write_log(folder: Path, seed: int) -> list[dict[str, int]]:
    """Few users and items, many equal times, requests that last several seconds and some events of none."""
    generator = np.random.default_rng(seed)
    names = {"user": 6, "item": 9, "at": 400, "request": 120, "click": 2, "buy": 2}
    rows = [{name: int(generator.integers(size)) for name, size in names.items()} for _ in range(600)]
    lines = [",".join(names)]
    for row in rows:
        # A request is its user's and lasts a few seconds.
        in_request = row["request"] < 60
        row["at"] = START + (row["request"] * 4000 + int(generator.integers(4)) if in_request else row["at"] * 1000)
        row["request"] = row["request"] if in_request else -1
        values = {**row, "request": row["request"] if row["request"] >= 0 else ""}
        lines.append(",".join(str(values[name]) for name in names))
    write_lines(folder / "log.csv", lines)
    return rows


def prepared(tmp_path: Path, *options: str) -> tuple[Path, list[dict[str, int]]]:
    rows = write_log(tmp_path / "log", seed=3)
    columns = ("--user-column", "user", "--item-column", "item", "--time-column", "at", "--action-columns", "click,buy")
    out = tmp_path / "out"
    assert not prepare("event_log", tmp_path / "log", out, *columns, "--samples-per-user", "0", *options)
    return out, rows


def known_before(row: dict[str, int], rows: list[dict[str, int]]) -> int:
    together = [x["at"] for x in rows if x["user"] == row["user"] and x["request"] == row["request"]]
    return min(together) if row["request"] >= 0 else row["at"]


def expected(row: dict[str, int], rows: list[dict[str, int]], before: int) -> dict[str, int]:
    result = {}
    for group, same in zip(GROUPS, (("item",), ("user",), ("user", "item")), strict=True):
        earlier = [x for x in rows if x["at"] < before and all(x[name] == row[name] for name in same)]
        result[f"{group}_seen"] = len(earlier)
        result |= {f"{group}_taken_{bit}": sum(x[name] for x in earlier) for bit, name in enumerate(ACTIONS)}
    return result


@pytest.mark.parametrize("options", [(), ("--request-column", "request"), ("--no-eval-groups",)], ids=str)
def test_counts_hold_what_the_log_knew_strictly_before_the_candidate(tmp_path: Path, options: tuple[str, ...]) -> None:
    out, rows = prepared(tmp_path, *options)
    info = json.loads((out / "dataset.json").read_text())
    places: dict[tuple[int, ...], list[dict[str, int]]] = {}
    for row in rows:
        places.setdefault((row["user"], row["item"], row["at"]), []).append(row)
    samples = {split: rows_of(out, split) for split in ("train", "eval")}
    # Users and items are numbered in the order of their keys, and every one of them is a candidate somewhere.
    users = np.unique([sample["user_id"] for each in samples.values() for sample in each])
    items = np.unique([item for each in samples.values() for sample in each for item in sample["candidate_item_id"]])
    checked = 0
    for split, of_split in samples.items():
        for sample in of_split:
            for place, at in enumerate(sample["candidate_timestamp"]):
                found = {name: sample[f"candidate_{name}"][place] for name in info["candidate"] if name != "item_id"}
                item = np.searchsorted(items, sample["candidate_item_id"][place])
                key = (int(np.searchsorted(users, sample["user_id"])), int(item), at)
                allowed = []
                for row in places[key]:
                    before = known_before(row, rows) if "--request-column" in options else at
                    if split == "eval" and "--no-eval-groups" in options:
                        before = info["split_time"]
                    allowed.append(expected(row, rows, before))
                assert found in allowed
                checked += 1
    assert checked > 300


def test_a_log_is_described_with_its_counts(tmp_path: Path) -> None:
    out, _ = prepared(tmp_path)
    info = parse_dataset_info(json.loads((out / "dataset.json").read_text()), "log")
    assert [each.group for each in counts_of(info)] == list(GROUPS)
    assert counts_of(info)[0] == Counts(group="item", seen="item_seen", taken=("item_taken_0", "item_taken_1"))


OF_COLUMNS = {
    "item": ("item",),
    "user": ("user",),
    "user_item": ("user", "item"),
    "surface": ("surface",),
    "user_surface": ("user", "surface"),
    "item_brand": ("brand",),
    "user_item_brand": ("user", "brand"),
}
"""Groups of a log with one column of ids a candidate and one an item, and what their events have in common."""
SCHEMA = """
user = "user"
item = "item"
time = "at"
actions = ["click", "buy"]
[event]
surface = { of = "surface", request = true }
query = { of = ["word"], separator = " ", request = true }
[items]
files = "items/*.csv"
columns = { brand = "brand" }
"""


def write_columns(tmp_path: Path, seed: int) -> list[dict[str, Any]]:
    """Two deliveries in order of time, under `one` and `two`; item 4 has no brand.  Returns their rows."""
    generator = np.random.default_rng(seed)
    names = {"user": 6, "item": 5, "surface": 3, "click": 2, "buy": 2}
    rows: list[dict[str, Any]] = []
    for at in np.sort(generator.integers(150, size=300)):
        row = {name: int(generator.integers(size)) for name, size in names.items()} | {"at": START + int(at) * 1000}
        rows.append(row | {"brand": 1 + row["item"] % 2 if row["item"] < 4 else 0})
    head = "user,item,at,surface,query,click,buy"
    for folder, part in (("one", rows[:200]), ("two", [row for row in rows[200:] if row["at"] > rows[199]["at"]])):
        values = (f"{x['user']},{x['item']},{x['at']},s{x['surface']},a b,{x['click']},{x['buy']}" for x in part)
        write_lines(tmp_path / folder / "log.csv", [head, *values])
    (tmp_path / "one" / "items").mkdir()
    write_lines(tmp_path / "one" / "items" / "brands.csv", ["item,brand", "0,x", "1,y", "2,x", "3,y", "4,"])
    (tmp_path / "schema.toml").write_text(SCHEMA)
    return [*rows[:200], *(row for row in rows[200:] if row["at"] > rows[199]["at"])]


def counted_of(row: dict[str, Any], rows: list[dict[str, Any]]) -> dict[str, int]:
    found = {}
    for group, same in OF_COLUMNS.items():
        earlier = [x for x in rows if x["at"] < row["at"] and all(x[name] == row[name] for name in same)]
        found |= {f"{group}_seen": len(earlier)}
        found |= {f"{group}_taken_{bit}": sum(x[name] for x in earlier) for bit, name in enumerate(ACTIONS)}
    return found


def test_values_of_columns_are_counted_by_themselves_and_with_the_user_over_all_deliveries(tmp_path: Path) -> None:
    rows, out = write_columns(tmp_path, seed=5), tmp_path / "out"
    schema = ("--schema", str(tmp_path / "schema.toml"))
    every = ("--min-history", "0", "--count-columns", "item.brand, surface")
    assert not prepare("event_log", tmp_path / "one", out, *schema, *every)
    assert not prepare_next(tmp_path / "two", out)
    info = parse_dataset_info(json.loads((out / "dataset.json").read_text()), "log")
    assert {each.group for each in counts_of(info)} == set(OF_COLUMNS)
    names = [name for each in counts_of(info) for name in each.columns]
    found = {}
    for folder in ("train", "eval", "train/part=00001", "eval/part=00001"):
        for sample in rows_of(out, folder):
            for place, at in enumerate(sample["candidate_timestamp"]):
                key = [sample["user_id"], *(sample[f"candidate_{name}"][place] for name in ("item_id", "surface"))]
                values = {name: sample[f"candidate_{name}"][place] for name in names}
                found.setdefault((*key, at), []).append(values)
    # Ids are numbered from 1 in the order of keys; equal rows have equal counts.
    expected: dict[tuple[int, ...], list[dict[str, int]]] = {}
    for row in rows:
        key = (row["user"] + 1, row["item"] + 1, row["surface"] + 1, row["at"])
        expected.setdefault(key, []).append(counted_of(row, rows))
    assert found == expected


def prepare_next(source: Path, out: Path) -> int:
    return main(["event_log", "--source", str(source), "--extend", str(out), "--memory-gib", "1"])


def test_columns_that_are_counted_can_be_chosen(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_columns(tmp_path, seed=5)
    schema = ("--schema", str(tmp_path / "schema.toml"))
    of_users = [group for group in OF_COLUMNS if group not in ("surface", "item_brand")]
    choices = {
        (): of_users,
        ("--no-count-user-columns",): GROUPS,
        ("--count-columns", "item.brand"): (*of_users, "item_brand"),
    }
    for chosen, groups in choices.items():
        out = tmp_path / f"out-{len(''.join(chosen))}"
        assert not prepare("event_log", tmp_path / "one", out, *schema, *chosen)
        assert set(json.loads((out / "dataset.json").read_text())["counts"]) == set(groups)
    assert prepare("event_log", tmp_path / "one", tmp_path / "odd", *schema, "--count-columns", "query") == 1
    assert "'query', which is no column of one id; there are: surface, item.brand" in capsys.readouterr().err
    # Names that the tables of the preparation have, too.
    of_items = ("time", "candidate", "known", "moment", "key")
    columns = ", ".join(f"{name} = {{ of = 'brand', column = 'brand' }}" for name in of_items)
    named = SCHEMA.replace('{ brand = "brand" }', f"{{ {columns} }}")
    (tmp_path / "schema.toml").write_text(named)
    asked = ("--count-columns", ",".join(f"item.{name}" for name in of_items))
    assert named != SCHEMA
    assert not prepare("event_log", tmp_path / "one", tmp_path / "alike", *schema, *asked)
    (tmp_path / "schema.toml").write_text(SCHEMA.replace("surface = { of", "item_brand = { column = 'surface', of"))
    assert prepare("event_log", tmp_path / "one", tmp_path / "odd", *schema) == 1
    assert "would be called user_item_brand, as something else is: rename the column" in capsys.readouterr().err


@pytest.mark.parametrize("options", [("--no-counts",), ("--leave-last", "1")], ids=str)
def test_counts_are_left_out_where_they_are_not_wanted_or_no_ranker_reads(
    tmp_path: Path, options: tuple[str, ...]
) -> None:
    out, _ = prepared(tmp_path, *options)
    assert set(json.loads((out / "dataset.json").read_text())["candidate"]) == {"item_id"}


def described(counts: Any) -> dict[str, Any]:
    columns = {"item_id": "item", "shown": "number", "clicked": "number"}
    return {
        "format_version": 2,
        "name": "shop",
        "spaces": {"item": {"rows": 5}},
        "event": {"item_id": "item"},
        "candidate": columns,
        "actions": ["click"],
        "splits": {},
        "source": "",
        "licence": "",
        "counts": counts,
    }


def test_counts_of_others_are_read_back_as_they_are_written() -> None:
    counts = (Counts(group="brand", seen="shown", taken=("clicked",)),)
    assert counts_of(parse_dataset_info(described(counts_as_dict(counts)), "shop")) == counts


@pytest.mark.parametrize(
    ("counts", "message"),
    [
        ([], "must be an object of groups"),
        ({"item": {"seen": "shown"}}, "must give 'seen' and the list 'taken'"),
        ({"item": {"seen": "shown", "taken": []}}, "one column for each of the 1 actions, got 0"),
        ({"item": {"seen": "shown", "taken": ["bought"]}}, "'bought', which is no column of numbers of candidates"),
    ],
)
def test_counts_that_contradict_the_columns_are_refused(counts: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        counts_of(parse_dataset_info(described(counts), "shop"))


def test_columns_of_counts_are_read_with_their_group_or_not_at_all() -> None:
    counts = counts_as_dict([Counts(group="brand", seen="shown", taken=("clicked",))])
    info = parse_dataset_info(described(counts), "shop")
    for chosen in (None, ("brand",)):
        selection = select(info, counts=chosen)
        assert [feature.name for feature in selection.features] == ["item_id", "shown", "clicked"]
        assert [each.group for each in selection.counts] == ["brand"]
        # By themselves they enter no token.
        assert not selection.of("candidate")
    assert [feature.name for feature in select(info, counts=()).features] == ["item_id"]
    with pytest.raises(ValueError, match="names 'user', but the groups that shop counts are: brand"):
        select(info, counts=("user",))
    with pytest.raises(ValueError, match="names 'shown', which is none of the candidate columns"):
        select(info, candidate=("item_id", "shown"), counts=())
