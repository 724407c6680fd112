"""Logs of JSON lines, whose writers leave out what is missing: fields, lines, whole files."""

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from pipelines.prepare.__main__ import main
from tests.pipelines.prepare.test_event_log import COLUMNS, HOUR
from tests.pipelines.prepare.test_log_files import OFFSETS, SPLIT
from tests.pipelines.prepare.test_prepare import prepare, rows_of, write_lines

OPTIONS = (*COLUMNS, *SPLIT, "--history-columns", "dwell", "--context-columns", "country")


def lines(user: str, later: int = 0, **further: Any) -> list[str]:
    return [
        json.dumps({"u": user, "i": f"i{k}", "t": HOUR + later + each, "like": k % 2, **further})
        for k, each in enumerate(OFFSETS)
    ]


def test_a_later_delivery_may_lack_what_an_earlier_one_had(tmp_path: Path) -> None:
    write_lines(tmp_path / "in" / "a.jsonl", lines("one", dwell=2.5, country="de"))
    assert prepare("event_log", tmp_path / "in", tmp_path / "out", *OPTIONS) == 0
    write_lines(tmp_path / "next" / "a.jsonl", lines("two", 86400))
    options = ["--source", str(tmp_path / "next"), "--extend", str(tmp_path / "out")]
    assert main(["event_log", *options, "--split-time", str(HOUR + 10**6)]) == 0
    added = pq.read_table(tmp_path / "out" / "train" / "part=00001").to_pylist()
    assert [row["country"] for row in added] == [0]
    assert str(added[0]["history_dwell"]) == "[nan]"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("\n".join(lines("a")), "lacks the column(s) country, dwell"),
        ("[" + ", ".join(lines("a")) + "]", "holds a list; write its objects one a line"),
        ("\n[\n" + ",\n".join(lines("a")) + "\n]\n", "holds a list; write its objects one a line"),
        ("\n \n", "hold no row"),
        ("{}\n" + "\n".join(lines("a", dwell=1, country="x")), "log.jsonl, line 1: u must not be missing"),
    ],
)
def test_what_no_file_has_and_what_is_no_json_lines_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, message: str
) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "log.jsonl").write_text(text)
    assert prepare("event_log", tmp_path / "in", tmp_path / "out", *OPTIONS) == 1
    assert message in capsys.readouterr().err


NUMBER_OR_TEXT = [{"u": "1", "c": {"x": 1}, "g": ["a", 1]}, {"u": 1, "c": {"x": "1"}, "g": [1, "a"]}]
"""What two kinds of lines say, each of the same user."""


@pytest.mark.parametrize("column", ["u", "c.x"])
def test_numbers_beside_texts_are_one_key(tmp_path: Path, column: str) -> None:
    rows = [{**NUMBER_OR_TEXT[k % 2], "i": f"i{k}", "t": HOUR + each, "like": k % 2} for k, each in enumerate(OFFSETS)]
    write_lines(tmp_path / "in" / "log.jsonl", [json.dumps(row) for row in rows])
    (tmp_path / "schema.toml").write_text(
        f'user = "{column}"\nitem = "i"\ntime = "t"\nactions = ["like"]\n[event]\ng = ["g"]\n'
    )
    options = ("--schema", str(tmp_path / "schema.toml"), *SPLIT)
    assert prepare("event_log", tmp_path / "in", tmp_path / "out", *options) == 0
    assert pq.read_table(tmp_path / "out" / "user_ids.parquet").to_pylist() == [{"user_key": "1", "user_id": 1}]
    assert pq.read_table(tmp_path / "out" / "g_ids.parquet")["g_key"].to_pylist() == ["1", "a"]


