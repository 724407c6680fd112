"""Every publisher's format against a plain reading of its rows: order, strictness and labels of each sample."""

import json
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines.prepare.publishers.kuairand import ACTIONS as KUAIRAND_ACTIONS
from pipelines.prepare.publishers.kuairand import CONTEXT
from tests.pipelines.prepare.test_prepare import VIDEO_COLUMNS, prepare, read_back, rows_of, write_lines

START = 1_600_000_000


@dataclass(frozen=True)
class Row:
    """An event as the log has it."""

    user: int
    item: int
    time: int
    grade: int
    """From 1 to 5, written in the format's own words."""


Write = Callable[[Path, list[Row]], Sequence[str]]


def made_up(seed: int) -> list[Row]:
    """Baskets: several events a second, each user and item in no order, users mixed as time goes."""
    generator = np.random.default_rng(seed)
    rows = []
    for user in range(1, 41):
        times = np.cumsum(generator.integers(0, 3, generator.integers(3, 40)) * 3600)
        items = generator.choice(np.arange(1, 400), len(times), replace=False)
        rows += [
            Row(user, int(item), START + 40 * user + int(time), int(generator.integers(1, 6)))
            for item, time in zip(items, times, strict=True)
        ]
    order = generator.permutation(len(rows))
    return [rows[place] for place in order]


