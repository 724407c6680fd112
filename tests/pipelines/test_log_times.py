"""Units of time in a log: one that cannot be the right one is refused, and the likely one named."""

import json
from datetime import UTC, datetime
from pathlib import Path

import pyarrow as pa
import pytest

from tests.pipelines.test_event_log import COLUMNS, HOUR
from tests.pipelines.test_log_files import OFFSETS, events, prepared
from tests.pipelines.test_prepare import prepare, write_lines


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
            assert f"--time-unit {said} right?" in error
            assert ("before 1990" in error) == (size[unit] < per_second)
            assert ("after the year 2100" in error) == (size[unit] > per_second)


def test_a_log_that_no_unit_can_be_right_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert prepared(tmp_path, [("csv", events(1, t=[1, 2, 3, 4000]))])[0] == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert "0.csv, line 2: t lies before 1990" in error
    assert "no unit makes it a time between 1990 and 2100" in error
    dates = [datetime(1985, 1, day, tzinfo=UTC) for day in (1, 2, 3, 4)]
    assert prepared(tmp_path, [("parquet", events(1, t=dates))], "--time-unit", "timestamp", name="dates")[0] == 1
    assert "0.parquet, row 1: t lies before 1990" in capsys.readouterr().err


@pytest.mark.parametrize("unit", ["ms", "us", "ns"])
def test_rows_in_another_unit_than_the_rest_and_times_of_0_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], unit: str
) -> None:
    size = {"ms": 10**3, "us": 10**6, "ns": 10**9}[unit]
    right = events(1, t=[(HOUR + each) * size for each in OFFSETS])
    for name, wrong, message in (
        ("seconds", events(2), "in s it is 2023-11-14"),
        (
            "zero",
            {**right, "u": [2] * 4, "t": [*right["t"][:3], 0]},
            "give the time of the event, or leave the row out",
        ),
    ):
        files = [("csv", right), ("csv", wrong)]
        assert prepared(tmp_path, files, "--time-unit", unit, name=name)[0] == 1
        error = capsys.readouterr().err
        assert "1.csv, line " in error
        assert "t lies before 1990" in error
        assert message in error
        status, out = prepared(tmp_path, files, "--time-unit", unit, "--skip-invalid", name=f"{name}, left out")
        assert status == 0
        left_out = json.loads((out / "dataset.json").read_text())["left_out"]
        assert left_out == {f"t lies before 1990: is --time-unit {unit} right?": 4 if name == "seconds" else 1}


def test_the_last_day_of_a_log_of_whole_days_is_for_evaluation(tmp_path: Path) -> None:
    days = [f"2024-01-{day:02d}" for day in (1, 2, 3, 4)]
    lines = [f"{user},{item},{day},{user % 2}" for user in range(3) for item, day in enumerate(days)]
    write_lines(tmp_path / "in" / "log.csv", ["u,i,t,like", *lines])
    out = tmp_path / "out"
    assert prepare("event_log", tmp_path / "in", out, *COLUMNS, "--time-unit", "timestamp") == 0
    assert json.loads((out / "dataset.json").read_text())["split_time"] == 1_704_326_400


def test_times_that_their_type_has_rounded_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    times = pa.array([float(HOUR + each) for each in OFFSETS], pa.float32())
    assert prepared(tmp_path, [("parquet", events(1, t=times))])[0] == 1
    assert "0.parquet, row 1: t is stored as FLOAT, which rounds such numbers of s" in capsys.readouterr().err
