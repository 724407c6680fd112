"""One log in the forms that programs write: divided by other characters, compressed, within objects."""

import bz2
import csv
import gzip
import io
import json
import logging
import lzma
import os
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.pipelines.prepare.test_event_log import COLUMNS, keys_of
from tests.pipelines.prepare.test_log_files import SPLIT, content, events, prepared
from tests.pipelines.prepare.test_prepare import prepare, rows_of, write_lines

ITEMS = ["a,b", 'c"d', "e;f", "g|h\ti"]
"""Every character that may divide columns stands within a value, too."""
CSV = ",".join(events(1)) + "\n" + "\n".join(",".join(map(str, row)) for row in zip(*events(1).values(), strict=True))


def expected(tmp_path: Path, **columns: list[Any]) -> list[dict[str, Any]]:
    """What the same log says as Parquet."""
    status, out = prepared(tmp_path, [("parquet", events("1", **columns))], name="plain")
    assert status == 0
    return content(out)


@pytest.mark.parametrize("name", ["log.csv", "LOG.CSV", "log.tsv"])
@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
def test_the_header_says_what_divides_columns(tmp_path: Path, name: str, delimiter: str) -> None:
    (tmp_path / "in").mkdir()
    with (tmp_path / "in" / name).open("w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream, delimiter=delimiter)
        writer.writerow(["u", "i", "t", "like", "a note, or two; none|"])
        rows = zip(*events("1", i=ITEMS).values(), strict=True)
        writer.writerows([*row, "x;y,z"] for row in rows)
    assert prepare("event_log", tmp_path / "in", tmp_path / "out", *COLUMNS, *SPLIT) == 0
    assert content(tmp_path / "out") == expected(tmp_path, i=ITEMS)


def test_columns_without_a_name_are_in_nobodys_way(tmp_path: Path) -> None:
    lines = [f"{number},{line},," for number, line in enumerate(CSV.splitlines())]
    write_lines(tmp_path / "in" / "log.csv", [f",{CSV.splitlines()[0]},,", *lines[1:]])
    assert prepare("event_log", tmp_path / "in", tmp_path / "out", *COLUMNS, *SPLIT) == 0
    assert content(tmp_path / "out") == expected(tmp_path, i=[str(item) for item in events(1)["i"]])


LATER = ("--context-columns", "country", "--history-columns", "dwell")


@pytest.mark.parametrize("suffix", ["csv", "parquet", "jsonl"])
def test_a_column_that_some_files_lack_is_missing_there_and_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, suffix: str
) -> None:
    files = [events("a"), events("b", dwell=[2.5] * 4, country=["de"] * 4), events("c", dwell=[1.5] * 4)]
    empty = [(suffix, {name: [] for name in files[0]})] * (suffix == "jsonl")
    found = []
    for name, ordered in (("forth", files), ("back", files[::-1])):
        status, out = prepared(tmp_path, [*((suffix, each) for each in ordered), *empty], *LATER, name=name)
        assert status == 0
        found.append({row["user_id"]: row for row in content(out) if row["history_length"] == 3})
    assert str(found[0]) == str(found[1])
    assert {user: str(row["history_dwell"][0]) for user, row in found[0].items()} == {
        "a": "nan",
        "b": "2.5",
        "c": "1.5",
    }
    assert {user: row["country"] for user, row in found[0].items()} == {"a": 0, "b": 1, "c": 0}
    told = [record.message for record in caplog.records if record.levelname == "WARNING"]
    first = tmp_path / "forth-in" / f"0.{suffix}"
    assert f"2 of 3 file(s) lack the column country, which is missing in their rows; the first is {first}" in told
    assert f"1 of 3 file(s) lack the column dwell, which is missing in their rows; the first is {first}" in told


@pytest.mark.parametrize(
    ("wrong", "lacking"),
    [
        ({"Dwell": [1.5] * 4, "country": ["de"] * 4}, "dwell"),
        ({"dwell": [1.5] * 4, "country": ["de"] * 4, "t": None}, "t"),
        ({"dwell": [1.5] * 4, "country": ["de"] * 4, "like": None}, "like"),
    ],
)
@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_a_column_in_other_letters_and_one_that_every_event_needs_are_refused_by_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], suffix: str, wrong: dict[str, Any], lacking: str
) -> None:
    columns = {name: values for name, values in events("b", **wrong).items() if values is not None}
    files = [(suffix, events("a", dwell=[2.5] * 4, country=["de"] * 4)), (suffix, columns)]
    assert prepared(tmp_path, files, *LATER)[0] == 1
    assert f"1.{suffix} lacks the column(s) {lacking};" in capsys.readouterr().err


