"""Units of time in a log: one that cannot be the right one is refused, and the likely one named."""

from datetime import UTC, datetime
from pathlib import Path

import pyarrow as pa
import pytest

from tests.pipelines.test_event_log import HOUR
from tests.pipelines.test_log_files import OFFSETS, events, prepared


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
@pytest.mark.parametrize("unit", ["s", "ms", "us", "ns"])
def test_a_unit_of_time_that_cannot_be_is_refused_with_the_likely_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], suffix: str, unit: str
) -> None:
    size = {"s": 1, "ms": 10**3, "us": 10**6, "ns": 10**9}
    columns = events(1, t=[(HOUR + each) * size[unit] for each in OFFSETS])
    for said, per_second in size.items():
        status, _ = prepared(tmp_path, [(suffix, columns)], "--time-unit", said, name=said)
        error = capsys.readouterr().err
        if said == unit:
            assert status == 0
        else:
            assert status == 1
            assert f"in {unit} it is 2023-11-14: give that --time-unit" in error
            assert ("before 1990" in error) == (size[unit] < per_second)
            assert (f"--time-unit {said} right?" in error) == (size[unit] > per_second)


def test_a_log_that_no_unit_can_be_right_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert prepared(tmp_path, [("csv", events(1, t=[1, 2, 3, 4000]))])[0] == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert "the log ends on 1970-01-01, before 1990" in error
    assert "no unit makes it a time between 1990 and 2100" in error
    dates = [datetime(1985, 1, day, tzinfo=UTC) for day in (1, 2, 3, 4)]
    assert prepared(tmp_path, [("parquet", events(1, t=dates))], "--time-unit", "timestamp", name="dates")[0] == 1
    assert "the log ends on 1985-01-04, before 1990" in capsys.readouterr().err


def test_times_that_their_type_has_rounded_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    times = pa.array([float(HOUR + each) for each in OFFSETS], pa.float32())
    assert prepared(tmp_path, [("parquet", events(1, t=times))])[0] == 1
    assert "0.parquet, row 1: t is stored as FLOAT, which rounds such numbers of s" in capsys.readouterr().err
