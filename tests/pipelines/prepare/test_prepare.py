"""KuaiRand's files to the prepared format, and what all data sets share: no leak, right labels, clear errors."""

import json
import lzma
import re
import resource
import subprocess
import sys
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines.config import DataConfig
from pipelines.prepare.__main__ import main
from pipelines.prepare.publishers.kuairand import ACTIONS
from pipelines.prepare.samples.stages import workspace
from pipelines.reading.loader import build_loader

SHARED = Path(__file__).resolve().parents[4] / "shared" / "data"
LOG_COLUMNS = "user_id,video_id,date,hourmin,time_ms,{actions},play_time_ms,duration_ms,tab"
USER_COLUMNS = (
    "user_id,user_active_degree,follow_user_num_range,fans_user_num_range,friend_user_num_range,register_days_range"
)
VIDEO_COLUMNS = "video_id,author_id,video_type,upload_type,video_duration,music_id,music_type,tag"


def video_row(video: int) -> dict[str, Any]:
    """What the publisher says of a video."""
    tags = [[], [3], [3, 12]][video % 3]
    return {
        "video_id": video,
        "author_id": video if video < 50 else video % 7,
        "video_type": "AD" if video % 5 == 0 else "NORMAL",
        "upload_type": "Web",
        "video_duration": "" if video == 70 else 1000.0 * video,
        "music_id": video % 4,
        "music_type": "9.0",
        "tag": '"' + ",".join(map(str, tags)) + '"' if tags else "",
    }


START_MS = 1_650_000_000_000


def write_kuairand(folder: Path, users: int = 30, seed: int = 0) -> list[dict[str, int]]:
    """A log, sequences, users and videos as the publisher writes them; returns the log's rows."""
    generator = np.random.default_rng(seed)
    rows = []
    for user in range(users):
        for time in np.sort(generator.choice(10**9, generator.integers(1, 40), replace=False)):
            row = {"user_id": user, "video_id": int(generator.integers(90)), "time_ms": START_MS + int(time)}
            row |= {name: int(generator.integers(2)) for name in ACTIONS} | {"play_time_ms": int(time) % 5000}
            rows.append(row)
    columns = LOG_COLUMNS.format(actions=",".join(ACTIONS)).split(",")
    lines = [",".join(columns)] + [",".join(str(row.get(name, 0)) for name in columns) for row in rows]
    folder.mkdir()
    with lzma.open(folder / "log_standard_4_22_to_5_08_pure.csv.xz", "wt") as file:
        file.write("\n".join(lines) + "\n")
    degrees = ["full_active", "high_active", ""]
    lines = [USER_COLUMNS] + [f'{user},{degrees[user % 3]},500+,"[1,10)","[5,30)",730+' for user in range(users)]
    (folder / "user_features_pure.csv").write_text("\n".join(lines) + "\n")
    lines = [VIDEO_COLUMNS, *(",".join(map(str, video_row(video).values())) for video in range(100))]
    (folder / "video_features_basic_pure.csv").write_text("\n".join(lines) + "\n")
    sequences = {
        "user_id": list(range(0, users, 2)),
        "last_time_ms": [START_MS - 1 + 10**10 * (user == 4) for user in range(0, users, 2)],
        "watch_seq": [[80, 81, 82]] * len(range(0, users, 2)),
        "like_seq": [[82]] * len(range(0, users, 2)),
        "long_watch_seq": [[80, 82]] * len(range(0, users, 2)),
    }
    pq.write_table(pa.table(sequences), folder / "user_sequences.parquet")
    return rows


def prepare(dataset: str, source: Path, out: Path, *options: str) -> int:
    return main([dataset, "--source", str(source), "--out", str(out), "--memory-gib", "1", *options])


def write_lines(path: Path, lines: list[str]) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def rows_of(out: Path, split: str) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = pa.concat_tables(
        [pq.read_table(path) for path in sorted((out / split).glob("*.parquet"))]
    ).to_pylist()
    return rows