def test_lists_of_numbers_stay_numbers_where_a_file_has_none(tmp_path: Path) -> None:
    (tmp_path / "s.toml").write_text('user = "u"\nitem = "i"\ntime = "t"\nactions = ["like"]\n[event]\ng = ["g"]\n')
    (tmp_path / "in").mkdir()
    nulls = pa.nulls(4)
    for number, each in enumerate((events("a"), events("b", g=[[7], [8, 9], [], None]), events("c", g=nulls))):
        pq.write_table(pa.table(each), tmp_path / "in" / f"{number}.parquet")
    assert prepare("event_log", tmp_path / "in", tmp_path / "out", "--schema", str(tmp_path / "s.toml"), *SPLIT) == 0
    assert keys_of(tmp_path / "out", "g") == {1: 7, 2: 8, 3: 9}
    found = {row["user_id"]: row["history_g"] for row in content(tmp_path / "out") if row["history_length"] == 3}
    assert found == {"a": [[], [], []], "b": [[1], [2, 3], []], "c": [[], [], []]}


@pytest.mark.parametrize("suffix", ["csv", "csv.zst", "jsonl"])
def test_a_wrong_row_is_named_by_its_line_behind_blank_lines_and_values_of_several(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], suffix: str
) -> None:
    rows = list(zip(*events("1", i=["a", 'two\nlines, "so"\n', "b", "c"], like=[1, 0, 1, 7]).values(), strict=True))
    text = io.StringIO(newline="")
    if suffix == "jsonl":
        text.writelines(json.dumps(dict(zip(events(1), row, strict=True))) + "\n \n" for row in rows)
    else:
        csv.writer(text, lineterminator="\n\n").writerows([list(events(1)), *rows])
    lines = text.getvalue().split("\n")
    [wrong] = [number for number, line in enumerate(lines, 1) if line.endswith((",7", ": 7}"))]
    path = tmp_path / "in" / f"log.{suffix}"
    path.parent.mkdir()
    (_zst if suffix.endswith("zst") else lambda data, path: path.write_bytes(data))(text.getvalue().encode(), path)
    assert prepare("event_log", tmp_path / "in", tmp_path / "out", *COLUMNS) == 1
    assert f"{path}, line {wrong}: label like must be 0 or 1" in capsys.readouterr().err


def _zip(data: bytes, path: Path) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("log.csv", data)


def _zst(data: bytes, path: Path) -> None:
    with pa.output_stream(path, compression="zstd") as stream:
        stream.write(data)


COMPRESS: dict[str, Callable[[bytes, Path], object]] = {
    "gz": lambda data, path: path.write_bytes(gzip.compress(data)),
    "GZ": lambda data, path: path.write_bytes(gzip.compress(data)),
    "bz2": lambda data, path: path.write_bytes(bz2.compress(data)),
    "xz": lambda data, path: path.write_bytes(lzma.compress(data)),
    "zst": _zst,
    "zip": _zip,
}


