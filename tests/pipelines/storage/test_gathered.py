"""Data sets that store the log once: histories, windows and crosses against plain Python; errors in one line."""

import json
import pickle
import random
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines.config import DataConfig
from pipelines.features import DatasetInfo
from pipelines.prepare.__main__ import main
from pipelines.reading.loader import build_loader, dataset_info, open_source
from pipelines.selection import select
from pipelines.storage.source import Source

DAY = 86_400
KINDS = ("listen", "like", "dislike", "unlike", "undislike")
POOLS = {"listen_plus": 0, "like": 1, "skip": 2}
MAX_HISTORY, MIN_HISTORY = 12, 3
Event = dict[str, Any]


def made_up_events(users: int = 9, days: int = 7) -> list[Event]:
    """Listenings and what else there is, in steps of 5 s, several in one second, users of very different activity."""
    draw = random.Random(0)
    events: list[Event] = []
    for user in range(users):
        for _ in range(3 + 30 * user):
            kind = draw.choices(KINDS, (20, 4, 1, 1, 1))[0]
            played = draw.choice([0.0, 49.9, 50.0, 100.0, 340.0, None]) if kind == "listen" else None
            events.append(
                {
                    "uid": 10 * user,
                    # Every third event is of a second that others share.
                    "timestamp": draw.randrange(days * DAY // 5) // draw.choice((1, 1, 700)) * 5,
                    "item_id": draw.randrange(1, 40),
                    "is_organic": draw.randrange(2),
                    "played_ratio_pct": played,
                    "track_length_seconds": 100,
                    "event_type": kind,
                }
            )
    # Ten minutes more than whole days: no window of their own.
    events.append({**events[-1], "uid": 80, "timestamp": days * DAY + 600, "event_type": "listen"})
    # The end of the log, from which the benchmark's split is counted.
    events.append({**events[-1], "uid": 10, "timestamp": (days + 2) * DAY})
    draw.shuffle(events)
    return events


def write_yambda(root: Path, events: Sequence[Event], *, single_files: bool = False) -> Path:
    """The publisher's files; returns the folder of one size."""
    size = root / "flat" / "50m"
    size.mkdir(parents=True)
    if single_files:
        for kind in KINDS:
            names = ["uid", "timestamp", "item_id", "is_organic"]
            names += ["played_ratio_pct", "track_length_seconds"] * (kind == "listen")
            rows = [{name: event[name] for name in names} for event in events if event["event_type"] == kind]
            pq.write_table(pa.Table.from_pylist(rows), size / f"{kind}s.parquet")
    else:
        pq.write_table(pa.Table.from_pylist(list(events)), size / "multi_event.parquet", row_group_size=97)
    # Items 1 to 4 are of no artist that is known; an artist's albums are two, and 7 has a second artist.
    artists = [{"artist_id": 100 + item % 6, "item_id": item} for item in range(5, 50)]
    artists.append({"artist_id": 999, "item_id": 7})
    albums = [{"album_id": 1000 + item % 12, "item_id": item} for item in range(5, 50)]
    pq.write_table(pa.Table.from_pylist(artists), root / "artist_item_mapping.parquet")
    pq.write_table(pa.Table.from_pylist(albums), root / "album_item_mapping.parquet")
    return size


def prepare(source: Path, out: Path, *options: str) -> int:
    return main(["yambda", "--source", str(source), "--out", str(out), "--histories", "gathered", *options])


def sizes() -> tuple[str, ...]:
    return ("--max-history", str(MAX_HISTORY), "--min-history", str(MIN_HISTORY))


def pool(event: Event) -> str | None:
    if event["event_type"] == "listen":
        return "listen_plus" if (event["played_ratio_pct"] or 0.0) >= 50 else "skip"
    return "like" if event["event_type"] == "like" else None


def expected(events: Sequence[Event]) -> dict[int, list[tuple[int, int, bool, tuple[tuple[int, int], ...]]]]:
    """By window: (user, item, listened to its half, its history's times and items) of each sample, in order of users.

    Within a second a user's events have no order here, so their items are sorted.
    """
    end = max(event["timestamp"] for event in events) - DAY - 1800
    samples = []
    for uid in sorted({event["uid"] for event in events}):
        mine = sorted((e for e in events if e["uid"] == uid and e["timestamp"] < end), key=lambda e: e["timestamp"])
        for event in mine:
            before = [each for each in mine if each["timestamp"] < event["timestamp"]]
            if event["event_type"] != "listen" or len(before) < MIN_HISTORY:
                continue
            kept = [each for name in POOLS for each in [e for e in before if pool(e) == name][-MAX_HISTORY // 3 :]]
            history = tuple(sorted((each["timestamp"], each["item_id"]) for each in kept))
            samples.append((event["timestamp"], (uid, event["item_id"], pool(event) == "listen_plus", history)))
    start = min(time for time, _ in samples)
    whole, rest = divmod(max(time for time, _ in samples) - start, DAY)
    last = whole if rest > DAY // 10 else whole - 1
    windows: dict[int, list[Any]] = {}
    for time, sample in samples:
        windows.setdefault(min((time - start) // DAY, last), []).append(sample)
    assert 0 < rest < DAY // 10, "the log ends with a rest"
    return windows


def found(source: Source, info: DatasetInfo, folder: Path) -> list[Any]:
    """The same of what a source reads, in the publisher's ids."""
    users, items = (
        dict(zip(table[f"{name}_id"].to_pylist(), table[f"{name}_key"].to_pylist(), strict=True))
        for name, table in ((name, pq.read_table(folder / f"{name}_ids.parquet")) for name in ("user", "item"))
    )
    samples = []
    for unit in range(len(source.unit_rows)):
        read = source.read(unit)
        history = read.history
        bounds = list(pairwise(history["item_id"].offsets))
        for row, (first, last) in enumerate(bounds):
            times, ids = (history[name].array[first:last].tolist() for name in ("timestamp", "item_id"))
            assert times == sorted(times)
            samples.append(
                (
                    users[int(np.asarray(read.scalars["user_id"])[row])],
                    items[int(read.candidate["item_id"].array[row])],
                    bool(read.candidate["action"].array[row] >> info.action_bit("listen_plus") & 1),
                    tuple(sorted(zip(times, (items[each] for each in ids), strict=True))),
                )
            )
    return samples


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Event]]:
    """A prepared data set, and the events that it is of, none of which share a second with another of their pool."""
    folder, events = tmp_path_factory.mktemp("gathered"), made_up_events()
    seen: set[tuple[Any, ...]] = set()
    for event in events:
        # Which of the events of one second are the newest is left to the log's order, which the oracle does not know.
        while (key := (event["uid"], event["timestamp"], pool(event))) in seen:
            event["timestamp"] += 5
        seen.add(key)
    assert prepare(write_yambda(folder / "in", events), folder / "out", *sizes()) == 0
    return folder / "out", events


def test_each_listening_has_the_newest_of_each_pool_before_its_second(data: tuple[Path, list[Event]]) -> None:
    folder, events = data
    config = DataConfig(path=str(folder), global_batch_size=4, max_history_len=100)
    info, wanted = dataset_info(config), expected(events)
    last = max(wanted)
    assert info.parts == tuple(f"day-{window:03d}" for window in sorted(set(wanted) - {last}))
    assert len(info.parts) > 3
    for window in sorted(wanted):
        split = "eval" if window == last else "train"
        part = None if window == last else f"day-{window:03d}"
        source = open_source(config, info, split, part=part)
        assert found(source, info, folder) == [
            (user, item, label, tuple(sorted(history))) for user, item, label, history in wanted[window]
        ]
        lens = np.concatenate([source.read(unit).history["item_id"].lens() for unit in range(len(source.unit_rows))])
        assert (source.file_lengths(0).history == lens).all() and lens.max() <= MAX_HISTORY
    train = [sample for window in set(wanted) - {last} for sample in wanted[window]]
    assert info.splits["train"].samples == len(train)
    assert info.splits["train"].history_events == sum(len(history) for *_, history in train)
    described = info.details["statistics"]["splits"]["train"]
    assert described["positives"]["listen_plus"] == sum(label for _, _, label, _ in train)
    assert described["positives"]["listen"] == described["candidates"] == len(train)


def test_crosses_tell_apart_what_they_are_made_of_and_nothing_else(data: tuple[Path, list[Event]]) -> None:
    folder, _ = data
    config = DataConfig(path=str(folder), global_batch_size=4, max_history_len=100)
    info = dataset_info(config)
    item_columns = {name: {} for name in ("artist", "album")}
    for row in pq.read_table(folder / "items").to_pylist():
        for name in item_columns:
            item_columns[name][row["item_id"]] = row[name]
    assert len(set(item_columns["artist"].values())) == 8, "six artists, the last of two, and the unknown one"
    crosses = info.details["gathered"]["crosses"]
    selection = select(info, event=("item_id",), candidate=("item_id",), context=tuple(crosses))
    source = open_source(config, info, "train", selection, info.parts[-1])
    made_of: dict[str, dict[int, set[Any]]] = {name: {} for name in crosses}
    for unit in range(len(source.unit_rows)):
        read = source.read(unit)
        item, action, time = (read.candidate[name].array for name in ("item_id", "action", "timestamp"))
        for row, user in enumerate(np.asarray(read.scalars["user_id"]).tolist()):
            values = {
                "user_id": user,
                "item_id": int(item[row]),
                "hour": time[row] // 3600 % 24,
                "action.organic": action[row] >> 6 & 1,
                **{f"item.{name}": of[int(item[row])] for name, of in item_columns.items()},
            }
            for name, words in crosses.items():
                identifier = int(np.asarray(read.scalars[name])[row])
                assert 0 < identifier < info.spaces[name].rows
                made_of[name].setdefault(identifier, set()).add(tuple(values[word] for word in words))
    for name, each in made_of.items():
        keys = [key for keys in each.values() for key in keys]
        assert len(keys) == len(set(keys)), f"{name}: one key has one id"
        # As many ids as a uniform hash gives so many keys, about.
        rows = info.spaces[name].rows
        likely = rows * (1 - (1 - 1 / rows) ** len(keys))
        assert abs(len(each) - likely) < 4 * likely**0.5


def test_single_files_make_the_same_data_as_one(data: tuple[Path, list[Event]], tmp_path: Path) -> None:
    folder, events = data
    assert prepare(write_yambda(tmp_path / "in", events, single_files=True), tmp_path / "out", *sizes()) == 0
    one, other = (json.loads((each / "dataset.json").read_text()) for each in (folder, tmp_path / "out"))
    assert one == other
    # Single files do not tell the order of one second's events of different kinds.
    samples = []
    for path in (folder, tmp_path / "out"):
        config = DataConfig(path=str(path), global_batch_size=4, max_history_len=100)
        info = dataset_info(config)
        samples.append(
            [sorted(found(open_source(config, info, "train", part=part), info, path)) for part in info.parts]
        )
    assert samples[0] == samples[1]


def test_windows_follow_one_another_and_no_batch_reaches_into_two(data: tuple[Path, list[Event]]) -> None:
    folder, _ = data
    config = DataConfig(path=str(folder), global_batch_size=16, max_history_len=8, order="stored", reader_threads=0)
    start = json.loads((folder / "dataset.json").read_text())["first_time"]
    seen = []
    for rank in range(2):
        loader = build_loader(config, split="train", rank=rank, world_size=2)
        windows = []
        for batch in loader:
            inputs = batch.inputs
            times = inputs.timestamp[int(inputs.history_lens_host.sum()) :].tolist()
            windows.append({(time - start) // DAY for time in times})
        assert all(len(each) <= 1 for each in windows)
        flat = [next(iter(each)) for each in windows if each]
        assert flat == sorted(flat) and len(set(flat)) > 3
        seen.append(len(windows))
    assert seen[0] == seen[1]
    # What a reader process is sent is where the data lies, not the data.
    assert len(pickle.dumps(open_source(config, dataset_info(config), "train"))) < 20_000


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--candidates", "4"), "--candidates has no effect with --histories gathered"),
        (("--train-fraction", "0.5"), "--train-fraction has no effect with --histories gathered"),
        (("--max-history", "2"), "--max-history must be at least 3, an event a pool, got 2"),
        (("--min-history", "1000000"), "none of the events that become samples has 1000000 others"),
    ],
)
def test_options_that_cannot_be_are_one_line(
    options: tuple[str, ...], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert prepare(write_yambda(tmp_path / "in", made_up_events(4, 3)), tmp_path / "out", *options) == 1
    assert message in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_files_that_are_wrong_are_one_line(
    data: tuple[Path, list[Event]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    size = write_yambda(tmp_path / "in", made_up_events(4, 3))
    (tmp_path / "in" / "album_item_mapping.parquet").unlink()
    assert prepare(size, tmp_path / "out") == 1
    assert "lacks album_item_mapping.parquet: give both files of the tracks, or neither" in capsys.readouterr().err
    (tmp_path / "in" / "artist_item_mapping.parquet").unlink()
    assert prepare(size, tmp_path / "out") == 1
    message = f"put artist_item_mapping.parquet and album_item_mapping.parquet into {size} or a folder above it"
    assert message in capsys.readouterr().err

    folder, _ = data
    config = DataConfig(path=str(folder), global_batch_size=4, max_history_len=100)
    info = dataset_info(config)
    place = folder / "train" / info.parts[0] / "place.bin"
    whole = place.read_bytes()
    for damaged, reason in ((whole[:-3], "no whole number of int64"), (whole[:-8], "disagree in length")):
        place.write_bytes(damaged)
        with pytest.raises(ValueError, match=reason):
            open_source(config, info, "train")
    place.write_bytes(whole)