def read_back(out: Path) -> int:
    """Pass the whole of both splits through the loader, whose checks see every row; returns the samples seen."""
    config = DataConfig(path=str(out), global_batch_size=8, max_history_len=64, reader_threads=0)
    return sum(
        batch.global_samples
        for split in ("train", "eval")
        for batch in build_loader(config, split=split, rank=0, world_size=1)  # type: ignore[arg-type]
    )


def test_kuairand_against_a_plain_reading(tmp_path: Path) -> None:
    log = write_kuairand(tmp_path / "in")
    options = ("--candidates", "4", "--samples-per-user", "0", "--max-history", "9", "--row-group-events", "50")
    assert prepare("kuairand", tmp_path / "in", tmp_path / "out", *options) == 0
    info = json.loads((tmp_path / "out" / "dataset.json").read_text())
    split_ms = info["split_time"] * 1000
    videos = sorted({row["video_id"] for row in log} | {80, 81, 82})
    table = pq.read_table(tmp_path / "out" / "item_ids.parquet").to_pylist()
    item = {row["item_key"]: row["item_id"] for row in table}
    assert item == {video: place for place, video in enumerate(videos, 1)}
    assert info["spaces"]["item"]["rows"] == len(videos) + 1
    assert info["spaces"]["user_active_degree"]["rows"] == 3
    before = sum(row["time_ms"] < split_ms for row in log) / len(log)
    assert 0.85 <= before < 0.9

    events = defaultdict(list)
    for row in log:
        mask = sum(row[name] << bit for bit, name in enumerate(ACTIONS))
        events[row["user_id"]].append((item[row["video_id"]], mask, row["time_ms"] // 1000, row["play_time_ms"]))
    for user in range(0, 30, 2):
        if user != 4:  # whose sequence reaches into the log
            events[user][:0] = [(item[80], 64, -1, 0), (item[81], 0, -1, 0), (item[82], 66, -1, 0)]
    train, evaluation = rows_of(tmp_path / "out", "train"), rows_of(tmp_path / "out", "eval")
    taught = 0
    for row in train + evaluation:
        ours = events[row["user_id"] - 1]  # users count from 1
        first = (row["candidate_item_id"][0], row["candidate_action"][0], row["candidate_timestamp"][0])
        place = next(i for i, event in enumerate(ours) if event[:3] == first)
        size = len(row["candidate_item_id"])
        names = ("item_id", "action", "timestamp")
        past = list(zip(*(row[f"history_{name}"] for name in (*names, "watch_time_ms")), strict=True))
        future = list(zip(*(row[f"candidate_{name}"] for name in names), strict=True))
        assert past == ours[max(place - 9, 0) : place]
        assert future == [event[:3] for event in ours[place : place + size]]
        assert row["history_length"] == len(past) >= 1
        assert row["num_candidates"] == size
        assert row["user_active_degree"] == {0: 1, 1: 2, 2: 0}[(row["user_id"] - 1) % 3]
        taught += size * (row in train)
    assert all(max(row["candidate_timestamp"]) * 1000 < split_ms for row in train)
    assert all(min(row["candidate_timestamp"]) * 1000 >= split_ms for row in evaluation)
    expected = 0
    for ours in events.values():
        labelled = [event for event in ours if event[2] >= 0 and event[2] * 1000 < split_ms]
        expected += max(len(labelled) - (ours[0][2] >= 0), 0)
    assert taught == expected
    assert read_back(tmp_path / "out") == len(train) + len(evaluation)
    groups = pq.ParquetFile(tmp_path / "out" / "train" / "part-00000.parquet").metadata
    assert groups.num_row_groups > 5
    statistics = info["statistics"]
    counted = statistics["splits"]["train"]
    assert counted["history_len"]["q100"] == max(row["history_length"] for row in train)
    assert counted["num_candidates"]["q100"] == max(row["num_candidates"] for row in train)
    assert counted["positives"]["is_like"] == sum(mask >> 1 & 1 for row in train for mask in row["candidate_action"])
    assert statistics["users_in_no_sample"] == 30 - len({row["user_id"] for row in train + evaluation}) > 0
    candidates = sum(row["num_candidates"] for row in train + evaluation)
    assert statistics["events_not_candidates"] == len(log) - candidates > 0
    assert statistics["action_rates"]["is_like"] == pytest.approx(np.mean([row["is_like"] for row in log]), abs=1e-6)
    popularity = np.unique([row["video_id"] for row in log], return_counts=True)[1]
    assert statistics["item_popularity"]["items"] == len(popularity)
    assert statistics["item_popularity"]["top_item_share"] == pytest.approx(popularity.max() / len(log))


def test_videos_have_what_the_publisher_says_of_them(tmp_path: Path) -> None:
    write_kuairand(tmp_path / "in", users=60)
    assert prepare("kuairand", tmp_path / "in", tmp_path / "out") == 0
    keys = {
        name: {
            row[f"{name}_id"]: row[f"{name}_key"]
            for row in pq.read_table(tmp_path / "out" / f"{name}_ids.parquet").to_pylist()
        }
        for name in ("item", "author", "music", "video_type", "tag")
    }
    rows = pq.read_table(tmp_path / "out" / "items").to_pylist()
    assert sorted(row["item_id"] for row in rows) == sorted(keys["item"])
    authors = Counter(video_row(video)["author_id"] for video in keys["item"].values())
    for row in rows:
        told = video_row(keys["item"][row["item_id"]])
        # An author of a single video says nothing that the video does not, and music 0 is none.
        assert keys["author"].get(row["author"]) == (told["author_id"] if authors[told["author_id"]] > 1 else None)
        assert keys["music"].get(row["music"]) == (told["music_id"] or None)
        assert keys["video_type"][row["video_type"]] == told["video_type"]
        assert [keys["tag"][tag] for tag in row["tags"]] == re.findall(r"\d+", told["tag"])
        duration = told["video_duration"]
        assert row["duration_s"] == pytest.approx(duration / 1000 if duration != "" else np.nan, nan_ok=True)
    assert any(not row["author"] for row in rows)
    assert read_back(tmp_path / "out") > 60


def test_order_of_time(tmp_path: Path) -> None:
    write_kuairand(tmp_path / "in")
    options = ("--order", "time", "--candidates", "3", "--samples-per-user", "0")
    assert prepare("kuairand", tmp_path / "in", tmp_path / "out", *options) == 0
    times = [row["candidate_timestamp"][0] for row in rows_of(tmp_path / "out", "train")]
    assert times == sorted(times)
    assert prepare("kuairand", tmp_path / "in", tmp_path / "users", *options[2:]) == 0
    by_user = sorted(row["candidate_timestamp"][0] for row in rows_of(tmp_path / "users", "train"))
    assert by_user == times


def spoiled(folder: Path, old: str, new: str) -> None:
    """Replace text in the log, which is stored plain from then on."""
    path = folder / "log_standard_4_22_to_5_08_pure.csv.xz"
    text = lzma.decompress(path.read_bytes()).decode()
    lines = text.splitlines()
    lines[4] = lines[4].replace(old, new, 1) if old != "*" else new
    path.unlink()
    path.with_suffix("").write_text("\n".join(lines) + "\n")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("0,1,0,0,1650000000000,2,0,0,0,0,0,0,0,1,1,0", r"pure\.csv, line 5: label is_click must be 0 or 1"),
        ("0,1,0,0,1650000000000,,0,0,0,0,0,0,0,1,1,0", r"pure\.csv, line 5: label is_click must be 0 or 1"),
        ("0,1,0,0,abc,0,0,0,0,0,0,0,0,1,1,0", r"pure\.csv, line 5: column time_ms holds abc, which is no whole"),
        ("0,1,0,0,1650000000000.5,0,0,0,0,0,0,0,0,1,1,0", r"pure\.csv, line 5: column time_ms holds 1650000000000\.5"),
        ("0,1,0", r"pure\.csv, line 5: Expected Number of Columns: 16 Found: 3"),
        ("0,-7,0,0,1650000000000,0,0,0,0,0,0,0,0,1,1,0", r"pure\.csv, line 5: video_id must not be negative"),
    ],
)
def test_malformed_rows_are_named_by_file_and_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], line: str, message: str
) -> None:
    write_kuairand(tmp_path / "in")
    spoiled(tmp_path / "in", "*", line)
    assert prepare("kuairand", tmp_path / "in", tmp_path / "out") == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ")
    assert re.search(message, error)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in"]


