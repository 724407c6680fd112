"""Units of time in a log: one that cannot be the right one is refused, and the likely one named."""

import json
import re
from datetime import UTC, datetime, timedelta, timezone
from decimal import Decimal
from pathlib import Path

import pyarrow as pa
import pytest

from tests.pipelines.prepare.test_event_log import COLUMNS, HOUR
from tests.pipelines.prepare.test_log_files import OFFSETS, content, events, prepared
from tests.pipelines.prepare.test_prepare import prepare, rows_of, write_lines

PER_SECOND = {"s": 1, "ms": 10**3, "us": 10**6, "ns": 10**9}


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
@pytest.mark.parametrize("unit", ["s", "ms", "us", "ns"])
def test_a_unit_of_time_that_cannot_be_is_refused_with_the_likely_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], suffix: str, unit: str
) -> None:
    columns = events(1, t=[(HOUR + each) * PER_SECOND[unit] for each in OFFSETS])
    for said, per_second in PER_SECOND.items():
        status, _ = prepared(tmp_path, [(suffix, columns)], "--time-unit", said, name=said)
        error = capsys.readouterr().err
        if said == unit:
            assert status == 0
        else:
            assert status == 1
            assert f"in {unit} it is 2023-11-14: give that --time-unit" in error
            assert f"--time-unit {said} right?" in error
            assert ("before 1990" in error) == (PER_SECOND[unit] < per_second)
            assert ("after the year 2100" in error) == (PER_SECOND[unit] > per_second)


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
    size = PER_SECOND[unit]
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
    texts = [f"{HOUR + each:.6e}" for each in OFFSETS]
    assert prepared(tmp_path, [("csv", events(1, t=texts))], name="text")[0] == 1
    assert "0.csv, line 2: t is written with an exponent and too few digits, which rounds" in capsys.readouterr().err
    whole = [f"{HOUR + each:.9E}" for each in OFFSETS]
    status, out = prepared(tmp_path, [("csv", events(1, t=whole))], name="whole")
    assert (status, content(out)) == (0, content(prepared(tmp_path, [("csv", events(1))], name="plain")[1]))


FRACTIONS = (750_001, 500_000, 500_001, 250_000)
"""Microseconds behind one second."""


@pytest.mark.parametrize("unit", ["s", "ms", "us"])
@pytest.mark.parametrize("stored", ["csv", "jsonl", "double", "decimal"])
def test_fractions_of_a_unit_order_what_happens_in_a_second(tmp_path: Path, unit: str, stored: str) -> None:
    # One user within a second and once later, another as the split of the time needs one.
    micros = [*(HOUR * 10**6 + part for part in FRACTIONS), (HOUR + 4000) * 10**6]
    micros += [(HOUR + offset) * 10**6 for offset in OFFSETS]
    exact = [Decimal(each) * PER_SECOND[unit] / 10**6 for each in micros]
    kinds = {"double": pa.float64(), "decimal": pa.decimal128(30, 9)}
    times = pa.array([float(time) for time in exact] if stored == "double" else exact, kinds.get(stored))
    columns = {"u": [1] * 5 + [2] * 4, "i": list("abcdeabcd"), "like": [1] * 9}
    columns["t"] = times if stored in kinds else [str(time) for time in exact]
    status, out = prepared(tmp_path, [("parquet" if stored in kinds else stored, columns)], "--time-unit", unit)
    assert status == 0
    [row] = [row for row in content(out) if row["candidate_item_id"] == ["e"]]
    assert row["history_item_id"] == ["d", "b", "c", "a"]
    assert row["history_timestamp"] == [HOUR] * 4


@pytest.mark.parametrize(
    "pattern", ["%m/%d/%Y %H:%M", "%d.%m.%Y %H:%M:%S", "%b %d, %Y %I:%M:%S %p", "%d/%b/%Y:%H:%M:%S %z", "%y%m%d%H%M%S"]
)
def test_dates_are_read_by_the_pattern_that_is_said(tmp_path: Path, pattern: str) -> None:
    moments = [datetime(2024, month, day, 13, 40, tzinfo=UTC) for month, day in ((2, 1), (2, 3), (11, 12), (12, 31))]
    zone = timezone(timedelta(hours=-5)) if "%z" in pattern else UTC
    lines = [f'1,{item},"{at.astimezone(zone).strftime(pattern)}",1' for item, at in enumerate(moments)]
    write_lines(tmp_path / "in" / "log.csv", ["u,i,t,like", *lines])
    options = (*COLUMNS, "--time-unit", pattern, "--split-time", str(int(moments[-1].timestamp())))
    assert prepare("event_log", tmp_path / "in", tmp_path / "out", *options) == 0
    [row] = rows_of(tmp_path / "out", "eval")
    assert row["history_timestamp"] + row["candidate_timestamp"] == [int(at.timestamp()) for at in moments]


