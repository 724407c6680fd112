"""Unbounded ids are the keys of the log: whole numbers bit by bit, of everything else a hash, 0 for what is missing."""

import hashlib
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from pipelines.prepare.__main__ import main
from pipelines.storage.dataset_json import read_dataset_info
from pipelines.storage.keys import read_keys
from tests.pipelines.prepare.test_prepare import prepare, rows_of

HOUR = 1_700_000_000
SCHEMA = """
user = "who"
item = "what"
time = "when"
actions = ["buy"]
[event]
query = ["query"]
seller = "seller"
[spaces]
item = { rows = 50, unbounded = true }
query = { rows = 50, unbounded = true }
seller = { rows = 50, unbounded = true }
"""


def of_text(text: str) -> int:
    """The last eight bytes of the MD5, as a signed number."""
    digest = hashlib.md5(text.encode(), usedforsecurity=False).digest()
    return int.from_bytes(digest[8:], "little", signed=True)


def prepared(folder: Path, items: pa.Array) -> int:
    """The exit status of preparing a log of one user with these items, in `folder / "out"`."""
    count = len(items)
    log = pa.table(
        {
            "who": ["u"] * count,
            "what": items,
            "when": [HOUR + 60 * place for place in range(count)],
            "buy": [place % 2 for place in range(count)],
            "query": [["shoes", f"q{place}"] if place else [] for place in range(count)],
            "seller": pa.array([f"s{place}" if place else None for place in range(count)]),
        }
    )
    (folder / "log").mkdir(parents=True)
    pq.write_table(log, folder / "log" / "log.parquet")
    (folder / "schema.toml").write_text(SCHEMA)
    options = ("--schema", str(folder / "schema.toml"), "--no-counts", "--samples-per-user", "1", "--candidates", "2")
    return prepare("event_log", folder / "log", folder / "out", *options, "--split-time", str(HOUR + 60 * count - 90))


@pytest.mark.parametrize(
    ("kind", "keys", "ids"),
    [
        (pa.int64(), [5, 0, -7, 2**63 - 1, -(2**63) + 1], [5, -(2**63), -7, 2**63 - 1, -(2**63) + 1]),
        (pa.uint64(), [5, 0, 2**64 - 1, 2**63 + 9], [5, -(2**63), -1, -(2**63) + 9]),
        (pa.string(), ["a", "7b", "c", "d"], [of_text(key) for key in ("a", "7b", "c", "d")]),
    ],
)
def test_keys_are_the_ids(tmp_path: Path, kind: pa.DataType, keys: list[int], ids: list[int]) -> None:
    assert prepared(tmp_path, pa.array([*keys, keys[0], keys[0]], kind)) == 0
    row = max(rows_of(tmp_path / "out", "train"), key=lambda row: len(row["history_item_id"]))
    assert row["history_item_id"] + row["candidate_item_id"] == [*ids, ids[0]]
    assert row["history_query"][:2] == [[], [of_text("shoes"), of_text("q1")]]
    assert row["history_seller"][:2] == [0, of_text("s1")]
    assert not list((tmp_path / "out").glob("item_ids*"))
    # A server makes the same of them.
    space = read_dataset_info(str(tmp_path / "out")).spaces["item"]
    for each in (space, replace(space, key_kind=None)):  # data from before the kind was kept
        to_id, _ = read_keys(str(tmp_path / "out"), each)
        assert [to_id(key) for key in (*keys, None)] == [*ids, 0]
    to_id, _ = read_keys(str(tmp_path / "out"), space)
    with pytest.raises(TypeError):
        to_id(7 if isinstance(keys[0], str) else "7")


def test_a_key_is_one_id_in_all_deliveries_however_they_store_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    numbers, texts = pa.array([5, 6, 7, 5]), pa.array(["5", "6", "7", "5"])
    for first, second, status in ((numbers, texts, 1), (texts, numbers, 0), (numbers, numbers, 0)):
        folder = tmp_path / f"{first.type}-{second.type}"
        assert prepared(folder / "0", first) == 0
        # What a delivery does not hold says nothing of its kind.
        assert prepared(folder / "1", second) == 0
        log = pq.read_table(folder / "1" / "log" / "log.parquet")
        log = log.set_column(2, "when", pc.add(log["when"], 3600))
        log = log.set_column(5, "seller", pa.nulls(len(log)))
        pq.write_table(log, folder / "1" / "log" / "log.parquet")
        options = ["event_log", "--source", str(folder / "1" / "log"), "--extend", str(folder / "0" / "out")]
        assert main(options) == status
        if status:
            assert "space item: its keys are ids themselves" in capsys.readouterr().err
            continue
        rows = rows_of(folder / "0" / "out", "train/part=00001")
        seen = {item for row in rows for item in row["history_item_id"] + row["candidate_item_id"]}
        assert seen == ({of_text("5"), of_text("6"), of_text("7")} if first is texts else {5, 6, 7})


def test_whole_numbers_that_do_not_fit_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number, value in enumerate((-(2**63), 2**63)):
        kind = pa.int64() if value < 0 else pa.uint64()
        assert prepared(tmp_path / str(number), pa.array([1, value, 3], kind)) == 1
        assert "space item is unbounded, but its keys reach" in capsys.readouterr().err