def test_missing_column_empty_file_and_truncated_archive(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_kuairand(tmp_path / "in")
    log = tmp_path / "in" / "log_standard_4_22_to_5_08_pure.csv.xz"
    content = log.read_bytes()
    log.write_bytes(content[: len(content) // 2])
    assert prepare("kuairand", tmp_path / "in", tmp_path / "out") == 1
    assert "cannot be decompressed" in capsys.readouterr().err
    log.unlink()
    assert prepare("kuairand", tmp_path / "in", tmp_path / "out") == 1
    assert "holds no log_standard_*.csv" in capsys.readouterr().err
    log.with_suffix("").write_text("")
    assert prepare("kuairand", tmp_path / "in", tmp_path / "out") == 1
    assert "is empty" in capsys.readouterr().err
    log.with_suffix("").write_text("user_id,video_id\n1,2\n")
    assert prepare("kuairand", tmp_path / "in", tmp_path / "out") == 1
    assert "the header lacks the column(s) time_ms" in capsys.readouterr().err
    (tmp_path / "out").mkdir()
    assert prepare("kuairand", tmp_path / "in", tmp_path / "out") == 1
    assert "exists already" in capsys.readouterr().err


def test_help_explains_every_option(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main(["--help"])
    assert left.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    for line in (
        "--samples-per-user N Training samples of a user at most, the newest; 0 for as many as the events allow.",
        "--split-time N Unix seconds at which evaluation begins; if not given, --train-fraction decides.",
        "options of event_log alone: --schema SCHEMA",
        "--user-column COLUMN The column that says who did it; any type.",
    ):
        assert line in text


@pytest.mark.parametrize(
    "arguments",
    [
        ["kuairand", "--source", "x"],
        ["nothing", "--source", "x", "--out", "y"],
        ["kuairand", "--source", "x", "--out", "y", "--candidates", "0"],
        ["kuairand", "--source", "x", "--out", "y", "--bogus", "1"],
        ["kuairand", "--source", "x", "--out", "y", "--user-column", "u"],
        ["event_log", "--source", "x", "--out", "y", "--user-column", "u"],
    ],
)
def test_wrong_use_is_one_line_and_status_two(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    try:
        status = main(arguments)
    except SystemExit as left:
        status = left.code  # type: ignore[assignment]
    assert status == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1


@pytest.mark.parametrize("room", [4096, 100_000])
def test_a_full_disk_leaves_nothing_behind(tmp_path: Path, room: int) -> None:
    """Full at once, and while the log is decompressed."""
    write_kuairand(tmp_path / "in", users=500)

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, room))

    command = [sys.executable, "-m", "pipelines.prepare", "kuairand"]
    command += ["--source", str(tmp_path / "in"), "--out", str(tmp_path / "out")]
    done = subprocess.run(command, check=False, capture_output=True, text=True, preexec_fn=limit, timeout=120)
    assert done.returncode == 1
    error = done.stderr.strip().splitlines()[-1]
    assert error.startswith("error: ")
    assert str(tmp_path) in error
    assert "File too large" in error
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in"]


def test_a_preparation_that_was_killed_begins_anew_and_two_at_once_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_kuairand(tmp_path / "in")
    with workspace(tmp_path / "out") as work:
        assert prepare("kuairand", tmp_path / "in", tmp_path / "out") == 1
        assert f"error: {work} is in use, another process makes" in capsys.readouterr().err
    for folder in (work / "spill", work / "result" / "train"):
        folder.mkdir(parents=True)
    (work / "prepare.duckdb").write_bytes(b"torn")
    assert prepare("kuairand", tmp_path / "in", tmp_path / "out") == 0
    assert read_back(tmp_path / "out") > 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "out"]


@pytest.mark.parametrize("option", ["--source", "--out"])
def test_an_address_of_a_store_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str], option: str) -> None:
    write_kuairand(tmp_path / "in")
    folders = {"--source": tmp_path / "in", "--out": tmp_path / "out", option: "s3://bucket/log"}
    assert main(["kuairand", *(str(word) for pair in folders.items() for word in pair)]) == 1
    assert f"error: {option} s3:/bucket/log must be a folder of this machine" in capsys.readouterr().err
    assert not Path("s3:").exists()


