"""A company's own log to the prepared format: columns named on the command line, one clear error each."""

import gzip
import json
import logging
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pyarrow import csv

from tests.pipelines.prepare.test_prepare import prepare, read_back, rows_of, write_lines

ROOT = Path(__file__).resolve().parents[3]
HOUR = 1_699_999_200
"""The beginning of an hour in 2023."""


def keys_of(out: Path, space: str) -> dict[int, object]:
    """The key behind each id of a space."""
    rows = pq.read_table(out / f"{space}_ids.parquet").to_pylist()
    return {row[f"{space}_id"]: row[f"{space}_key"] for row in rows}


def test_event_log_from_parquet_and_csv(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    table = pa.table(
        {
            "who": [f"u{i % 15}" for i in range(400)],
            "what": [f"item {i}" for i in generator.integers(0, 60, 400)],
            "when": [(10**9 + 3600 * i) * 1000 for i in range(400)],
            "kind": [("view", "buy")[i] for i in generator.integers(0, 2, 400)],
            "land": [("de", "fr", None)[i % 3] for i in range(400)],
            "dwell": generator.integers(0, 100, 400),
        }
    )
    (tmp_path / "in").mkdir()
    pq.write_table(table, tmp_path / "in" / "part.parquet")
    options = ["--user-column", "who", "--item-column", "what", "--time-column", "when", "--time-unit", "ms"]
    options += ["--action-columns", "kind", "--action-values", "view,buy", "--context-columns", "land"]
    options += ["--history-columns", "dwell"]
    assert prepare("event_log", tmp_path / "in", tmp_path / "out", *options) == 0
    info = json.loads((tmp_path / "out" / "dataset.json").read_text())
    assert keys_of(tmp_path / "out", "land") == {1: "de", 2: "fr"}
    assert "context_values" not in info
    assert info["actions"] == ["view", "buy"]
    assert {mask for row in rows_of(tmp_path / "out", "eval") for mask in row["candidate_action"]} == {1, 2}
    assert read_back(tmp_path / "out") == sum(split["samples"] for split in info["splits"].values())
    csv.write_csv(table, tmp_path / "in" / "more.csv")
    (tmp_path / "in" / "part.parquet").unlink()
    assert prepare("event_log", tmp_path / "in", tmp_path / "out2", *options) == 0
    assert rows_of(tmp_path / "out", "train") == rows_of(tmp_path / "out2", "train")


@pytest.mark.parametrize("document", ["README.md", "docs/own_data.md", "pipelines/prepare/README.md"])
def test_the_documented_command_prepares_a_log_of_that_form(tmp_path: Path, document: str) -> None:
    lines = (ROOT / document).read_text().replace("\\\n", " ").splitlines()
    words = next(line for line in lines if "pipelines.prepare event_log" in line and "--user-column" in line).split()
    options = words[words.index("--user-column") :]
    example = (ROOT / "docs/own_data.md").read_text().split("customer,sku", 1)[1]
    header, row = example.split("```")[0].splitlines()[:2]
    rows = [row.replace("c17", f"c{user}").replace("-01 ", f"-{day:02d} ") for user in range(5) for day in range(1, 11)]
    write_lines(tmp_path / "in" / "log.csv", ["customer,sku" + header, *rows])
    assert prepare("event_log", tmp_path / "in", tmp_path / "out", *options) == 0
    info = json.loads((tmp_path / "out" / "dataset.json").read_text())
    further = {"dwell_s": "number"} if "dwell_s" in options else {}
    assert (info["actions"], info["event"]) == (["view", "cart", "buy"], {"item_id": "item", **further})
    assert (info["statistics"]["events"], info["statistics"]["users"]) == (50, 5)
    assert read_back(tmp_path / "out") == 10


def test_event_log_refuses_an_unknown_action(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_lines(tmp_path / "in" / "log.csv", ["u,i,t,a", f"1,2,{HOUR},view", f"1,2,{HOUR},sneeze"])
    options = ["--user-column", "u", "--item-column", "i", "--time-column", "t"]
    options += ["--action-columns", "a", "--action-values", "view"]
    assert prepare("event_log", tmp_path / "in", tmp_path / "out", *options) == 1
    assert "log.csv, line 3: a must be one of view" in capsys.readouterr().err


@pytest.mark.parametrize("stored", ["csv", "parquet"])
def test_event_log_refuses_a_label_that_is_not_a_number(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], stored: str
) -> None:
    table = pa.table({"u": [1, 1], "i": [2, 3], "t": [HOUR, HOUR + 1], "like": [1.0, float("nan")]})
    (tmp_path / "in").mkdir()
    (csv.write_csv if stored == "csv" else pq.write_table)(table, tmp_path / "in" / f"log.{stored}")
    options = ["--user-column", "u", "--item-column", "i", "--time-column", "t", "--action-columns", "like"]
    assert prepare("event_log", tmp_path / "in", tmp_path / "out", *options) == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ")
    assert f"log.{stored}" in error
    assert "like" in error


@pytest.mark.parametrize("cut", [(), ("--no-eval-groups",), ("--leave-last", "3")], ids=str)
def test_a_context_feature_is_what_was_known_before_the_first_candidate(tmp_path: Path, cut: tuple[str, ...]) -> None:
    """Values come, change, go missing and come again, some in one second; each kind of column."""
    generator = np.random.default_rng(5)
    rows = [
        {"u": int(u), "i": int(i), "t": HOUR + 9 * int(t), "like": int(i) % 2}
        for u, i, t in [*generator.integers((4, 7, 100), size=(200, 3)).tolist(), [9, 1, 99]]
    ]
    for row in rows:
        row["land"] = str(generator.choice(["", "de", "fr", "at"]))
        row["age"] = str(generator.choice(["", "7", "8.5"]))
        row["tags"] = str(generator.choice(["", "a", "b|a"]))
    rows.sort(key=lambda row: row["t"])
    write_lines(tmp_path / "in" / "log.csv", [",".join(rows[0]), *(",".join(map(str, row.values())) for row in rows)])
    schema = """
        user = "u"
        item = "i"
        time = "t"
        actions = ["like"]
        [sample]
        land = "land"
        age = "number"
        tags = { of = ["tag"], separator = "|" }
    """
    (tmp_path / "log.toml").write_text(schema)
    split = () if "--leave-last" in cut else ("--split-time", str(HOUR + 600))
    options = ("--schema", str(tmp_path / "log.toml"), *split, *cut, "--candidates", "3", "--min-history", "0")
    assert prepare("event_log", tmp_path / "in", tmp_path / "out", *options) == 0
    users, lands, tags = (keys_of(tmp_path / "out", space) for space in ("user", "land", "tag"))
    samples = [sample for part in ("train", "eval") for sample in rows_of(tmp_path / "out", part)]
    for sample in samples:
        # Histories are whole here.
        of_user = [row for row in rows if str(row["u"]) == users[sample["user_id"]]]
        before = of_user[: len(sample["history_item_id"])]
        known = {name: [row[name] for row in before if row[name]][-1:] for name in ("land", "age", "tags")}
        assert lands.get(sample["land"]) == (known["land"][0] if known["land"] else None)
        assert sample["age"] == pytest.approx(float(known["age"][0] if known["age"] else "nan"), nan_ok=True)
        assert [tags[tag] for tag in sample["tags"]] == (known["tags"][0].split("|") if known["tags"] else [])
    assert len({(sample["user_id"], sample["land"]) for sample in samples}) > 5


COLUMNS = ["--user-column", "u", "--item-column", "i", "--time-column", "t", "--action-columns", "like"]
SECONDS = (100, 200, 300, 4000)
LOG = {
    "u": [1] * 4,
    "i": [2, 3, 4, 5],
    "t": [HOUR + second for second in SECONDS],
    "like": [1, 0, 1, 0],
    "dwell": [1, 2, 3, 4],
}


@pytest.mark.parametrize("stored", ["csv", "parquet"])
@pytest.mark.parametrize(
    ("column", "values", "message"),
    [
        ("like", [1.0, 0.0, 0.7, 0.0], "3: label like must be 0 or 1 (1 such row(s))"),
        ("like", [1, 0, None, 0], "3: label like must be 0 or 1"),
        ("t", [HOUR, HOUR, -1, HOUR], "3: t must hold numbers of s since 1970, none negative"),
        ("t", [HOUR, HOUR, None, HOUR], "3: t must hold numbers of s since 1970, none negative or missing"),
        ("t", [datetime(2024, 1, day) for day in (1, 2, 3, 4)], "1: t must hold numbers of s"),
        (
            "t",
            [1_700_000_000_000 + step for step in range(4)],
            "1: t lies after the year 2100: is --time-unit s right?",
        ),
        (
            "dwell",
            ["1.0", "2.0", "long", "4.0"],
            "3: dwell must hold finite numbers, with a point before decimals and nothing between thousands",
        ),
        ("dwell", [1.0, 2.0, float("inf"), 4.0], "3: dwell must hold finite numbers"),
        ("dwell", [1.0, 2.0, -1.7976931348623157e308, 4.0], "3: dwell must hold finite numbers"),
        ("u", [1, 1, None, 1], "3: u must not be missing"),
        ("i", [1, 1, None, 1], "3: i must not be missing"),
    ],
)
def test_a_value_that_would_have_to_be_guessed_is_refused_by_file_and_row(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], stored: str, column: str, values: list[object], message: str
) -> None:
    (tmp_path / "in").mkdir()
    table = pa.table({**LOG, column: values})
    (csv.write_csv if stored == "csv" else pq.write_table)(table, tmp_path / "in" / f"log.{stored}")
    assert prepare("event_log", tmp_path / "in", tmp_path / "out", *COLUMNS, "--history-columns", "dwell") == 1
    row, rest = message.split(":", 1)
    where = f"line {int(row) + 1}" if stored == "csv" else f"row {row}"
    assert f"log.{stored}, {where}:{rest}" in capsys.readouterr().err


