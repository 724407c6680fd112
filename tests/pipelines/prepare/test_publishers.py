"""MovieLens, Amazon reviews and Yambda in their publishers' formats: the right labels, one clear error a wrong file."""

import json
from decimal import Decimal
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.pipelines.prepare.test_prepare import SHARED, prepare, read_back, rows_of, write_lines

ONE_RATING = "1::2::4::100"
HEADER = "user_id,parent_asin,rating,timestamp"
REVIEW = '{"reviewerID": "A1KLRMWW2FWPL4", "asin": "0000000007", "overall": 4.0, "unixReviewTime": 1000000000}'


@pytest.mark.parametrize(
    ("dataset", "files", "message"),
    [
        ("movielens", {"ml25.csv": "x"}, "must hold one ratings.dat or ratings.csv, found 0"),
        ("movielens", {"a/ratings.csv": "x", "b/ratings.csv": "x"}, "one ratings.dat or ratings.csv, found 2"),
        ("movielens", {"ratings.csv": "user,movie,rating,time\n1,2,3,4"}, "header lacks the column(s) userId, movieId"),
        ("movielens", {"ratings.csv": "userId,movieId,rating,timestamp\n1,2,6,4"}, "line 2: the rating must lie"),
        ("movielens", {"ratings.csv": "userId,movieId,rating,timestamp\n1,2,3,4\n1,2,six,4"}, "line 3: Error when"),
        ("movielens", {"ratings.csv": ""}, "ratings.csv is empty"),
        ("movielens", {"ratings.dat": ONE_RATING}, "must hold one users.dat beside ratings.dat, found 0"),
        (
            "movielens",
            {"ratings.dat": ONE_RATING + "\n1::2", "users.dat": "1::F::1::1::1"},
            "ratings.dat, line 2: Expec",
        ),
        (
            "movielens",
            {"ratings.dat": ONE_RATING, "users.dat": "1::F"},
            "users.dat, line 1: Expected Number of Columns",
        ),
        ("movielens", {"ratings.dat": ONE_RATING, "users.dat": "1::F::1::1::1\n" * 2}, "user_key 1 stands in several"),
        (
            "movielens",
            {"ratings.csv": "userId,movieId,rating,timestamp\n1,2,3,4.0\n1,2.5e0,3,4"},
            "ratings.csv, line 3: column movieId holds 2.5e0, which is no whole number of 64 bits",
        ),
        ("movielens", {"ratings.dat": ONE_RATING + "\n1::2.5::4::100"}, "line 2: column item_key holds 2.5"),
        (
            "movielens",
            {"ratings.dat": ONE_RATING, "users.dat": "1.5::F::1::1::1"},
            "users.dat, line 1: column user_key holds 1.5",
        ),
        (
            "movielens",
            {"ratings.dat": ONE_RATING + f"\n1::{2**63}::4::100"},
            f"line 2: column item_key holds {2**63}, which is no whole number of 64 bits",
        ),
        ("amazon2014", {"Books.csv": "A1,0000000007,4.0,9.5"}, "Books.csv, line 1: column time holds 9.5"),
        (
            "amazon2018",
            {"Books.json": REVIEW.replace("00}", "00.5}")},
            "line 1: column unixReviewTime holds 1000000000.5",
        ),
        ("amazon2023", {"Books.csv": HEADER + "\nA1,B1,4.0,9.5"}, "Books.csv, line 2: column timestamp holds 9.5"),
        ("amazon2014", {"Books.txt": "x"}, "holds no .csv, .json or .jsonl file"),
        (
            "amazon2014",
            {"Books.csv": "0000000007,A1KLRMWW2FWPL4,4.0,1000000000"},
            "Books.csv: most items have not the 10",
        ),
        (
            "amazon2018",
            {"Books.csv": "A1KLRMWW2FWPL4,0000000007,4.0,1000000000"},
            "Books.csv: most items have not the 10",
        ),
        ("amazon2018", {"Books.csv": HEADER + "\nA1,0000000007,4.0,10"}, "line 1: Error when converting column"),
        (
            "amazon2018",
            {"Books.jsonl": '{"user_id": "A1", "parent_asin": "B1"}'},
            "line 1: the user must not be missing",
        ),
        ("amazon2018", {"Books.json": REVIEW + "\n{'a': 1}\n" + REVIEW}, "Books.json, line 2: malformed JSON"),
        ("amazon2018", {"Books.json": REVIEW + "\n" + REVIEW.replace("4.0", '"x"')}, "Books.json, line 2: "),
        ("amazon2023", {"Books.csv": "0000000007,A1KLRMWW2FWPL4,4.0,1"}, "the header lacks the column(s) user_id"),
        ("amazon2023", {"Books.jsonl": REVIEW}, "Books.jsonl, line 1: the user must not be missing"),
        ("yambda", {"listens.parquet": "x"}, "must hold one multi_event.parquet, found 0"),
        ("yambda", {"a/multi_event.parquet": "x", "b/multi_event.parquet": "x"}, "multi_event.parquet, found 2"),
        ("yambda", {"multi_event.parquet": "PAR1, truncated"}, "multi_event.parquet is not a readable Parquet file"),
    ],
)
def test_a_wrong_renamed_or_malformed_file_is_one_clear_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], dataset: str, files: dict[str, str], message: str
) -> None:
    for name, text in files.items():
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / name).write_text(text)
    assert prepare(dataset, tmp_path / "in", tmp_path / "out") == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ")
    assert message in error
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in"]