@pytest.mark.parametrize("suffix", COMPRESS)
def test_a_log_may_be_compressed_and_what_is_damaged_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], suffix: str
) -> None:
    path = tmp_path / "in" / f"log.csv.{suffix}"
    path.parent.mkdir()
    COMPRESS[suffix](CSV.encode(), path)
    assert prepare("event_log", tmp_path / "in", tmp_path / "out", *COLUMNS, *SPLIT) == 0
    items = [str(item) for item in events(1)["i"]]
    assert content(tmp_path / "out") == expected(tmp_path, i=items)
    whole = path.read_bytes()
    for name, damaged in (("short", whole[: len(whole) * 2 // 3]), ("flipped", whole[:40] + b"\xff" * 8 + whole[48:])):
        path.write_bytes(damaged)
        assert prepare("event_log", tmp_path / "in", tmp_path / name, *COLUMNS, *SPLIT) == 1
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert error.startswith(f"error: {path}")


def test_files_that_are_not_read_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    write_lines(tmp_path / "in" / "log.csv", CSV.splitlines())
    for name in ("notes.md", "more.txt", "part-00000", "_SUCCESS", ".hidden"):
        (tmp_path / "in" / name).write_text("u,i,t,like\n")
    assert prepare("event_log", tmp_path / "in", tmp_path / "out", *COLUMNS, *SPLIT) == 0
    assert "3 file(s) of other kinds are not read: more.txt, notes.md, part-00000" in caplog.text


@pytest.mark.parametrize(
    ("mark", "kind"),
    [("_delta_log/0.json", "Delta Lake"), (".hoodie/a", "Hudi"), ("metadata/v1.metadata.json", "Iceberg")],
)
def test_a_table_with_versions_is_no_log(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], mark: str, kind: str
) -> None:
    """Its folder holds rows twice that were written again, and rows that were deleted."""
    for name, text in (("log.csv", CSV), (mark, "{}")):
        path = tmp_path / "in" / "events" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    assert prepare("event_log", tmp_path / "in", tmp_path / "out", *COLUMNS, *SPLIT) == 1
    assert f"in/events is a table of {kind}, whose files" in capsys.readouterr().err


def test_a_folder_without_a_log_says_what_it_holds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_lines(tmp_path / "in" / "log.txt", ["u,i,t,like"])
    assert prepare("event_log", tmp_path / "in", tmp_path / "out", *COLUMNS) == 1
    assert "(.xz, .gz, .bz2, .zst, .zip); it holds log.txt" in capsys.readouterr().err


NESTED = (
    *("--user-column", "who.id", "--item-column", "what.item.id", "--time-column", "t"),
    *("--action-columns", "done.like", "--context-columns", "who.land", "--history-columns", "what.dwell"),
)


def nested_rows(users: Sequence[int]) -> list[dict[str, Any]]:
    columns = events(1)
    return [
        {
            "who": {"id": user, "land": "de" if user == 1 else None},
            "what": {"item": {"id": item}, "dwell": 0.5 * item, "parts": [{"x": 1}]},
            "t": time,
            "done": {"like": like} if user == 1 else {"like": like, "share": 1},
        }
        for user in users
        for item, time, like in zip(columns["i"], columns["t"], columns["like"], strict=True)
    ]


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_fields_of_objects_are_columns(tmp_path: Path, suffix: str) -> None:
    # The second file's objects have other fields, and nothing that is known of a land.
    for number, users in enumerate(([1], [2])):
        path = tmp_path / "in" / f"{number}.{suffix}"
        path.parent.mkdir(exist_ok=True)
        rows = nested_rows(users)
        if suffix == "parquet":
            pq.write_table(pa.Table.from_pylist(rows), path)
        else:
            write_lines(path, [json.dumps(row) for row in rows])
    assert prepare("event_log", tmp_path / "in", tmp_path / "out", *NESTED, *SPLIT) == 0
    items, lands = keys_of(tmp_path / "out", "item"), keys_of(tmp_path / "out", "who_land")
    rows = rows_of(tmp_path / "out", "eval")
    assert sorted(str(lands.get(row["who_land"])) for row in rows) == ["None", "de"]
    for row in rows:
        seen = [str(items[item]) for item in row["history_item_id"]]
        assert seen == ["2", "3", "4"]
        assert row["history_what_dwell"] == [0.5 * int(item) for item in seen]
        assert row["history_action"] + row["candidate_action"] == [1, 0, 1, 0]


def test_a_field_beside_a_column_of_its_name_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{**row, "who.id": 7} for row in nested_rows([1])]
    write_lines(tmp_path / "in" / "log.jsonl", [json.dumps(row) for row in rows])
    assert prepare("event_log", tmp_path / "in", tmp_path / "out", *NESTED, *SPLIT) == 1
    assert "log.jsonl has several columns who.id" in capsys.readouterr().err


@pytest.mark.parametrize("suffix", ["csv", "csv.gz", "jsonl"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-be", "latin-1", "cp1252", "shift_jis"])
def test_text_is_read_in_the_encoding_that_is_said_or_that_it_begins_with(
    tmp_path: Path, encoding: str, suffix: str
) -> None:
    items = ["\u30a1", "\u65e5\u672c"] if encoding == "shift_jis" else ["Z\u00fcrich", "\u00df"]
    rows = [dict(zip(events(1), row, strict=True)) for row in zip(*events("1", i=items * 2).values(), strict=True)]
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    if suffix != "jsonl":
        lines = [",".join(rows[0]), *(",".join(map(str, row.values())) for row in rows)]
    content_of = "".join(f"{line}\r\n" for line in lines).encode(encoding)
    (tmp_path / "in").mkdir()
    path = tmp_path / "in" / f"log.{suffix}"
    path.write_bytes(gzip.compress(content_of) if suffix.endswith("gz") else content_of)
    said = () if encoding in ("utf-8", "utf-8-sig", "utf-16") else ("--encoding", encoding)
    assert prepare("event_log", tmp_path / "in", tmp_path / "out", *COLUMNS, *SPLIT, *said) == 0
    assert content(tmp_path / "out") == expected(tmp_path, i=items * 2)


def test_bytes_that_are_no_text_in_an_encoding_are_named_by_their_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "log.csv").write_bytes(b"u,i,t,like\n1,\xe9,3,1\n1,\x81,3,1\n")
    out = tmp_path / "out"
    assert prepare("event_log", tmp_path / "in", out, *COLUMNS, *SPLIT, "--encoding", "cp1252") == 1
    assert "log.csv, line 3: the bytes 81 are no text in cp1252: say which --encoding" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        prepare("event_log", tmp_path / "in", out, *COLUMNS, *SPLIT, "--encoding", "latin-16")
    assert "the encoding 'latin-16' is not known" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("decimal", "texts", "values"),
    [
        (",", ["1.593,81", "-12,5", "7", "1.234.567"], [1593.81, -12.5, 7, 1234567]),
        (".", ["1,593.81", "-12.5", "7", "1,234,567"], [1593.81, -12.5, 7, 1234567]),
    ],
)
def test_numbers_are_read_as_they_are_said_to_be_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], decimal: str, texts: list[str], values: list[float]
) -> None:
    source = tmp_path / "in" / "log.csv"

    def write(numbers: Sequence[str]) -> None:
        rows = zip(*events("1").values(), numbers, strict=True)
        write_lines(source, ["u;i;t;like;price", *(";".join(map(str, row)) for row in rows)])

    write(texts)
    options = (*COLUMNS, *SPLIT, "--history-columns", "price", "--decimal", decimal)
    assert prepare("event_log", tmp_path / "in", tmp_path / "out", *options) == 0
    [row] = rows_of(tmp_path / "out", "eval")
    assert row["history_price"] == values[: len(row["history_price"])]
    # What is between thousands elsewhere, or before decimals without being said so, is no guess.
    for wrong in ("1.5" if decimal == "," else "1,5", "1.23.4", "12.34,5.6", "1,2345.6"):
        write([*texts[:3], wrong])
        assert prepare("event_log", tmp_path / "in", tmp_path / "wrong", *options) == 1
        assert "line 5: price must hold finite numbers, written as" in capsys.readouterr().err