@pytest.mark.parametrize(
    ("unit", "text"),
    [
        ("timestamp", "2024-01-01T00:00:01.{nanos:09d}Z"),
        ("timestamp", "2024-01-01 05:30:01.{nanos:09d} +0530"),
        ("timestamp", "2023-12-31 16:00:01.{nanos:09d}000 -08:00"),
        ("%d.%m.%Y %H:%M:%S.%n", "01.01.2024 00:00:01.{nanos:09d}"),
    ],
)
def test_text_orders_what_happens_in_a_second_to_the_nanosecond(tmp_path: Path, unit: str, text: str) -> None:
    second = 1_704_067_201
    rows = [(item, text.format(nanos=nanos)) for item, nanos in enumerate((300, 100, 999_999_999, 101))]
    later = [("last", text.format(nanos=0).replace(":01.", ":09.", 1))]
    lines = [f"1,{item},{time},1" for item, time in (*rows, *later)]
    write_lines(tmp_path / "in" / "log.csv", ["u,i,t,like", *lines])
    options = (*COLUMNS, "--time-unit", unit, "--split-time", str(second + 1), "--min-history", "0")
    assert prepare("event_log", tmp_path / "in", tmp_path / "out", *options) == 0
    [row] = [row for row in content(tmp_path / "out") if row["candidate_item_id"] == ["last"]]
    assert row["history_item_id"] == ["1", "3", "0", "2"]
    assert row["history_timestamp"] == [second] * 4
    assert row["candidate_timestamp"] == [second + 8]


@pytest.mark.parametrize(
    ("unit", "zone", "hours"),
    [
        ("timestamp", "Europe/London", 1),
        ("timestamp", "America/Argentina/Buenos_Aires", -3),
        ("timestamp", "GMT+2", 2),
        ("timestamp", "UTC", 0),
        ("%Y-%m-%d %H:%M:%S %Z", "Europe/London", 1),
        ("%Y-%m-%d %H:%M:%S %Z", "UTC", 0),
    ],
)
def test_a_zone_may_be_told_by_its_place(tmp_path: Path, unit: str, zone: str, hours: int) -> None:
    moments = [datetime(2024, 7, 1, hour, tzinfo=UTC) for hour in (12, 13, 14)]
    lines = [f"1,{item},{at + timedelta(hours=hours):%Y-%m-%d %H:%M:%S} {zone},1" for item, at in enumerate(moments)]
    write_lines(tmp_path / "in" / "log.csv", ["u,i,t,like", *lines])
    options = (*COLUMNS, "--time-unit", unit, "--split-time", str(int(moments[-1].timestamp())))
    assert prepare("event_log", tmp_path / "in", tmp_path / "out", *options) == 0
    [row] = rows_of(tmp_path / "out", "eval")
    assert row["history_timestamp"] + row["candidate_timestamp"] == [int(at.timestamp()) for at in moments]


@pytest.mark.parametrize(
    ("unit", "time", "message"),
    [
        ("timestamp", "01/02/2024", "a pattern, such as '%m/%d/%Y %H:%M' (month first) or '%d.%m.%Y %H:%M'"),
        ("timestamp", "9999-12-31", "lies after the year 2100"),
        ("timestamp", "2024-01-01 00:00:00.1234567891", "is finer than nanoseconds: write at most nine decimals"),
        ("%m/%d/%Y", "31/01/2024", "must hold dates and times like %m/%d/%Y from 1970 on"),
        ("%m/%d/%Y", "01/31/24", "must hold dates and times like %m/%d/%Y from 1970 on"),
        ("%m/%d/%Y", "", "must hold dates and times like %m/%d/%Y from 1970 on, none missing"),
        ("timestamp", "2024-07-01 12:00:00 BST", "names a zone by letters that several have"),
        ("timestamp", "2024-07-01 12:00:00 CST ", "write its distance from UTC (+01:00), UTC, GMT or its place"),
        ("%a %b %d %H:%M:%S %Z %Y", "Mon Jul 01 12:00:00 IST 2024", "names a zone by letters that several have"),
        ("timestamp", "2024-07-01T12:00:00.5+99:00", "has a distance from UTC that no zone has: write at most 18:00"),
        ("timestamp", "2024-07-01 12:00:00 -1801", "has a distance from UTC that no zone has"),
        ("timestamp", "2024-07-01 12:00+01:60", "has a distance from UTC that no zone has"),
        ("%a %b %d %H:%M:%S %z %Y", "Mon Jul 01 12:00:00 +9900 2024", "has a distance from UTC that no zone has"),
        ("timestamp", "2024-10-27 02:30:00 Europe/Berlin", "is a time that the clock of its place shows twice"),
        ("timestamp", "2024-04-07 01:30:00 Australia/Lord_Howe", "is a time that the clock of its place shows twice"),
        ("timestamp", "2024-10-27 02:30:00 Mars/Phobos", "must hold dates and times from 1970 on, none missing"),
        ("%Y %H:%M %Z %m/%d", "2024 01:59 America/New_York 11/03", "is a time that the clock of its place shows twice"),
    ],
)
def test_a_date_that_may_mean_two_things_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], unit: str, time: str, message: str
) -> None:
    write_lines(tmp_path / "in" / "log.csv", ["u,i,t,like", f"1,2,{time},1"])
    assert prepare("event_log", tmp_path / "in", tmp_path / "out", *COLUMNS, "--time-unit", unit) == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert "log.csv, line 2: t " in error
    assert message in error


