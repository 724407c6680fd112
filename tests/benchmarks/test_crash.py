"""A few random faults of the many that `python -m benchmarks.crash` strikes a run with."""

from pathlib import Path

from benchmarks.crash import campaign
from tests.support.small_data import small_dataset


def test_a_run_that_is_struck_ends_like_one_that_never_was(tmp_path: Path) -> None:
    outcomes = list(campaign(tmp_path, str(small_dataset()), kills=2, ranks="2", seed=3))
    assert sum(outcome.strikes for outcome in outcomes) >= 2
