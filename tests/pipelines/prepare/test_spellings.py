"""Users and items that a log spells in two ways, and attributes of others than its own, are refused."""

import json
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines.prepare.__main__ import main
from pipelines.storage.dataset_json import read_dataset_info
from pipelines.storage.keys import read_keys
from tests.pipelines.prepare.test_event_log import HOUR, keys_of
from tests.pipelines.prepare.test_log_files import events
from tests.pipelines.prepare.test_prepare import prepare, rows_of, write_lines

OPTIONS = ("--user-column", "u", "--item-column", "i", "--time-column", "t", "--action-columns", "like")
SPLIT = ("--split-time", str(HOUR + 3600))


def log(folder: Path, users: tuple[str, str], items: tuple[str, str]) -> Path:
    """Two files; in each another spelling of one user, who has two items, spelt in one way each."""
    for number, (user, item) in enumerate(zip(users, items, strict=True)):
        lines = [f"{user},{item},{HOUR + 100 * number + 50 * k + 5000 * (k // 2)},{k % 2}" for k in range(4)]
        write_lines(folder / f"{number}.csv", ["u,i,t,like", *lines])
    return folder


SPELLINGS = {
    "blanks": ("u7", "u7 "),
    "a blank that is not ASCII": ("u7", "\u00a0u7"),
    "a float": ("7", "7.0"),
    "an exponent": ("100000000000000000", "1e+17"),
    "composed letters": ("caf\u00e9", "cafe\u0301"),
}


@pytest.mark.parametrize("kind", SPELLINGS)
@pytest.mark.parametrize("turned", [False, True])
def test_two_spellings_of_one_user_or_item_are_refused_by_file_and_row(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str, turned: bool
) -> None:
    pair = SPELLINGS[kind][::-1] if turned else SPELLINGS[kind]
    for what, users, items in (("user", pair, ("a", "b")), ("item", ("a", "b"), pair)):
        source = log(tmp_path / what, users, items)
        assert prepare("event_log", source, tmp_path / "out", *OPTIONS, *SPLIT) == 1
        error = capsys.readouterr().err
        assert f"1.csv, line 2: the {what} {pair[1]!a} is {pair[0]!a} in " in error
        assert "0.csv, line 2" in error
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "pair", [("7.0", "8.0"), ("007", "7"), ("1e5", "100000"), ("A", "a"), (" x", " y"), ("7.50", "7.5")]
)
def test_what_may_mean_two_things_stays_two(tmp_path: Path, pair: tuple[str, str]) -> None:
    source = log(tmp_path / "in", ("a", "b"), pair)
    assert prepare("event_log", source, tmp_path / "out", *OPTIONS, *SPLIT) == 0
    assert set(keys_of(tmp_path / "out", "item").values()) == set(pair)


@pytest.mark.parametrize(("had", "now"), [("7.0", "7"), ("7", "7 "), ("\u00e9", "e\u0301")])
def test_a_key_that_an_earlier_delivery_spelt_otherwise_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], had: str, now: str
) -> None:
    out = tmp_path / "out"
    assert prepare("event_log", log(tmp_path / "in", (had, "x"), ("a", "b")), out, *OPTIONS, *SPLIT) == 0
    lines = [f"{user},a,{HOUR + 90_000 + 60 * k},{k % 2}" for k, user in enumerate(("x", "x", now, now))]
    write_lines(tmp_path / "next" / "0.csv", ["u,i,t,like", *lines])
    options = ["event_log", "--source", str(tmp_path / "next"), "--extend", str(out)]
    assert main(options) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert f"0.csv, line 4: the user {now!a} is {had!a} in an earlier delivery; spelt in two ways" in error


@pytest.mark.parametrize("kind", SPELLINGS)
def test_two_spellings_of_other_keys_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture, kind: str) -> None:
    """Of a brand they are one, of words of a query perhaps two: the column of one file had gaps, and so fractions."""

    def deliver(name: str, lands: tuple[str, ...], later: int, *options: str) -> None:
        caplog.clear()
        lines = [f"u{k % 2},i,{HOUR + later + 60 * k},{k % 2},{land}" for k, land in enumerate(lands)]
        write_lines(tmp_path / name / "0.csv", ["u,i,t,like,land", *lines])
        assert main(["event_log", "--source", str(tmp_path / name), *options]) == 0

    def told() -> str:
        return "".join(record.message for record in caplog.records if "are spelt in two ways" in record.message)

    first, second = SPELLINGS[kind]
    out, columns = str(tmp_path / "out"), (*OPTIONS, *SPLIT, "--context-columns", "land")
    deliver("in", (first, "x", first, "y") * 2, 3600 - 240, "--out", out, *columns)
    assert not told()
    deliver("next", ("x", second, "x", "z"), 90_000, "--extend", out)
    assert f"1 key(s) of the space land are spelt in two ways, as {second!a} and {first!a}: they are two ids" in told()
    # Once: what another delivery brings is as it was.
    deliver("last", (second, first, "v", "w"), 180_000, "--extend", out)
    assert not told()