def event_log_csv(folder: Path, rows: list[Row]) -> Sequence[str]:
    """Two files, of which the first by name has the first rows."""
    for name, part in (("a", rows[: len(rows) // 2]), ("b", rows[len(rows) // 2 :])):
        lines = ["who,what,when,grade", *(f"u{r.user},i{r.item},{r.time},{r.grade}" for r in part)]
        write_lines(folder / f"{name}.csv", lines)
    return (*LOG_COLUMNS, "--time-unit", "s")


def event_log_parquet(folder: Path, rows: list[Row]) -> Sequence[str]:
    """Two files with small row groups; times exact to a microsecond, which the order within a second keeps."""
    folder.mkdir()
    for name, part in (("a", rows[: len(rows) // 2]), ("b", rows[len(rows) // 2 :])):
        columns = {
            "who": [f"u{r.user}" for r in part],
            "what": [f"i{r.item}" for r in part],
            "when": [r.time * 1_000_000 for r in part],
            "grade": [str(r.grade) for r in part],
        }
        pq.write_table(pa.table(columns), folder / f"{name}.parquet", row_group_size=50)
    return (*LOG_COLUMNS, "--time-unit", "us")


LOG_COLUMNS = ("--user-column", "who", "--item-column", "what", "--time-column", "when")
LOG_COLUMNS += ("--action-columns", "grade", "--action-values", "1,2,3,4,5")


def movielens_1m(folder: Path, rows: list[Row]) -> Sequence[str]:
    write_lines(folder / "ratings.dat", [f"{r.user}::{r.item}::{r.grade}::{r.time}" for r in rows])
    write_lines(folder / "users.dat", [f"{user}::F::25::1::12345" for user in {r.user for r in rows}])
    return ()


def movielens_25m(folder: Path, rows: list[Row]) -> Sequence[str]:
    lines = [f"{r.user},{r.item},{r.grade}.0,{r.time}" for r in rows]
    write_lines(folder / "ratings.csv", ["userId,movieId,rating,timestamp", *lines])
    return ()


def amazon(edition: int) -> Write:
    def write(folder: Path, rows: list[Row]) -> Sequence[str]:
        lines = {
            2014: [f"u{r.user},{r.item:010d},{r.grade}.0,{r.time}" for r in rows],
            2018: [f"{r.item:010d},u{r.user},{r.grade}.0,{r.time}" for r in rows],
            2023: ["user_id,parent_asin,rating,timestamp"]
            + [f"u{r.user},{r.item:010d},{r.grade}.0,{r.time}000" for r in rows],
        }
        write_lines(folder / "Books.csv", lines[edition])
        return ()

    return write


def yambda(folder: Path, rows: list[Row]) -> Sequence[str]:
    kinds = ["listen", "like", "dislike", "unlike", "undislike"]
    folder.mkdir()
    columns = {
        "uid": [r.user for r in rows],
        "timestamp": [r.time for r in rows],
        "item_id": [r.item for r in rows],
        "is_organic": [0 for _ in rows],
        "played_ratio_pct": [10.0 for _ in rows],
        "event_type": [kinds[r.grade - 1] for r in rows],
    }
    pq.write_table(pa.table(columns), folder / "multi_event.parquet", row_group_size=50)
    return ()


def kuairand(folder: Path, rows: list[Row]) -> Sequence[str]:
    names = ["user_id", "video_id", "time_ms", "play_time_ms", *KUAIRAND_ACTIONS]
    lines = [
        ",".join(map(str, (r.user, r.item, r.time * 1000, 5, *(int(bit == r.grade) for bit in range(8))))) for r in rows
    ]
    write_lines(folder / "log_standard_4_22_to_5_08_pure.csv", [",".join(names), *lines])
    users = [f"{user}{',x' * len(CONTEXT)}" for user in sorted({r.user for r in rows})]
    videos = [f"{item},1,NORMAL,Web,9000.0,5,9.0,7" for item in sorted({r.item for r in rows})]
    write_lines(folder / "video_features_basic_pure.csv", [VIDEO_COLUMNS, *videos])
    write_lines(folder / "user_features_pure.csv", [",".join(["user_id", *CONTEXT]), *users])
    return ()


RATED = (0, 1, 3, 7, 15)
FORMATS: dict[str, tuple[str, Write, Sequence[int]]] = {
    "event_log csv": ("event_log", event_log_csv, (1, 2, 4, 8, 16)),
    "event_log parquet": ("event_log", event_log_parquet, (1, 2, 4, 8, 16)),
    "movielens 1m": ("movielens", movielens_1m, RATED),
    "yambda": ("yambda", yambda, (1, 4, 8, 16, 32)),
    "kuairand": ("kuairand", kuairand, (2, 4, 8, 16, 32)),
    "movielens 25m": ("movielens", movielens_25m, RATED),
    **{f"amazon{year}": (f"amazon{year}", amazon(year), RATED) for year in (2014, 2018, 2023)},
}
"""Name: the data set's format, its writer, and the mask of each grade."""
WITHOUT_ORDER = ("movielens 25m", "amazon2014", "amazon2018", "amazon2023")
"""Formats whose files are sorted by item: the order of equal times says nothing."""


def events_of(out: Path, row: dict[str, Any], part: str) -> list[tuple[int, int, int]]:
    """(item, time, action mask) of a sample's events, items by the publisher's number."""
    if (out / "item_ids.parquet").exists():
        table = pq.read_table(out / "item_ids.parquet").to_pylist()
        keys = {each["item_id"]: int(str(each["item_key"]).lstrip("i")) for each in table}
    else:
        keys = {item: item for item in row[f"{part}_item_id"]}
    columns = (row[f"{part}_{name}"] for name in ("item_id", "timestamp", "action"))
    return [(keys[item], time, action) for item, time, action in zip(*columns, strict=True)]


def user_of(out: Path) -> Callable[[int], int]:
    if not (out / "user_ids.parquet").exists():
        return lambda user: user
    table = pq.read_table(out / "user_ids.parquet").to_pylist()
    keys = {each["user_id"]: int(str(each["user_key"]).lstrip("u")) for each in table}
    return keys.__getitem__


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("options", [("--samples-per-user", "0", "--candidates", "3"), ("--no-eval-groups",)])
def test_samples_are_what_the_log_says(tmp_path: Path, name: str, options: Sequence[str]) -> None:
    dataset, write, masks = FORMATS[name]
    rows = made_up(len(name))
    assert prepare(dataset, tmp_path / "in", tmp_path / "out", *write(tmp_path / "in", rows), *options) == 0
    truth = defaultdict(list)
    for row in sorted(rows, key=lambda r: r.time):
        truth[row.user].append((row.item, row.time, masks[row.grade - 1]))
    split_time = json.loads((tmp_path / "out" / "dataset.json").read_text())["split_time"]
    user, seen = user_of(tmp_path / "out"), set()
    for split in ("train", "eval"):
        for row in rows_of(tmp_path / "out", split):
            events = truth[user(row["user_id"])]
            history, candidates = (events_of(tmp_path / "out", row, part) for part in ("history", "candidate"))
            first, last = candidates[0][1], candidates[-1][1]
            assert history
            assert all(time < first for _, time, _ in history)
            assert all((time >= split_time) == (split == "eval") for _, time, _ in candidates)
            expected = [event for event in events if event[1] < first], [e for e in events if first <= e[1] <= last]
            if name in WITHOUT_ORDER:
                assert [time for _, time, _ in history] == [time for _, time, _ in expected[0]]
                assert (sorted(history), sorted(candidates)) == (sorted(expected[0]), sorted(expected[1]))
            else:
                assert (history, candidates) == expected
            found = {(row["user_id"], item) for item, _, _ in candidates}
            assert not found & seen
            seen |= found
    assert read_back(tmp_path / "out") == sum(len(rows_of(tmp_path / "out", split)) for split in ("train", "eval"))
    if "0" in options:
        # All but what no history precedes, and what exceeds 100 candidates.
        first_times = {user: min(time for _, time, _ in events) for user, events in truth.items()}
        assert len(seen) == sum(row.time > first_times[row.user] for row in rows)


@pytest.mark.parametrize("name", WITHOUT_ORDER)
def test_equal_times_without_an_order_are_in_one_that_says_nothing(tmp_path: Path, name: str) -> None:
    dataset, write, _ = FORMATS[name]
    rows = made_up(7)
    by_item = sorted(rows, key=lambda r: (r.user, r.item))
    orders = []
    for number, version in enumerate((rows, by_item, by_item[::-1])):
        source, out = tmp_path / f"in{number}", tmp_path / f"out{number}"
        assert prepare(dataset, source, out, *write(source, version), "--leave-last", "1", "--candidates", "1") == 0
        orders.append([events_of(out, row, "history") for row in rows_of(out, "eval")])
    assert orders[0] == orders[1] == orders[2]
    pairs = [
        (a[0] < b[0], a[2] <= b[2])
        for events in orders[0]
        for _, group in groupby(events, key=lambda event: event[1])
        for a, b in pairwise(group)
    ]
    rising_items, rising_actions = np.mean(pairs, axis=0)
    assert 0.35 < rising_items < 0.65
    # Equal grades count as rising: 0.6 where nothing decides, 1 where the grade does.
    assert rising_actions < 0.75


@pytest.mark.parametrize("files", [("a.csv", "b.csv"), ("b.csv", "a.csv")])
def test_files_of_a_log_are_taken_by_name_not_as_they_were_written(tmp_path: Path, files: tuple[str, str]) -> None:
    halves = {"a.csv": range(0, 10), "b.csv": range(10, 20)}
    for name in files:
        lines = [f"1,{item},{10**9 + item // 5},1" for item in halves[name]]
        write_lines(tmp_path / "in" / name, ["u,i,t,like", *lines])
    options = ["--user-column", "u", "--item-column", "i", "--time-column", "t", "--action-columns", "like"]
    assert prepare("event_log", tmp_path / "in", tmp_path / "out", *options, "--split-time", str(10**9 + 3)) == 0
    [row] = rows_of(tmp_path / "out", "eval")
    assert [item for item, _, _ in events_of(tmp_path / "out", row, "history")] == list(range(15))


def test_a_request_stays_in_one_sample(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    lines, requests = [], {}
    for user in range(20):
        for request in range(8):
            for shown in range(int(generator.integers(1, 6))):
                item = len(lines)
                name = "" if request == 3 else f"r{request}"
                requests[item] = (user, name or item)
                lines.append(f"{user},{item},{START + 100_000 * request + 7 * shown + user},{item % 2},{name}")
    write_lines(
        tmp_path / "in" / "log.csv", ["u,i,t,like,request", *(lines[i] for i in generator.permutation(len(lines)))]
    )
    options = ["--user-column", "u", "--item-column", "i", "--time-column", "t", "--action-columns", "like"]
    options += ["--samples-per-user", "0", "--candidates", "2", "--request-column", "request"]
    assert prepare("event_log", tmp_path / "in", tmp_path / "out", *options) == 0
    places = defaultdict(set)
    rows = [row for split in ("train", "eval") for row in rows_of(tmp_path / "out", split)]
    for number, row in enumerate(rows):
        shown = [requests[item] for item, _, _ in events_of(tmp_path / "out", row, "candidate")]
        past = {requests[item] for item, _, _ in events_of(tmp_path / "out", row, "history")}
        assert not past & set(shown)
        for each in shown:
            places[each].add(number)
    assert all(len(numbers) == 1 for numbers in places.values())
    # Without a request, equal times alone keep events together.
    assert max(len(row["candidate_item_id"]) for row in rows) > 2
    unknown = [
        sum(not isinstance(requests[e[0]][1], str) for e in events_of(tmp_path / "out", row, "candidate"))
        for row in rows
    ]
    assert 0 < max(unknown) <= 2


@pytest.mark.parametrize("name", ["event_log csv", "kuairand", "amazon2018"])
def test_rare_and_new_items_share_the_id_that_is_trained_for_them(tmp_path: Path, name: str) -> None:
    dataset, write, _ = FORMATS[name]
    # A few items come in nearly every basket, the others once or twice in all.
    rows = [replace(row, item=row.item if row.item % 5 else row.item % 7 + 1) for row in made_up(11)]
    options = ("--min-count", "3", "--samples-per-user", "0")
    assert prepare(dataset, tmp_path / "in", tmp_path / "out", *write(tmp_path / "in", rows), *options) == 0
    info = json.loads((tmp_path / "out" / "dataset.json").read_text())
    count = Counter(row.item for row in rows if row.time < info["split_time"])
    kept = {item for item, number in count.items() if number >= 3}
    table = pq.read_table(tmp_path / "out" / "item_ids.parquet").to_pylist()
    assert {int(str(row["item_key"]).lstrip("i")) for row in table} == kept
    assert sorted(row["item_id"] for row in table) == list(range(1, len(kept) + 1))
    assert info["spaces"]["item"]["rows"] == len(kept) + 1
    keys = {row["item_id"]: int(str(row["item_key"]).lstrip("i")) for row in table} | {0: None}
    truth = {(row.user, row.time): set() for row in rows}
    for row in rows:
        truth[row.user, row.time].add(row.item if row.item in kept else None)
    user, unknown = user_of(tmp_path / "out"), 0
    for row in rows_of(tmp_path / "out", "train") + rows_of(tmp_path / "out", "eval"):
        for item, time in zip(row["candidate_item_id"], row["candidate_timestamp"], strict=True):
            assert keys[item] in truth[user(row["user_id"]), time]
            unknown += item == 0
    assert unknown > 100
    assert any(0 in row["candidate_item_id"] for row in rows_of(tmp_path / "out", "train"))


def quicksort(values: list[int]) -> list[int]:
    """The places of `values` after NumPy's quicksort of integers of 2024, by its published source."""
    places, stack, low, high = list(range(len(values))), [], 0, len(values) - 1

    def order(a: int, b: int) -> None:
        if values[places[b]] < values[places[a]]:
            places[a], places[b] = places[b], places[a]

    while True:
        while high - low > 15:
            middle = low + (high - low) // 2
            order(low, middle), order(middle, high), order(low, middle)
            pivot, i, j = values[places[middle]], low, high - 1
            places[middle], places[j] = places[j], places[middle]
            while True:
                i += 1
                while values[places[i]] < pivot:
                    i += 1
                j -= 1
                while pivot < values[places[j]]:
                    j -= 1
                if i >= j:
                    break
                places[i], places[j] = places[j], places[i]
            places[i], places[high - 1] = places[high - 1], places[i]
            if i - low < high - i:
                stack.append((i + 1, high))
                high = i - 1
            else:
                stack.append((low, i - 1))
                low = i + 1
        for end in range(low + 1, high + 1):
            place = places[end]
            while end > low and values[place] < values[places[end - 1]]:
                places[end] = places[end - 1]
                end -= 1
            places[end] = place
        if not stack:
            return places
        low, high = stack.pop()


@pytest.mark.parametrize("name", ["movielens 1m", "movielens 25m"])
def test_published_order_is_that_of_an_unstable_sort_of_the_whole_file(tmp_path: Path, name: str) -> None:
    dataset, write, _ = FORMATS[name]
    rows = sorted(made_up(3), key=lambda r: r.user)
    options = ("--ties", "gr", "--leave-last", "1", "--candidates", "1")
    assert prepare(dataset, tmp_path / "in", tmp_path / "out", *write(tmp_path / "in", rows), *options) == 0
    truth = defaultdict(list)
    for place in quicksort([row.time for row in rows]):
        truth[rows[place].user].append(rows[place].item)
    user = user_of(tmp_path / "out")
    found = {
        user(row["user_id"]): [
            e[0] for part in ("history", "candidate") for e in events_of(tmp_path / "out", row, part)
        ]
        for row in rows_of(tmp_path / "out", "eval")
    }
    assert found == truth
    stable = defaultdict(list)
    for row in sorted(rows, key=lambda r: r.time):
        stable[row.user].append(row.item)
    assert found != stable