def ratings(users: int = 12) -> list[tuple[int, int, int, int]]:
    generator = np.random.default_rng(5)
    return [
        (user, int(generator.integers(1, 50)) * 7, int(generator.integers(1, 6)), 10**9 + step * 86_400)
        for user in range(1, users)
        for step in range(30)
    ]


def check_ratings(out: Path, num_context: int) -> None:
    info = json.loads((out / "dataset.json").read_text())
    keys = {row["item_id"]: row["item_key"] for row in pq.read_table(out / "item_ids.parquet").to_pylist()}
    users = {row["user_id"]: row["user_key"] for row in pq.read_table(out / "user_ids.parquet").to_pylist()}
    assert info["spaces"]["item"]["rows"] == len(keys) + 1
    assert len(info["sample"]) == num_context
    known = {(str(user), str(item), time): rating for user, item, rating, time in ratings()}
    for row in rows_of(out, "train") + rows_of(out, "eval"):
        for item, action, time in zip(
            row["candidate_item_id"], row["candidate_action"], row["candidate_timestamp"], strict=True
        ):
            # Amazon's numbers have leading zeros.
            rating = known[str(users[row["user_id"]]), str(int(keys[item])), time]
            assert action == (0, 1, 3, 7, 15)[rating - 1]
    assert read_back(out) == sum(split["samples"] for split in info["splits"].values())


def test_movielens_1m_and_25m(tmp_path: Path) -> None:
    write_lines(tmp_path / "1m" / "ratings.dat", [f"{u}::{i}::{r}::{t}" for u, i, r, t in ratings()])
    write_lines(tmp_path / "1m" / "users.dat", [f"{u}::{'FM'[u % 2]}::25::{u % 4}::12345" for u in range(1, 12)])
    assert prepare("movielens", tmp_path / "1m", tmp_path / "out1") == 0
    check_ratings(tmp_path / "out1", 4)
    lines = ["userId,movieId,rating,timestamp", *(f"{u},{i},{r}.0,{t}" for u, i, r, t in ratings())]
    write_lines(tmp_path / "25m" / "ratings.csv", lines)
    assert prepare("movielens", tmp_path / "25m", tmp_path / "out25") == 0
    check_ratings(tmp_path / "out25", 1)


def test_amazon_editions(tmp_path: Path) -> None:
    asin = "{:010d}".format
    write_lines(tmp_path / "2014" / "ratings_Books.csv", [f"{u},{asin(i)},{r}.0,{t}" for u, i, r, t in ratings()])
    write_lines(tmp_path / "2018" / "Books.csv", [f"{asin(i)},{u},{r}.0,{t}" for u, i, r, t in ratings()])
    lines = [HEADER, *(f"{u},{asin(i)},{r}.0,{t}000" for u, i, r, t in ratings())]
    write_lines(tmp_path / "2023" / "Books.csv", lines)
    old = [
        json.dumps({"reviewerID": str(u), "asin": asin(i), "overall": r, "unixReviewTime": t, "reviewText": "a,b"})
        for u, i, r, t in ratings()
    ]
    write_lines(tmp_path / "json" / "reviews_Books_5.json", old)
    new = [
        json.dumps({"user_id": str(u), "parent_asin": asin(i), "rating": r, "timestamp": t * 1000, "text": "x"})
        for u, i, r, t in ratings()
    ]
    write_lines(tmp_path / "jsonl" / "Books.jsonl", new)
    editions = {"2014": "2014", "2018": "2018", "2023": "2023", "json": "2018", "jsonl": "2023"}
    for folder, edition in editions.items():
        assert prepare(f"amazon{edition}", tmp_path / folder, tmp_path / f"out{folder}") == 0
        check_ratings(tmp_path / f"out{folder}", 1)


