"""Where a log is divided, and what is said where a side would stay empty, or users' first events are no candidates."""

import json
import logging
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from tests.pipelines.prepare.test_prepare import prepare, rows_of, write_lines

START = 1_700_000_000
COLUMNS = ("--user-column", "u", "--item-column", "i", "--time-column", "t", "--action-columns", "like")
ALL = ("--candidates", "1", "--eval-candidates", "1000")


def write_log(folder: Path, rows: list[tuple[str, int]]) -> None:
    """Events of (user, time)."""
    lines = [f"{user},i{number % 5},{time},{number % 2}" for number, (user, time) in enumerate(rows)]
    write_lines(folder / "log.csv", ["u,i,t,like", *lines])


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        (
            [("a", START + n) for n in range(9)],
            ("--split-time", START),
            "no train samples: no event lies before the spl",
        ),
        (
            [("a", START + n) for n in range(9)],
            ("--split-time", START + 9),
            "no eval samples: no event lies at or after",
        ),
        ([(f"u{n}", START + n) for n in range(9)], (), "has --min-history=1 events of its user before it, the longest"),
        (
            [("a", START + n) for n in range(9)],
            ("--min-history", 20),
            "in all: lower --min-history (0 takes users",
        ),
        ([("a", START)] * 9, (), f"no eval samples: no event lies at or after the split time {START + 1}, they span"),
        (
            [("a", START + n // 5) for n in range(15)],
            ("--min-candidates", 6),
            "change --min-candidates, --min-history, --s",
        ),
        (
            [("a", START + n) for n in range(9)],
            ("--leave-last", 9),
            "no user has more events than --leave-last=9, --drop",
        ),
    ],
)
def test_a_side_without_samples_says_which_rule_leaves_it_empty(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    rows: list[tuple[str, int]],
    options: tuple[object, ...],
    message: str,
) -> None:
    write_log(tmp_path / "in", rows)
    assert prepare("event_log", tmp_path / "in", tmp_path / "out", *COLUMNS, *map(str, options)) == 1
    assert message in capsys.readouterr().err


def test_a_log_of_less_than_an_hour_is_divided_at_a_second(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_log(tmp_path / "in", [(f"u{n % 3}", START + n) for n in range(100)])
    with caplog.at_level(logging.INFO):
        assert prepare("event_log", tmp_path / "in", tmp_path / "out", *COLUMNS, "--train-fraction", "0.7") == 0
    assert "100 events of 3 users, split at 2023-11-14T22:14:30 UTC" in caplog.messages
    assert json.loads((tmp_path / "out" / "dataset.json").read_text())["split_time"] == START + 70


@pytest.mark.parametrize("min_history", [0, 1, 3])
def test_each_event_with_a_history_is_a_candidate_and_the_others_are_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, min_history: int
) -> None:
    """No two events of a user are in one second."""
    generator = np.random.default_rng(min_history)
    rows = [(f"u{generator.integers(60)}", START + 7 * n) for n in range(300)]
    write_log(tmp_path / "in", rows)
    caplog.set_level(logging.WARNING)
    options = (*COLUMNS, *ALL, "--min-history", str(min_history))
    assert prepare("event_log", tmp_path / "in", tmp_path / "out", *options) == 0
    early = sum(min(count, min_history) for count in Counter(user for user, _ in rows).values())
    statistics = json.loads((tmp_path / "out" / "dataset.json").read_text())["statistics"]
    assert statistics["events_without_history"] == statistics["events_not_candidates"] == early
    found = [row for split in ("train", "eval") for row in rows_of(tmp_path / "out", split)]
    assert sum(row["num_candidates"] for row in found) == len(rows) - early
    assert min(row["history_length"] for row in found) == min_history
    assert (f"{early} of 300 events have fewer than" in caplog.text) == (early > 30)
