"""The made-up shop, day after day, in small: what must be equal is, and each day is scored before it is trained on."""

from pathlib import Path

import numpy as np

from benchmarks.made_up.shop import shop_days
from benchmarks.next_days import three_days


def test_a_shop_grows_and_is_a_function_of_its_seed() -> None:
    days, again = shop_days(200, 3, 0), shop_days(200, 3, 0)
    assert all(
        one.log.equals(other.log) and one.items.equals(other.items) for one, other in zip(days, again, strict=True)
    )
    skus = [set(day.items["sku"].to_pylist()) for day in days]
    assert all(new - skus[0] and new & skus[0] for new in skus[1:])
    ends = [int(np.max(day.log["at"].to_numpy())) for day in days]
    starts = [int(np.min(day.log["at"].to_numpy())) for day in days]
    assert all(end < start for end, start in zip(ends[:-1], starts[1:], strict=True))


def test_days_one_after_another_equal_the_log_and_all_days_at_once(tmp_path: Path) -> None:
    """Raises where samples differ from the log or between preparations, or losses from those of a run over all days."""
    found = three_days(tmp_path, 100, changing=False)
    assert [met["part"] for met in found["progressive"]] == ["part=00001", "part=00002"]
    assert all(met["positives/click"] > 0 for met in found["progressive"])
    assert len(found["events"]) == 3 and found["rows"]["item"] > 50
