"""Logs whose files disagree, whose rows cannot be used and whose folders hold more than data: the truth is known."""

import gzip
import json
import logging
import math
import uuid
from datetime import datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.pipelines.prepare.test_event_log import COLUMNS, HOUR, keys_of
from tests.pipelines.prepare.test_prepare import prepare, read_back, rows_of, write_lines

SPLIT = ("--split-time", str(HOUR + 3600))
"""Between the third and the fourth event of every user below."""
OFFSETS = (100, 200, 300, 4000)


def events(user: object, **columns: list[Any]) -> dict[str, Any]:
    """Four events of a user, with other columns or other values."""
    return {"u": [user] * 4, "i": [2, 3, 4, 5], "t": [HOUR + each for each in OFFSETS], "like": [1, 0, 1, 0], **columns}


def prepared(tmp_path: Path, files: list[tuple[str, Any]], *options: str, name: str = "out") -> tuple[int, Path]:
    """Prepare a log of these (suffix, columns), numbered in this order; returns the exit status and the folder."""
    source = tmp_path / f"{name}-in"
    source.mkdir()
    for number, (suffix, columns) in enumerate(files):
        path = source / f"{number}.{suffix}"
        table = pa.table(columns)
        if suffix == "parquet":
            pq.write_table(table, path)
        elif suffix == "jsonl":
            write_lines(path, [json.dumps(row) for row in table.to_pylist()])
        else:
            rows = [["" if value is None else str(value) for value in row.values()] for row in table.to_pylist()]
            write_lines(path, [",".join(table.column_names), *(",".join(row) for row in rows)])
    return prepare("event_log", source, tmp_path / name, *COLUMNS, *SPLIT, *options), tmp_path / name


def content(out: Path) -> list[dict[str, Any]]:
    """All samples, with the keys of users and items in place of their ids, in a fixed order."""
    users, items = keys_of(out, "user"), keys_of(out, "item")
    rows = rows_of(out, "train") + rows_of(out, "eval")
    for row in rows:
        row["user_id"] = users[row["user_id"]]
        for name in ("history_item_id", "candidate_item_id"):
            row[name] = [items.get(item) for item in row[name]]
    return sorted(rows, key=str)


def both_orders(tmp_path: Path, files: list[tuple[str, Any]], *options: str) -> list[dict[str, Any]]:
    """The content of a log that must be the same in both orders of its files."""
    found = []
    for name, ordered in (("forth", files), ("back", files[::-1])):
        status, out = prepared(tmp_path, ordered, *options, name=name)
        assert status == 0
        found.append([row for row in content(out) if row["num_candidates"] + row["history_length"] == len(OFFSETS)])
        assert read_back(out) == len(content(out))
    assert found[0] == found[1]
    return found[0]


WIDE = {
    "int8 and int64": (pa.int8(), [1, 2], pa.int64(), [3, 1 << 60]),
    "int32 and uint32": (pa.int32(), [-1, 2], pa.uint32(), [3, 1 << 31]),
    "int64 and uint64": (pa.int64(), [-5, 2], pa.uint64(), [(1 << 64) - 2, (1 << 64) - 1]),
    "uint8 and uint64": (pa.uint8(), [1, 200], pa.uint64(), [(1 << 64) - 2, (1 << 64) - 1]),
    "int64 and whole floats": (pa.int64(), [1 << 60, (1 << 60) + 1], pa.float64(), [7.0, 8.0]),
    "int64 and whole decimals": (pa.int64(), [1 << 60, (1 << 60) + 1], pa.decimal128(22, 2), [7, 8]),
    "int16 and float32": (pa.int16(), [3, 4], pa.float32(), [5.0, 6.0]),
    "text and large text": (pa.string(), ["a", "b"], pa.large_string(), ["c", "d"]),
    "text and bytes": (pa.string(), ["a", "b"], pa.binary(), [b"c", b"d"]),
    "text and a dictionary": (pa.string(), ["a", "b"], pa.dictionary(pa.int32(), pa.string()), ["c", "d"]),
    "words and numbers": (pa.string(), ["a", "b"], pa.int64(), [7, 8]),
}