@pytest.mark.parametrize("stored", ["csv", "parquet"])
def test_dates_and_times_are_read_in_utc_or_in_their_zone(tmp_path: Path, stored: str) -> None:
    begin = datetime(2024, 1, 1)
    naive = [begin + timedelta(seconds=second) for second in SECONDS]
    zone = timezone(timedelta(hours=2))
    zoned = [moment.replace(tzinfo=UTC).astimezone(zone) for moment in naive]
    (tmp_path / "in").mkdir()
    for number, moments in enumerate((naive, zoned)):
        kind = pa.timestamp("ms") if number == 0 else pa.timestamp("ms", "+02:00")
        table = pa.table({**LOG, "u": [number] * 4, "t": pa.array(moments, kind)})
        path = tmp_path / "in" / f"log{number}.{stored}"
        if stored == "parquet":
            pq.write_table(table, path)
        else:
            lines = [f"{number},{item},{moment.isoformat()},1" for item, moment in enumerate(moments)]
            write_lines(path, ["u,i,t,like", *lines])
    first = int(begin.replace(tzinfo=UTC).timestamp())
    options = [*COLUMNS, "--time-unit", "timestamp", "--split-time", str(first + 3600)]
    assert prepare("event_log", tmp_path / "in", tmp_path / "out", *options) == 0
    rows = rows_of(tmp_path / "out", "eval")
    assert [row["history_timestamp"] + row["candidate_timestamp"] for row in rows] == [
        [first + second for second in SECONDS]
    ] * 2