def test_yambda(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    generator = np.random.default_rng(0)
    kinds = ["listen", "listen", "like", "unlike", "dislike", "undislike"]
    table = pa.table(
        {
            "uid": pa.array(np.repeat(np.arange(20), 30), pa.uint32()),
            "timestamp": pa.array(np.tile(np.arange(30) * 3600 * 5, 20), pa.uint32()),
            "item_id": pa.array(generator.integers(0, 1000, 600), pa.uint32()),
            "is_organic": pa.array(generator.integers(0, 2, 600), pa.uint8()),
            "played_ratio_pct": pa.array([60.0 if i % 6 == 0 else 10.0 if i % 6 == 1 else None for i in range(600)]),
            "track_length_seconds": pa.array([100] * 600),
            "event_type": pa.array([kinds[i % 6] for i in range(600)]),
        }
    )
    (tmp_path / "in").mkdir()
    pq.write_table(table, tmp_path / "in" / "multi_event.parquet")
    assert prepare("yambda", tmp_path / "in", tmp_path / "out") == 0
    wrong = {
        "lacks the column(s) event_type": table.drop_columns("event_type"),
        "row 1: event_type must be one of": table.set_column(6, "event_type", pa.array(["skip"] * 600)),
        "column item_id holds lists": table.set_column(2, "item_id", pa.array([[1]] * 600)),
        "row 2: column item_id holds 2.5, which is no whole number": table.set_column(
            2, "item_id", pa.array([1.0, 2.5, *[3.0] * 598])
        ),
        "row 1: column item_id holds 2.5, which": table.set_column(2, "item_id", pa.array([Decimal("2.5")] * 600)),
        "row 1: is_organic must be 0 or 1": table.set_column(3, "is_organic", pa.array([7] * 600)),
        "row 3: uid must not be negative or missing": table.set_column(
            0, "uid", pa.array([1.0, 2.0, float("nan")] + [3.0] * 597)
        ),
    }
    for message, changed in wrong.items():
        (tmp_path / "wrong").mkdir(exist_ok=True)
        pq.write_table(changed, tmp_path / "wrong" / "multi_event.parquet")
        assert prepare("yambda", tmp_path / "wrong", tmp_path / "no") == 1
        assert message in capsys.readouterr().err
    # As pandas writes whole numbers of which some are missing.
    floats = table.set_column(4, "played_ratio_pct", pa.array([60.0, 10.0, *[float("nan"), -float("nan")] * 2] * 100))
    floats = floats.set_column(0, "uid", table["uid"].cast(pa.float64()))
    pq.write_table(floats, tmp_path / "wrong" / "multi_event.parquet")
    assert prepare("yambda", tmp_path / "wrong", tmp_path / "floats") == 0
    assert rows_of(tmp_path / "floats", "train") == rows_of(tmp_path / "out", "train")
    masks = {mask & 63 for row in rows_of(tmp_path / "out", "train") for mask in row["candidate_action"]}
    assert masks == {0b11, 0b1, 0b100, 0b10000, 0b1000, 0b100000}
    assert read_back(tmp_path / "out") > 20


@pytest.mark.skipif(not (SHARED / "ml-1m").exists(), reason="MovieLens-1M, which must not be redistributed, is absent")
def test_movielens_1m_itself(tmp_path: Path) -> None:
    assert prepare("movielens", SHARED / "ml-1m", tmp_path / "out") == 0
    info = json.loads((tmp_path / "out" / "dataset.json").read_text())
    assert info["statistics"]["events"] == 1_000_209
    assert info["statistics"]["users"] == 6_040
    assert info["spaces"]["item"]["rows"] == 3_706 + 1