@pytest.mark.parametrize("suffix", ["parquet", "jsonl"])
def test_fields_of_lists_of_objects_are_columns_of_lists(tmp_path: Path, suffix: str) -> None:
    tags = [[{"of": {"tag": "a"}}, {"of": {"tag": "b"}}], [], [{"of": {"tag": "b"}}], [{"of": {"tag": "c"}}]]
    rows = [dict(zip([*events(1), "tags"], row, strict=True)) for row in zip(*events("1").values(), tags, strict=True)]
    (tmp_path / "in").mkdir()
    if suffix == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / "in" / "log.parquet")
    else:
        write_lines(tmp_path / "in" / "log.jsonl", [json.dumps(row) for row in rows])
    (tmp_path / "log.toml").write_text(
        'user = "u"\nitem = "i"\ntime = "t"\nactions = ["like"]\n'
        '[event]\ntags = { of = ["tag"], column = "tags.of.tag" }\n'
    )
    assert prepare("event_log", tmp_path / "in", tmp_path / "out", "--schema", str(tmp_path / "log.toml"), *SPLIT) == 0
    [row] = rows_of(tmp_path / "out", "eval")
    keys = keys_of(tmp_path / "out", "tag")
    assert [[keys[tag] for tag in each] for each in row["history_tags"]] == [["a", "b"], [], ["b"]]