def test_users_that_would_count_twice_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_kuairand(tmp_path / "in")
    users = tmp_path / "in" / "user_features_pure.csv"
    lines = users.read_text()
    users.write_text(lines + lines.splitlines()[1] + "\n")
    assert prepare("kuairand", tmp_path / "in", tmp_path / "out") == 1
    assert "user_features_pure.csv: user_id 0 stands in several rows" in capsys.readouterr().err
    users.write_text(lines)
    (tmp_path / "in" / "user_features_1k.csv").write_text(lines)
    assert prepare("kuairand", tmp_path / "in", tmp_path / "out") == 1
    assert "found user_features_1k.csv, user_features_pure.csv; name one size's folder" in capsys.readouterr().err


def test_kuairand_in_parts(tmp_path: Path) -> None:
    """As the publisher divides the logs of 1K and 27K."""
    log = write_kuairand(tmp_path / "in")
    path = tmp_path / "in" / "log_standard_4_22_to_5_08_pure.csv.xz"
    header, *lines = lzma.decompress(path.read_bytes()).decode().splitlines()
    path.unlink()
    for number, name in enumerate(("4_08_to_4_21_27k_part1", "4_08_to_4_21_27k_part2", "4_22_to_5_08_27k_part1")):
        write_lines(tmp_path / "in" / f"log_standard_{name}.csv", [header, *lines[number::3]])
    write_lines(tmp_path / "in" / "log_random_4_22_to_5_08_27k.csv", [header, *lines])
    assert prepare("kuairand", tmp_path / "in", tmp_path / "out") == 0
    assert json.loads((tmp_path / "out" / "dataset.json").read_text())["statistics"]["events"] == len(log)


def test_the_same_source_gives_the_same_files(tmp_path: Path) -> None:
    write_kuairand(tmp_path / "in", users=100)
    for out in ("a", "b"):
        assert prepare("kuairand", tmp_path / "in", tmp_path / out, "--samples-per-user", "0") == 0
    for name in ("train/part-00000.parquet", "eval/part-00000.parquet", "dataset.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


SAMPLE = Path(__file__).resolve().parents[3] / "data" / "kuairand_sample"


@pytest.mark.skipif(not (SHARED / "kuairand-pure").exists(), reason="the sample's source is not in the repository")
def test_the_documented_command_makes_the_shipped_sample(tmp_path: Path) -> None:
    words = (SAMPLE / "README.md").read_text().split("```")[1].replace("\\\n", " ").split()
    options = words[words.index("data/kuairand_sample") + 1 :]
    assert prepare("kuairand", SHARED / "kuairand-pure", tmp_path / "out", *options) == 0
    for split in ("train", "eval"):
        ours, shipped = (pq.read_table(folder / split) for folder in (tmp_path / "out", SAMPLE))
        assert ours.equals(shipped)