@pytest.mark.parametrize("labels", [[True, False, True, False], [1.0, 0.0, 1.0, 0.0]])
def test_labels_of_a_parquet_file_may_be_truth_values_or_floats(tmp_path: Path, labels: list[object]) -> None:
    (tmp_path / "in").mkdir()
    pq.write_table(pa.table({**LOG, "like": labels}), tmp_path / "in" / "log.parquet")
    assert prepare("event_log", tmp_path / "in", tmp_path / "out", *COLUMNS, "--split-time", str(HOUR + 3600)) == 0
    [row] = rows_of(tmp_path / "out", "eval")
    assert row["history_action"] + row["candidate_action"] == [1, 0, 1, 0]


def test_whole_numbers_and_words_are_no_dates(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_lines(tmp_path / "in" / "log.csv", ["u,i,t,like", "1,2,2024-01-01,1", "1,3,17,1"])
    assert prepare("event_log", tmp_path / "in", tmp_path / "out", *COLUMNS, "--time-unit", "timestamp") == 1
    assert "log.csv, line 3: t must hold dates and times from 1970 on" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"u,i,t,like,like\n1,2,3,1,1\n", "log.csv: the header names like more than once"),
        (
            b"u:i:t:like\n1:2:3:1\n",
            "log.csv lacks the column(s) u, i, t, like; divided at ',', it has u:i",
        ),
        (b"u,i,t,like\n1,2,3,1\n\xe9,2,3,1\n", "log.csv, line 3: Invalid unicode"),
        (b"u,i,t,like\n1,2,3,1\n1,2\n", "log.csv, line 3: Expected Number of Columns: 4 Found: 2"),
        (b"u,i,t,like\n", "in holds no event: its files hold no row, a header is none"),
        (
            gzip.compress(b"u,i,t,like\n1,2,3,1\n", mtime=0),
            "log.csv is no text, it begins as files of another kind do (gzip, .gz)",
        ),
        (b"Obj\x01\x04\x16avro.schema", "(Avro, which is not read: write Parquet)"),
        (
            "u,i,t,like\n1,2,3,1\n".encode("utf-16-le"),
            "log.csv holds zero bytes, as text in UTF-16 does: say which --enc",
        ),
        ("\u00fc,i,t,like\n1,2,3,1\n".encode("latin-1"), "is no text in utf-8: say which --encoding"),
        ("u,i,t,like\n1,2,3,1\n\u00e9,2,3,1\n".encode("latin-1"), "line 3: Invalid unicode"),
    ],
)
def test_a_malformed_csv_file_is_one_clear_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: bytes, message: str
) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "log.csv").write_bytes(content)
    assert prepare("event_log", tmp_path / "in", tmp_path / "out", *COLUMNS) == 1
    assert message in capsys.readouterr().err.strip().splitlines()[-1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--context-columns", "user_id"], "the sample column cannot be called user_id, which says whose a sample is"),
        (["--context-columns", "history_length"], "the sample column cannot be called history_length"),
        (["--history-columns", "timestamp"], "the event column cannot be called 'timestamp'; rename it"),
        (["--context-columns", "land,land"], "the sample column land is named twice"),
        (["--action-columns", ",".join(f"a{bit}" for bit in range(32))], "at most 31 actions fit into a bit mask"),
        (["--action-columns", "like,like"], "each action must be named once, got like, like"),
        (["--action-separator", "|"], "the separator '|' divides words: give the action values"),
        (["--item-column", "u"], "user, item and time are the columns u, u, t"),
        (["--time-unit", "min"], "the time unit must be one of s, ms, us, ns, timestamp, or how dates are written"),
        (["--time-unit", "%d.%m.%Y %I:%M"], "has hours of half a day (%I) and does not say which half: add %p"),
        (["--time-unit", "%Q"], "the time unit '%Q' is no pattern of strptime: "),
    ],
)
def test_columns_that_cannot_be_are_wrong_use(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    with pytest.raises(SystemExit) as left:
        prepare("event_log", tmp_path / "in", tmp_path / "out", *COLUMNS, *options)
    assert left.value.code == 2
    assert message in capsys.readouterr().err


def test_a_context_feature_may_have_very_many_values(tmp_path: Path) -> None:
    users = np.arange(30_000)
    table = pa.table(
        {"u": np.repeat(users, 2), "i": np.tile([1, 2], 30_000), "t": np.tile([HOUR, HOUR + 4000], 30_000)}
    )
    table = table.append_column("like", pa.array(np.ones(60_000, np.int64)))
    table = table.append_column("device", pa.array([f"device {user:05d}" for user in np.repeat(users, 2)]))
    (tmp_path / "in").mkdir()
    pq.write_table(table, tmp_path / "in" / "log.parquet")
    options = [*COLUMNS, "--context-columns", "device", "--split-time", str(HOUR + 3600), "--min-history", "0"]
    assert prepare("event_log", tmp_path / "in", tmp_path / "out", *options) == 0
    assert json.loads((tmp_path / "out" / "dataset.json").read_text())["spaces"]["device"]["rows"] == 30_001
    assert all(row["device"] == row["user_id"] for row in rows_of(tmp_path / "out", "eval"))


@pytest.mark.parametrize("days_apart", [0, 2])
def test_requests_whose_ids_begin_anew_each_day_are_reported(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, days_apart: int
) -> None:
    """The events of 50 ids: within minutes nothing is said, days apart each id counts."""
    lines = ["who,what,when,liked,request"]
    for user in range(50):
        times = (HOUR, HOUR + 60, HOUR + 120, HOUR + 120 + 86_400 * days_apart, HOUR + 3 * 86_400)
        for place, (at, request) in enumerate(zip(times, ("", "r0", "r0", "r0", ""), strict=True)):
            lines.append(f"u{user},i{place},{at + user},{(user + place) % 2},{request}")
    write_lines(tmp_path / "in" / "log.csv", lines)
    options = ["--user-column", "who", "--item-column", "what", "--time-column", "when", "--action-columns", "liked"]
    with caplog.at_level(logging.WARNING):
        assert (
            prepare(
                "event_log",
                tmp_path / "in",
                tmp_path / "out",
                *options,
                "--request-column",
                "request",
                "--split-time",
                str(HOUR + 3 * 86_400),
            )
            == 0
        )
    said = [message for message in caplog.messages if "last more than a day" in message]
    assert len(said) == (days_apart > 0)
    assert all(message.startswith("50 of 50 requests last more than a day, the longest 2.0 days") for message in said)