@pytest.mark.parametrize("kind", WIDE)
def test_lawful_widening_keeps_keys_apart_in_both_orders(tmp_path: Path, kind: str) -> None:
    one, of_first, other, of_second = WIDE[kind]
    files = [
        ("parquet", events(user, i=pa.array([keys[0], keys[1], keys[1], keys[0]], stored)))
        for user, (stored, keys) in enumerate(((one, of_first), (other, of_second)))
    ]
    found = both_orders(tmp_path, files)
    by_user = {row["user_id"]: row["history_item_id"] + row["candidate_item_id"] for row in found}
    read = [key.decode() if isinstance(key, bytes) else key for key in of_second]
    read = [str(key) for key in read] if kind == "words and numbers" else read
    assert by_user == {user: [a, b, b, a] for user, (a, b) in enumerate((of_first, read))}


MERGING = {
    "a leading zero beside numbers": (("parquet", [7, 8, 9, 10]), ("csv", ["7", "007", "8", "9"]), "line 3", "'007'"),
    "text of numbers with fractions": (
        ("parquet", [7, 8, 9, 10]),
        ("parquet", ["7", "7.0", "8", "9"]),
        "row 2",
        "'7.0'",
    ),
    "floats that may be rounded": (
        ("parquet", [1, 2, 3, 4]),
        ("parquet", [1.0, 2.0**53, 3.0, 4.0]),
        "row 2",
        "rounded",
    ),
    "fractions": (("parquet", [1, 2, 3, 4]), ("parquet", [1.0, 2.0, 2.5, 4.0]), "row 3", "'2.5'"),
}


@pytest.mark.parametrize("kind", MERGING)
@pytest.mark.parametrize("forth", [True, False])
def test_keys_that_would_be_merged_are_refused_by_file_row_and_column(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str, forth: bool
) -> None:
    (suffix, good), (other, bad), place, got = MERGING[kind]
    files = [(suffix, events(1, i=good)), (other, events(2, i=bad))]
    assert prepared(tmp_path, files if forth else files[::-1])[0] == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert f"{int(forth)}.{other}, {place}: i " in error
    assert got in error


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ([True, False, True, False], [1, 2, 3, 4]),
        ([datetime(2024, 1, day) for day in (1, 2, 3, 4)], [1, 2, 3, 4]),
        ([[1], [2], [3], [4]], [1, 2, 3, 4]),
        ([{"a": 1}] * 4, ["1", "2", "3", "4"]),
    ],
)
def test_types_without_a_common_one_are_refused_before_a_row_is_read(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
    one: list[Any],
    other: list[Any],
) -> None:
    caplog.set_level(logging.INFO)
    for name, values in (("forth", (one, other)), ("back", (other, one))):
        files = [("parquet", events(user, i=each)) for user, each in enumerate(values)]
        assert prepared(tmp_path, files, name=name)[0] == 1
        assert ".parquet stores i as" in capsys.readouterr().err.splitlines()[-1]
    assert "reading" not in caplog.text


def test_a_log_says_the_same_in_every_format(tmp_path: Path) -> None:
    kinds = ("parquet", "csv", "jsonl")
    words = events("ann", i=["x", "y", "z", "x"], land=["de"] * 4, dwell=[1.5, None, 2.0, 3.0])
    options = ("--context-columns", "land", "--history-columns", "dwell")
    found = []
    for kind in kinds:
        status, out = prepared(tmp_path, [(kind, words)], *options, name=kind)
        assert status == 0
        found.append(str(content(out)))
    assert len(set(found)) == 1
    assert "1.5, nan, 2.0" in found[0]


MISSING = {
    "null": ("parquet", None),
    "NaN": ("parquet", math.nan),
    "empty text": ("parquet", ""),
    "blank text": ("parquet", "  "),
    "text NaN": ("parquet", "NaN"),
    "text NaT": ("parquet", "NaT"),
    "empty field": ("csv", ""),
    "NaN in CSV": ("csv", "nan"),
    "null in CSV": ("csv", "NULL"),
    "null in JSON": ("jsonl", None),
}


