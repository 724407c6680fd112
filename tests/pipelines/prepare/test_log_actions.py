"""Labels of a log in the words, lists and flags that programs write."""

from datetime import date
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from tests.pipelines.prepare.test_log_files import events, prepared
from tests.pipelines.prepare.test_prepare import rows_of


def test_words_of_actions_may_be_numbers_of_any_type(tmp_path: Path) -> None:
    kinds = ([1, 2, 1, 2], [1.0, 2.0, 1.0, 2.0], ["1", "2", "1", "2"])
    files = [("parquet", events(user, like=kind)) for user, kind in enumerate(kinds)]
    for name, ordered in (("forth", files), ("back", files[::-1])):
        status, out = prepared(tmp_path, ordered, "--action-values", "1,2", name=name)
        assert status == 0
        assert [row["history_action"] + row["candidate_action"] for row in rows_of(out, "eval")] == [[1, 2, 1, 2]] * 3


WORDS = [["view"], ["buy", "view"], [], ["cart", "cart"]]


@pytest.mark.parametrize("stored", ["csv", "jsonl", "text", "list", "enum list"])
def test_a_cell_may_hold_several_words_of_actions_or_none(tmp_path: Path, stored: str) -> None:
    text = [" | ".join(words) for words in WORDS]
    suffix = stored if stored in ("csv", "jsonl") else "parquet"
    words = pa.array(WORDS, pa.list_(pa.string())) if stored in ("jsonl", "list") else text
    if stored == "enum list":
        flat = pa.array([word for each in WORDS for word in each]).dictionary_encode()
        words = pa.ListArray.from_arrays([0, 1, 3, 3, 5], flat)
    options = ["--action-values", "view,cart,buy", "--action-separator", "|"]
    status, out = prepared(tmp_path, [(suffix, events(1, like=words))], *options)
    assert status == 0
    [row] = rows_of(out, "eval")
    assert row["history_action"] + row["candidate_action"] == [0b001, 0b101, 0, 0b010]


def test_words_that_are_no_actions_are_refused_by_row(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = [("csv", events(1, like=["view", "view|sneeze", "", "view"]))]
    for name, options, message in (
        (
            "divided",
            ["--action-separator", "|"],
            "like must hold words of view, buy (1 such row(s)); got 'view|sneeze'",
        ),
        ("whole", [], "like must be one of view, buy; several in one cell need an action separator (2 such row(s))"),
    ):
        assert prepared(tmp_path, files, "--action-values", "view,buy", *options, name=name)[0] == 1
        assert f"0.csv, line 3: {message}" in capsys.readouterr().err


@pytest.mark.parametrize(
    "words", [("t", "f"), ("TRUE", "FALSE"), ("yes", "No"), ("y", "n"), ("1.0", "0"), ("1", "0.0")]
)
def test_labels_are_told_in_the_words_that_programs_write(tmp_path: Path, words: tuple[str, str]) -> None:
    yes, no = words
    status, out = prepared(tmp_path, [("csv", events(1, like=[yes, no, f" {yes}", no]))])
    assert status == 0
    [row] = rows_of(out, "eval")
    assert row["history_action"] + row["candidate_action"] == [1, 0, 1, 0]


@pytest.mark.parametrize("labels", [[[1], [0], [1], [0]], [date(2024, 1, 1)] * 4])
def test_what_cannot_be_a_label_is_refused_before_a_row_is_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], labels: list[Any]
) -> None:
    assert prepared(tmp_path, [("parquet", events(1, like=labels))])[0] == 1
    assert "but labels of 0 and 1 were expected" in capsys.readouterr().err
