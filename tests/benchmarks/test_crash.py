"""A few random faults of the many that `python -m benchmarks.crash` strikes a run with."""

from pathlib import Path

import pytest

from benchmarks.crash import campaign as crash
from tests.support.small_data import small_dataset


def test_a_run_that_is_struck_ends_like_one_that_never_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    short = [setting if not setting.startswith("max_steps=") else "max_steps=48" for setting in crash.SETTINGS]
    monkeypatch.setattr(crash, "SETTINGS", tuple(short))
    outcomes = list(crash.campaign(tmp_path, str(small_dataset()), kills=2, ranks="2", seed=3))
    assert sum(outcome.strikes for outcome in outcomes) >= 2
