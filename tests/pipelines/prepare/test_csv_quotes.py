"""Quotes that a program did not double: rows that a CSV file's own rules would make one value are not lost."""

import csv
import json
from pathlib import Path

import pytest

from tests.pipelines.prepare.test_event_log import COLUMNS, HOUR, keys_of
from tests.pipelines.prepare.test_log_files import OFFSETS, SPLIT, content, events
from tests.pipelines.prepare.test_prepare import prepare, write_lines

NAMES = ("u", "i", "t", "like")


def write(folder: Path, place: int, delimiter: str, texts: list[str], name: str = "log.csv") -> None:
    """Rows with a further column at a place, no value of which is quoted."""
    rows = [("1", f"i{k}", str(HOUR + each), str(k % 2)) for k, each in enumerate(OFFSETS)]
    lines = [[*row[:place], text, *row[place:]] for row, text in zip([NAMES, *rows], ["q", *texts], strict=True)]
    write_lines(folder / name, [delimiter.join(line) for line in lines])


@pytest.mark.parametrize("texts", [['"red', "x", 'blue"', "y"], ['"red', 'shoes"', "x", "y"]])
@pytest.mark.parametrize("delimiter", ["\t", ",", "|"])
@pytest.mark.parametrize("place", [0, 2, 4])
def test_rows_between_two_quotes_are_not_lost(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], place: int, delimiter: str, texts: list[str]
) -> None:
    write(tmp_path / "in", place, delimiter, texts)
    assert prepare("event_log", tmp_path / "in", tmp_path / "out", *COLUMNS, *SPLIT) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert "log.csv, line 2: q begins with a quote that ends in a later line" in error
    write(tmp_path / "in", place, delimiter, ["a"] * 4, "more.csv")
    assert prepare("event_log", tmp_path / "in", tmp_path / "out", *COLUMNS, *SPLIT, "--skip-invalid") == 0
    [(what, count)] = json.loads((tmp_path / "out" / "dataset.json").read_text())["left_out"].items()
    assert (what.startswith("q begins with a quote"), count) == (True, 1)


def test_values_of_several_lines_are_values(tmp_path: Path) -> None:
    texts = ["one\ntwo, three", "a,b,c,d\ne", 'so\n"he" said', "plain"]
    (tmp_path / "in").mkdir()
    with (tmp_path / "in" / "log.csv").open("w", newline="", encoding="utf-8") as stream:
        rows = zip(*events("1", i=texts).values(), strict=True)
        csv.writer(stream).writerows([[*NAMES, "q"], *([*row, text] for row, text in zip(rows, texts, strict=True))])
    assert prepare("event_log", tmp_path / "in", tmp_path / "out", *COLUMNS, *SPLIT) == 0
    assert set(keys_of(tmp_path / "out", "item").values()) == set(texts)
    assert sum(row["num_candidates"] for row in content(tmp_path / "out")) == 3