@pytest.mark.parametrize("cell", ['["a","b"]', "['a', 'b']", "{a,b}", "[a]"])
def test_lists_written_as_text_are_not_cut_with_their_brackets(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], cell: str
) -> None:
    rows = [",".join(map(str, row)) for row in zip(*events("1").values(), strict=True)]
    quoted = '"' + cell.replace('"', '""') + '"'
    write_lines(
        tmp_path / "in" / "log.csv", ["u,i,t,like,tags", f'{rows[0]},"a,b"', *(f"{row},{quoted}" for row in rows[1:])]
    )
    (tmp_path / "log.toml").write_text(
        'user = "u"\nitem = "i"\ntime = "t"\nactions = ["like"]\n[event]\ntags = { of = ["tag"], separator = "," }\n'
    )
    assert prepare("event_log", tmp_path / "in", tmp_path / "out", "--schema", str(tmp_path / "log.toml"), *SPLIT) == 1
    assert "line 3: tags must hold keys with ',' between them, without brackets around" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("odd", "other"),
    [("log[12]", "log1"), ("log*", "logs"), ("log?", "log1"), ("day[1]*/log", "day1/log"), ("l'g \"%20#", "log")],
)
@pytest.mark.parametrize("suffix", ["parquet", "csv", "jsonl", "csv.gz"])
def test_a_files_name_is_no_pattern_of_others(tmp_path: Path, odd: str, other: str, suffix: str) -> None:
    """Each of two files is read once: as a pattern, the first one's name means the second."""
    rows = [
        [dict(zip(events(1), row, strict=True)) for row in zip(*events(user).values(), strict=True)] for user in "ab"
    ]
    for name, part in zip((odd, other), rows, strict=True):
        path = tmp_path / "in" / f"{name}.{suffix}"
        path.parent.mkdir(parents=True, exist_ok=True)
        if suffix == "parquet":
            pq.write_table(pa.Table.from_pylist(part), path)
        elif suffix == "jsonl":
            write_lines(path, [json.dumps(row) for row in part])
        else:
            text = "\n".join([",".join(part[0]), *(",".join(map(str, row.values())) for row in part)]) + "\n"
            path.write_bytes(gzip.compress(text.encode()) if suffix == "csv.gz" else text.encode())
    assert prepare("event_log", tmp_path / "in", tmp_path / "out", *COLUMNS, *SPLIT) == 0
    assert keys_of(tmp_path / "out", "user") == {1: "a", 2: "b"}
    assert json.loads((tmp_path / "out" / "dataset.json").read_text())["duplicates"]["rows"] == 0


def test_a_name_that_is_no_utf_8_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "in").mkdir()
    pq.write_table(pa.table(events("a")), tmp_path / "log.parquet")
    (tmp_path / "log.parquet").rename(os.fsdecode(os.fsencode(tmp_path / "in") + b"/\xff.parquet"))
    assert prepare("event_log", tmp_path / "in", tmp_path / "out", *COLUMNS, *SPLIT) == 1
    assert "is not in UTF-8: rename the file or its folder" in capsys.readouterr().err


@pytest.mark.parametrize("further", [{}, {"file_row_number": [7] * 300}, {"FILE_ROW_NUMBER": [7] * 300}])
def test_a_wrong_row_of_parquet_is_named_by_its_place(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], further: dict[str, list[int]]
) -> None:
    """Whatever the engine's threads read first, and whatever columns are called."""
    rows = {"u": ["a"] * 300, "i": ["x"] * 300, "t": [1_700_000_000] * 300, "like": [0] * 211 + [5] + [0] * 87 + [6]}
    (tmp_path / "in").mkdir()
    pq.write_table(pa.table({**rows, **further}), tmp_path / "in" / "log.parquet", row_group_size=10)
    assert prepare("event_log", tmp_path / "in", tmp_path / "out", *COLUMNS, "--threads", "4") == 1
    assert "log.parquet, row 212: label like must be 0 or 1 (2 such row(s)); got '5'" in capsys.readouterr().err
