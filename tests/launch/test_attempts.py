"""The budget of failures that bring a run no further."""

from pathlib import Path

import pytest

from launch import attempts
from launch.attempts import Ending


@pytest.mark.parametrize(
    ("ends", "failures"),
    [
        ([], 0),
        ([("failed", 0)], 1),
        ([("failed", 0), ("failed", 0)], 2),
        # A newer checkpoint than before the failure: the run gets on, however often it fails.
        ([("failed", 0), ("failed", 1), ("failed", 1)], 0),
        ([("failed", 1), ("failed", 0)], 1),
        # Time limits, preemptions and lost nodes are no failures, and do not make up for one.
        ([("failed", 0), ("taken", 0), ("stopped", 0), ("taken", 0)], 1),
        ([("failed", 0), ("stopped", 1), ("failed", 0)], 1),
    ],
)
def test_failures_without_progress_are_counted(tmp_path: Path, ends: list[tuple[Ending, int]], failures: int) -> None:
    step = 10
    for ended, progress in ends:
        attempts.note(tmp_path, "a", ended=ended, reason="r", before=step, after=step + progress)
        step += progress
    assert attempts.failures_without_progress(attempts.read(tmp_path, "a")) == failures
    # A new submission has a new budget.
    assert attempts.read(tmp_path, "b") == []


def test_a_torn_line_is_no_attempt(tmp_path: Path) -> None:
    attempts.note(tmp_path, "a", ended="failed", reason="r", before=0, after=0)
    with (tmp_path / attempts.FILE).open("a") as file:
        file.write('{"submission": "a", "en')
    assert len(attempts.read(tmp_path)) == 1


@pytest.mark.parametrize(
    ("ends", "stops"),
    [
        ([("stopped", 0), ("stopped", 0)], 2),
        ([("stopped", 0), ("stopped", 1), ("stopped", 0)], 1),
        # A preemption is another matter.
        ([("stopped", 0), ("taken", 0)], 0),
        ([], 0),
    ],
)
def test_stops_before_a_new_checkpoint_are_counted(tmp_path: Path, ends: list[tuple[Ending, int]], stops: int) -> None:
    for ended, progress in ends:
        attempts.note(tmp_path, "a", ended=ended, reason="r", before=1, after=1 + progress)
    assert attempts.stops_without_progress(attempts.read(tmp_path)) == stops
