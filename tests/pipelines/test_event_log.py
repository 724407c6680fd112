"""A company's own log to the prepared format: columns named on the command line, one clear error each."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pyarrow import csv

from tests.pipelines.test_prepare import prepare, read_back, rows_of, write_lines


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
    assert info["context_values"] == {"land": ["de", "fr"]}
    assert info["actions"] == ["view", "buy"]
    assert {mask for row in rows_of(tmp_path / "out", "eval") for mask in row["candidate_action"]} == {1, 2}
    assert read_back(tmp_path / "out") == sum(split["samples"] for split in info["splits"].values())
    csv.write_csv(table, tmp_path / "in" / "more.csv")
    (tmp_path / "in" / "part.parquet").unlink()
    assert prepare("event_log", tmp_path / "in", tmp_path / "out2", *options) == 0
    assert rows_of(tmp_path / "out", "train") == rows_of(tmp_path / "out2", "train")


def test_event_log_refuses_an_unknown_action(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_lines(tmp_path / "in" / "log.csv", ["u,i,t,a", "1,2,3,view", "1,2,4,sneeze"])
    options = ["--user-column", "u", "--item-column", "i", "--time-column", "t"]
    options += ["--action-columns", "a", "--action-values", "view"]
    assert prepare("event_log", tmp_path / "in", tmp_path / "out", *options) == 1
    assert "log.csv, line 3: a must be one of view" in capsys.readouterr().err


@pytest.mark.parametrize("stored", ["csv", "parquet"])
def test_event_log_refuses_a_label_that_is_not_a_number(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], stored: str
) -> None:
    table = pa.table({"u": [1, 1], "i": [2, 3], "t": [4, 5], "like": [1.0, float("nan")]})
    (tmp_path / "in").mkdir()
    (csv.write_csv if stored == "csv" else pq.write_table)(table, tmp_path / "in" / f"log.{stored}")
    options = ["--user-column", "u", "--item-column", "i", "--time-column", "t", "--action-columns", "like"]
    assert prepare("event_log", tmp_path / "in", tmp_path / "out", *options) == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ")
    assert f"log.{stored}" in error
    assert "like" in error


def test_a_context_feature_is_the_first_known_value(tmp_path: Path) -> None:
    lines = [f"1,{item},{100 + item},1,{land}" for item, land in enumerate(["", "fr", "de", "de"])]
    write_lines(tmp_path / "in" / "log.csv", ["u,i,t,like,land", *lines])
    options = ["--user-column", "u", "--item-column", "i", "--time-column", "t", "--action-columns", "like"]
    options += ["--context-columns", "land", "--split-time", "103"]
    assert prepare("event_log", tmp_path / "in", tmp_path / "out", *options) == 0
    info = json.loads((tmp_path / "out" / "dataset.json").read_text())
    [row] = rows_of(tmp_path / "out", "eval")
    assert info["context_values"]["land"][row["land"] - 1] == "fr"