@pytest.mark.parametrize("spelling", MISSING)
@pytest.mark.parametrize("column", ["u", "i", "t", "like"])
def test_a_missing_id_time_or_label_is_refused_in_every_spelling(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], spelling: str, column: str
) -> None:
    suffix, value = MISSING[spelling]
    values = events(1)[column]
    mixed = [str(each) if isinstance(value, str) else float(each) if value else each for each in values]
    columns = events(1, **{column: [*mixed[:2], value, mixed[3]]})
    assert prepared(tmp_path, [(suffix, columns)])[0] == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    place = {"csv": "line 4", "jsonl": "line 3"}.get(suffix, "row 3")
    assert f"0.{suffix}, {place}: " in error
    assert f"{column} must" in error


@pytest.mark.parametrize("spelling", MISSING)
def test_a_missing_feature_is_absent_in_every_spelling(tmp_path: Path, spelling: str) -> None:
    suffix, value = MISSING[spelling]
    texts = isinstance(value, str)
    land = ["de", "fr", value, "de"] if texts or value is None else [49.0, 33.0, value, 49.0]
    dwell = [value, "2.5", "3.5", "4.5"] if texts else [value, 2.5, 3.5, 4.5]
    options = ("--context-columns", "land", "--history-columns", "dwell")
    status, out = prepared(tmp_path, [(suffix, events(1, land=land, dwell=dwell))], *options)
    assert status == 0
    [row] = rows_of(out, "eval")
    assert keys_of(out, "land")[row["land"]] == land[1]
    assert math.isnan(row["history_dwell"][0])
    assert row["history_dwell"][1:] == [2.5, 3.5]
    only = ("csv", "") if suffix == "csv" else ("parquet", None)
    status, out = prepared(tmp_path, [(only[0], events(1, land=[only[1]] * 4))], *options[:2], name="none")
    assert status == 0
    assert [row["land"] for row in rows_of(out, "eval")] == [0]


def test_a_column_without_values_in_one_file_is_no_disagreement(tmp_path: Path) -> None:
    floats = events(2, land=pa.array([math.nan] * 4, pa.float64()))
    found = both_orders(
        tmp_path, [("parquet", events(1, land=["de"] * 4)), ("parquet", floats)], "--context-columns", "land"
    )
    assert {row["user_id"]: row["land"] for row in found} == {1: 1, 2: 0}


def test_a_file_without_rows_says_nothing_of_types_and_columns(tmp_path: Path) -> None:
    whole = [("parquet", events(1, u=["007"] * 4))]
    expected = content(prepared(tmp_path, whole, name="whole")[1])
    # What is written where there was nothing to write: no column, few, or those of other types.
    for number, types in enumerate(
        ({}, {"u": pa.string()}, {**dict.fromkeys("uit", pa.date32()), "like": pa.string()})
    ):
        nothing = pa.table({name: pa.array([], kind) for name, kind in types.items()})
        status, out = prepared(tmp_path, [*whole, ("parquet", nothing)], name=f"out-{number}")
        assert status == 0
        assert content(out) == expected


BAD = events(2, u=[2, None, 2, 2], i=[2, 3, None, 5], like=[1, 0, 1, 7])


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_rows_left_out_on_purpose_are_counted_by_kind(tmp_path: Path, suffix: str) -> None:
    files = [(suffix, events(1)), (suffix, BAD), (suffix, events(3))]
    status, out = prepared(
        tmp_path, files, "--skip-invalid", "--where", "u IS NULL OR u::INT <> 3", "--min-history", "0"
    )
    assert status == 0
    info = json.loads((out / "dataset.json").read_text())
    assert info["left_out"] == {
        "u must not be missing": 1,
        "i must not be missing": 1,
        "label like must be 0 or 1": 1,
        "where": 4,
    }
    assert info["statistics"]["events"] == 5
    users = {str(row["user_id"]) for row in content(out)}
    assert users == {"1", "2"}