@pytest.mark.parametrize(
    ("unit", "text", "moment"),
    [
        ("timestamp", "2024-07-01 12:00:00+18:00", datetime(2024, 6, 30, 18, tzinfo=UTC)),
        ("timestamp", "2024-07-01 12:00:00-12", datetime(2024, 7, 2, tzinfo=UTC)),
        ("%H:%M %m-%d-%Y %z", "12:00 12-25-2024 +0545", datetime(2024, 12, 25, 6, 15, tzinfo=UTC)),
        ("%m-%d-%Y %H:%M %z", "12-25-2099 12:00 -0330", datetime(2099, 12, 25, 15, 30, tzinfo=UTC)),
        ("timestamp", "2024-10-27 01:59:59 Europe/Berlin", datetime(2024, 10, 26, 23, 59, 59, tzinfo=UTC)),
        ("timestamp", "2024-10-27 03:00:00 Europe/Berlin", datetime(2024, 10, 27, 2, tzinfo=UTC)),
    ],
)
def test_zones_at_the_ends_of_what_they_may_be_are_read(tmp_path: Path, unit: str, text: str, moment: datetime) -> None:
    earlier = re.sub("2024|2099", "2023", text)
    write_lines(tmp_path / "in" / "log.csv", ["u,i,t,like", f'1,1,"{earlier}",1', f'1,2,"{text}",1'])
    options = (*COLUMNS, "--time-unit", unit, "--split-time", str(int(moment.timestamp())), "--min-history", "0")
    assert prepare("event_log", tmp_path / "in", tmp_path / "out", *options) == 0
    [row] = rows_of(tmp_path / "out", "eval")
    assert row["candidate_timestamp"] == [int(moment.timestamp())]


@pytest.mark.parametrize("kind", [pa.int32(), pa.int64(), pa.string()])
def test_dates_may_be_whole_numbers(tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: pa.DataType) -> None:
    days = pa.array([20240131, 20240201, 20240229, 20240301]).cast(kind)
    options = ("--time-unit", "%Y%m%d", "--split-time", str(1_709_251_200))
    status, out = prepared(tmp_path, [("parquet", events(1, t=days))], *options)
    assert status == 0
    [row] = rows_of(out, "eval")
    moments = [datetime(2024, month, day, tzinfo=UTC) for month, day in ((1, 31), (2, 1), (2, 29), (3, 1))]
    assert row["history_timestamp"] + row["candidate_timestamp"] == [int(at.timestamp()) for at in moments]
    if kind != pa.string():
        short = events(1, t=pa.array([20240131, 20240201, 2024113, 20240301], kind))
        assert prepared(tmp_path, [("parquet", short)], *options, name="short")[0] == 1
        assert "row 3: t must hold dates and times like %Y%m%d" in capsys.readouterr().err


def test_a_pattern_reads_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert prepared(tmp_path, [("parquet", events(1))], "--time-unit", "%Y-%m-%d")[0] == 1
    assert "0.parquet stores t as BIGINT, of which no pattern is needed" in capsys.readouterr().err
    assert prepared(tmp_path, [("parquet", events(1, t=[True] * 4))], name="truths")[0] == 1
    assert "0.parquet stores t as BOOLEAN, one time a row was expected" in capsys.readouterr().err