def test_a_delivery_without_anyone_known_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    out = tmp_path / "out"
    assert prepare("event_log", log(tmp_path / "in", ("u1", "u2"), ("a", "b")), out, *OPTIONS, *SPLIT) == 0
    lines = [f"{user},{'ab'[k % 2]},{HOUR + 90_000 + 60 * k},{k // 2}" for k, user in enumerate((7, 8, 7, 8))]
    write_lines(tmp_path / "next" / "0.csv", ["u,i,t,like", *lines])
    assert main(["event_log", "--source", str(tmp_path / "next"), "--extend", str(out), "--min-history", "0"]) == 0
    told = [record.message for record in caplog.records if "none of the" in record.message]
    assert told == [
        "none of the 2 users of this delivery was in an earlier one: one here is '7', one there 'u1'; are they keys of "
        "one kind?"
    ]


SCHEMA = """
user = "u"
item = "i"
time = "t"
actions = ["like"]
[items]
files = "items"
columns = { price = "number" }
"""


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (["1.0", "2.0"], "items.csv, line 2: the item '1.0' is '1' in "),
        (["sku-1", "sku-2"], "its first key is 'sku-1', the log's first item is '1'; is the key the right column?"),
        ([], "it has no row"),
        (["9", "2"], None),
    ],
)
def test_attributes_are_of_the_logs_items(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], keys: list[str], message: str | None
) -> None:
    source = log(tmp_path / "in", ("a", "b"), ("1", "2"))
    write_lines(source / "items" / "items.csv", ["i,price", *(f"{key},3.5" for key in keys)])
    (tmp_path / "shop.toml").write_text(SCHEMA)
    status = prepare("event_log", source, tmp_path / "out", "--schema", str(tmp_path / "shop.toml"), *SPLIT)
    if message is None:
        assert status == 0
        assert rows_of(tmp_path / "out", "train")
    else:
        assert status == 1
        assert message in capsys.readouterr().err


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (3, 1, 0, 2), (2, 3, 1, 0)])
def test_of_rows_of_one_item_the_first_is_kept_where_wrong_rows_are_left_out(
    tmp_path: Path, order: tuple[int, ...]
) -> None:
    """Files by name, rows as they stand; the log's events are all there."""
    rows = [("a", 1.0), ("b", 2.0), ("a", 3.0), ("a", 4.0)]
    given = [rows[place] for place in order]
    source = log(tmp_path / "in", ("u1", "u2"), ("a", "b"))
    for number in (0, 1):
        part = given[2 * number : 2 * number + 2]
        write_lines(source / "items" / f"{number}.csv", ["i,price", *(f"{item},{price}" for item, price in part)])
    schema = 'user = "u"\nitem = "i"\ntime = "t"\nactions = ["like"]\n'
    schema += '[items]\nfiles = "items"\ncolumns = { price = "number" }\n'
    (tmp_path / "schema.toml").write_text(schema)
    options = ("--schema", str(tmp_path / "schema.toml"), *SPLIT)
    assert prepare("event_log", source, tmp_path / "no", *options) == 1
    assert prepare("event_log", source, tmp_path / "out", *options, "--skip-invalid") == 0
    keys = keys_of(tmp_path / "out", "item")
    table = pq.read_table(tmp_path / "out" / "items").to_pylist()
    assert {keys[row["item_id"]]: row["price"] for row in table} == dict(given[::-1])
    info = json.loads((tmp_path / "out" / "dataset.json").read_text())
    assert info["left_out"] == {"items: i stands in an earlier row, too": 2}
    assert info["statistics"]["events"] == 8


@pytest.mark.parametrize(
    ("keys", "texts"),
    [
        ([date(2024, 1, 3), date(2024, 1, 1)], ["2024-01-03", "2024-01-01"]),
        ([True, False], ["true", "false"]),
        (
            [datetime(2024, 1, 2, 5), datetime(2024, 1, 2, 3, 0, 0, 5)],
            ["2024-01-02 05:00:00", "2024-01-02 03:00:00.000005"],
        ),
        (
            [datetime(2024, 1, 2, tzinfo=UTC), datetime(2024, 1, 1, tzinfo=UTC)],
            ["2024-01-02 00:00:00+00", "2024-01-01 00:00:00+00"],
        ),
    ],
)
@pytest.mark.parametrize("space", ["", "hash = true", "unbounded = true"])
def test_ids_that_are_no_numbers_are_text_to_requests_too(
    tmp_path: Path, keys: list[Any], texts: list[str], space: str
) -> None:
    (tmp_path / "s.toml").write_text(
        'user = "u"\nitem = "i"\ntime = "t"\nactions = ["like"]\n[event]\nc = "c"\n'
        + (f"[spaces]\nc = {{ rows = 1000, {space} }}\n" if space else "")
    )
    (tmp_path / "in").mkdir()
    pq.write_table(pa.table(events(1, c=[keys[0], keys[1], None, keys[0]])), tmp_path / "in" / "0.parquet")
    pq.write_table(pa.table(events(2, c=[texts[0], texts[1], "", texts[0]])), tmp_path / "in" / "1.parquet")
    out = tmp_path / "out"
    assert prepare("event_log", tmp_path / "in", out, "--schema", str(tmp_path / "s.toml"), *SPLIT) == 0
    to_id, _ = read_keys(str(out), read_dataset_info(str(out)).spaces["c"])
    rows = [row["history_c"] for row in rows_of(out, "eval")]
    assert rows == [[to_id(texts[0]), to_id(texts[1]), 0]] * 2
    assert len({*rows[0]}) == 3
    if isinstance(keys[0], bool):
        assert [to_id(key) for key in keys] == rows[0][:2]