def test_lines_that_are_no_rows_are_left_out_and_counted_only_on_purpose(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    lines = ["u,i,t,like", *(f"1,{item},{HOUR + each},1" for item, each in enumerate(OFFSETS)), "1,2", "1,2,3,4,5"]
    write_lines(tmp_path / "in" / "log.csv", lines)
    options = (*COLUMNS, *SPLIT)
    assert prepare("event_log", tmp_path / "in", tmp_path / "out", *options) == 1
    assert "log.csv, line 6: Expected Number of Columns" in capsys.readouterr().err
    assert prepare("event_log", tmp_path / "in", tmp_path / "out", *options, "--skip-invalid") == 0
    left_out = json.loads((tmp_path / "out" / "dataset.json").read_text())["left_out"]
    assert left_out == {"line that is no row: missing columns": 1, "line that is no row: too many columns": 1}
    assert "1 row(s) left out: line that is no row: missing columns" in caplog.text


@pytest.mark.parametrize("where", ["nothing = 1", "1 = ", "1 = 1); DROP TABLE raw; --", "u +"])
def test_a_condition_that_is_none_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str], where: str) -> None:
    assert prepared(tmp_path, [("parquet", events(1))], "--where", where)[0] == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: --where ")


def test_what_is_no_data_is_not_read(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    source = tmp_path / "in"
    lines = ["u,i,t,like", *(f"1,{item},{HOUR + each},1" for item, each in enumerate(OFFSETS))]
    write_lines(source / "log.csv", lines)
    with gzip.open(source / "log.csv.gz", "wt") as file:
        file.write("\n".join(lines) + "\n")
    for name in ("_SUCCESS.csv", ".hidden.csv", "_temporary/0/part.csv", ".git/part.csv", "readme.json", "log.txt"):
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        write_lines(source / name, ["not", "data"])
    for name in ("_day=1/part.csv", "land=de/a.csv"):
        (source / name).parent.mkdir()
        write_lines(source / name, [line.replace("1,", f"{name},", 1) for line in lines])
    assert prepare("event_log", source, tmp_path / "out", *COLUMNS, *SPLIT) == 0
    assert json.loads((tmp_path / "out" / "dataset.json").read_text())["statistics"]["events"] == 12
    assert "log.csv.gz is not read: log.csv is the same file" in caplog.text


def test_folders_of_keys_and_values_are_columns(tmp_path: Path) -> None:
    for land in ("de", "fr", "__HIVE_DEFAULT_PARTITION__"):
        folder = tmp_path / "in" / f"land={land}"
        folder.mkdir(parents=True)
        pq.write_table(pa.table(events(land)), folder / "part.parquet")
    options = (*COLUMNS, *SPLIT, "--context-columns", "land")
    assert prepare("event_log", tmp_path / "in", tmp_path / "out", *options) == 0
    known = {"__HIVE_DEFAULT_PARTITION__": None, "de": "de", "fr": "fr"}
    lands = keys_of(tmp_path / "out", "land")
    assert {row["user_id"]: lands.get(row["land"]) for row in content(tmp_path / "out")} == known
    # A delivery may be one of the folders itself.
    assert prepare("event_log", tmp_path / "in" / "land=fr", tmp_path / "one", *options) == 0
    assert keys_of(tmp_path / "one", "land") == {1: "fr"}


def test_rows_delivered_twice_are_counted_and_can_be_dropped(tmp_path: Path) -> None:
    files = [("parquet", events(1)), ("csv", events(1)), ("parquet", events(2))]
    for options, number in (((), 12), (("--drop-duplicates",), 8)):
        status, out = prepared(tmp_path, files, *options, name=f"out{number}")
        assert status == 0
        info = json.loads((out / "dataset.json").read_text())
        assert info["duplicates"] == {"rows": 4, "dropped": bool(options)}
        assert info["statistics"]["events"] == number


def test_the_user_column_may_be_context(tmp_path: Path) -> None:
    write_lines(
        tmp_path / "in" / "log.csv",
        ["user_id,i,t,like", *(f"{user},2,{HOUR + each},1" for user in "ab" for each in OFFSETS)],
    )
    options = ["--user-column", "user_id", *COLUMNS[2:], *SPLIT, "--context-columns", "user_id"]
    assert prepare("event_log", tmp_path / "in", tmp_path / "out", *options) == 0
    assert json.loads((tmp_path / "out" / "dataset.json").read_text())["sample"].keys() == {"user_id"}
    assert read_back(tmp_path / "out") == 4


def test_names_in_quotes_and_names_that_are_alike(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = ['"u","i","t, in s","like"', *(f"1,2,{HOUR + each},1" for each in OFFSETS)]
    write_lines(tmp_path / "in" / "log.csv", lines)
    options = [*COLUMNS, *SPLIT]
    options[options.index("t")] = "t, in s"
    assert prepare("event_log", tmp_path / "in", tmp_path / "out", *options) == 0
    lines[0] = 'u , "i", "t, in s" , like'
    write_lines(tmp_path / "in" / "log.csv", lines)
    assert prepare("event_log", tmp_path / "in", tmp_path / "spaced", *options) == 0
    write_lines(tmp_path / "in" / "log.csv", ["", *lines])
    assert prepare("event_log", tmp_path / "in", tmp_path / "blank", *options) == 1
    assert "log.csv: line 1 is blank, a header line was expected" in capsys.readouterr().err
    for names in (["u", "u", "i", "t", "like"], ["u", "U", "i", "t", "like"]):
        arrays = [pa.array(values) for values in ([1] * 4, [2] * 4, *list(events(1).values())[1:])]
        folder = tmp_path / f"{names[1]}2"
        folder.mkdir()
        pq.write_table(pa.table(arrays, names=names), folder / "log.parquet")
        assert prepare("event_log", folder, tmp_path / "no", *COLUMNS, *SPLIT) == 1
        assert "log.parquet has several columns u, in large or small letters" in capsys.readouterr().err


def test_an_object_is_no_id(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    row = {key: values[0] for key, values in events(1).items()}
    write_lines(tmp_path / "in" / "log.jsonl", [json.dumps({**row, "i": {"id": 7}})])
    assert prepare("event_log", tmp_path / "in", tmp_path / "out", *COLUMNS) == 1
    assert (
        'stores i as STRUCT("id" VARCHAR), which cannot be an id; name a field of it, OBJECT.FIELD'
        in capsys.readouterr().err
    )


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_lines_may_end_in_any_way(tmp_path: Path, end: str) -> None:
    (tmp_path / "in").mkdir()
    lines = ["\ufeffu,i,t,like", *(f"1,{item},{HOUR + each},1" for item, each in enumerate(OFFSETS)), ""]
    (tmp_path / "in" / "log.csv").write_bytes(end.join(lines).encode())
    assert prepare("event_log", tmp_path / "in", tmp_path / "out", *COLUMNS, *SPLIT) == 0
    assert set(keys_of(tmp_path / "out", "item").values()) == {"0", "1", "2", "3"}


def test_uuids_are_text(tmp_path: Path) -> None:
    keys = [uuid.UUID(int=number << 64) for number in (3, 1, 2, 4)]
    stored = pa.array([key.bytes for key in keys], pa.uuid())
    files = [("parquet", events(1, i=stored)), ("csv", events(2, i=[str(key) for key in keys]))]
    assert both_orders(tmp_path, files)
    assert keys_of(tmp_path / "forth", "item") == dict(enumerate(sorted(map(str, keys)), 1))
    capitals = [*files[:1], ("csv", events(2, i=[str(key).upper().replace("-", "") for key in keys]))]
    assert prepared(tmp_path, capitals, name="capitals")[0] == 1


def test_keys_of_attributes_may_be_stored_in_another_type(tmp_path: Path) -> None:
    schema = 'user = "u"\nitem = "i"\ntime = "t"\nactions = ["like"]\n'
    (tmp_path / "s.toml").write_text(schema + '[items]\nfiles = "items.csv"\ncolumns = { brand = "brand" }\n')
    (tmp_path / "in").mkdir()
    pq.write_table(pa.table(events(1)), tmp_path / "in" / "log.parquet")
    write_lines(tmp_path / "in" / "items.csv", ["i,brand", "2,acme", "5,best"])
    assert prepare("event_log", tmp_path / "in", tmp_path / "out", "--schema", str(tmp_path / "s.toml"), *SPLIT) == 0
    items, brands = keys_of(tmp_path / "out", "item"), keys_of(tmp_path / "out", "brand")
    found = {
        items[row["item_id"]]: brands.get(row["brand"]) for row in pq.read_table(tmp_path / "out" / "items").to_pylist()
    }
    assert found == {"2": "acme", "3": None, "4": None, "5": "best"}