@pytest.mark.parametrize(
    ("odd", "column"),
    [
        ({"u": {"id": 1}}, "u"),
        ({"u": [1]}, "u"),
        ({"c": {"x": {"id": 1}}}, "c.x"),
        ({"g": ["a", {"name": "b"}]}, "g"),
        ({"unread": {"id": 1}}, None),
    ],
)
def test_objects_beside_values_are_no_further_keys(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], odd: dict[str, Any], column: str | None
) -> None:
    """Read as text they would be: another user, for the same one."""
    rows = [
        {"u": "1", "c": {"x": 1}, "g": ["a"], "unread": 1, "i": f"i{k}", "t": HOUR + each, "like": k % 2}
        for k, each in enumerate(OFFSETS)
    ]
    write_lines(tmp_path / "in" / "log.jsonl", [json.dumps(row) for row in [*rows[:-1], {**rows[-1], **odd}]])
    user = "c.x" if column == "c.x" else "u"
    (tmp_path / "schema.toml").write_text(
        f'user = "{user}"\nitem = "i"\ntime = "t"\nactions = ["like"]\n[event]\ng = ["g"]\n'
    )
    options = ("--schema", str(tmp_path / "schema.toml"), *SPLIT)
    assert prepare("event_log", tmp_path / "in", tmp_path / "out", *options) == (column is not None)
    if column is not None:
        assert f"Expected values of one kind in {column}, some lines have objects" in capsys.readouterr().err


def test_an_object_may_have_many_fields_that_few_lines_have(tmp_path: Path) -> None:
    """As an analytics log's properties have; the engine would take them for a dictionary, and a line for one, too."""
    rows = [
        {"u": f"u{k % 40}", "i": f"i{k % 7}", "t": HOUR + 60 * k, "like": k % 2, f"field{k % 250}": k}
        | {"p": {"price": k, f"property{k % 300}": k}, "none": None, "q": {"none": None, "tags": None}}
        for k in range(800)
    ]
    write_lines(tmp_path / "in" / "a.jsonl", [json.dumps(row) for row in rows[:799]])
    # Elsewhere there are lists of what is missing in all lines of the first file.
    write_lines(tmp_path / "in" / "b.jsonl", [json.dumps(rows[799] | {"none": ["a"], "q": {"tags": ["b", "c"]}})])
    (tmp_path / "schema.toml").write_text(
        'user = "u"\nitem = "i"\ntime = "t"\nactions = ["like"]\n'
        '[event]\nprice = { of = "number", column = "p.price" }\n'
        '[candidate]\nnone = ["none"]\ntags = { of = ["tag"], column = "q.tags" }\n'
    )
    options = ("--schema", str(tmp_path / "schema.toml"), "--no-counts", "--candidates", "1")
    assert prepare("event_log", tmp_path / "in", tmp_path / "out", *options) == 0
    found = [row for split in ("train", "eval") for row in rows_of(tmp_path / "out", split)]
    for row in found:
        [time] = row["candidate_timestamp"]
        newest = (time - HOUR) // 60
        assert row["history_price"] == [float(k) for k in range(newest % 40, newest, 40)]
        assert row["candidate_none"] == [[1] * (newest == 799)]
        assert row["candidate_tags"] == [[1, 2] * (newest == 799)]
    assert len(found) == 800 - 40


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (("dwell", "Dwell"), "has several columns dwell, in large or small letters; rename one"),
        (("Dwell", "dwell"), "has several columns dwell, in large or small letters; rename one"),
        (("Other", "other"), None),
        (("other_1", "other"), None),
        (("dwell", "dwell_1"), None),
    ],
)
def test_fields_in_large_and_small_letters_are_not_read_as_one_with_gaps(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], names: tuple[str, str], message: str | None
) -> None:
    always = {} if message is not None else {"dwell": 7}
    texts = [json.dumps(always | json.loads(line) | {names[k % 2]: 5 + k}) for k, line in enumerate(lines("a"))]
    write_lines(tmp_path / "in" / "log.jsonl", texts)
    options = (*COLUMNS, *SPLIT, "--history-columns", "dwell")
    assert prepare("event_log", tmp_path / "in", tmp_path / "out", *options) == (message is not None)
    if message is not None:
        assert message in capsys.readouterr().err


def test_fields_of_one_object_that_are_alike_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    texts = [
        json.dumps(json.loads(line) | {"p": {"ab"[k % 2] + "xX"[k // 2 % 2]: 5}}) for k, line in enumerate(lines("a"))
    ]
    write_lines(tmp_path / "in" / "log.jsonl", texts)
    assert prepare("event_log", tmp_path / "in", tmp_path / "out", *COLUMNS, *SPLIT) == 1
    assert "log.jsonl: fields of one object differ in large and small letters alone" in capsys.readouterr().err
