"""What no delivery can be added to, what cannot be added, and extensions that end early: told at once, nothing lost."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines.prepare.__main__ import main
from pipelines.prepare.samples.stages import workspace
from pipelines.storage.dataset_json import read_dataset_info
from tests.pipelines.prepare.test_event_log import HOUR, keys_of
from tests.pipelines.prepare.test_extension import DAY, check_part, day_of, files_of, first_day, run, write_day
from tests.pipelines.prepare.test_prepare import read_back


def test_what_cannot_be_added_changes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, _ = first_day(tmp_path)
    before = files_of(out)
    late = day_of(0, [1], 8, seed=1)
    rows = day_of(1, range(4), 9)

    def error(name: str, rows: list[dict[str, Any]]) -> str:
        assert run(write_day(tmp_path / name, rows), "--extend", out) == 1
        assert files_of(out) == before
        return capsys.readouterr().err.splitlines()[-1]

    assert "when lies before the end of the parts before in" in error("late", late + rows)
    assert "label buy must be 0 or 1" in error("label", [{**rows[0], "buy": 7}, *rows[1:]])
    assert "lacks the column(s) surface" in error(
        "column", [{k: v for k, v in r.items() if k != "surface"} for r in rows]
    )
    assert run(tmp_path / "late", "--extend", out, "--skip-invalid") == 0
    info = json.loads((out / "dataset.json").read_text())
    assert info["deliveries"]["part=00001"]["left_out"]["when lies before the end of the parts before"] > 0


Edit = Callable[[Path, dict[str, Any]], None]
"""Changes a data set's folder and the content of its `dataset.json`."""


def edit_table(name: str, edit: Callable[[pa.Table], pa.Table]) -> Edit:
    def change(out: Path, info: dict[str, Any]) -> None:
        path = out / "state" / f"{name}.parquet"
        pq.write_table(edit(pq.read_table(path)), path)

    return change


def seconds(table: pa.Table) -> pa.Table:
    return table.set_column(table.schema.get_field_index("rank"), "rank", table["time"])


@pytest.mark.parametrize(
    ("edit", "options", "message"),
    [
        (edit_table("users_before", lambda table: table.drop_columns("land")), (), "lacks land: an earlier"),
        (edit_table("events_before", seconds), (), "state are no nanoseconds: an earlier version"),
        (
            edit_table("counts_user_surface_before", lambda table: table.drop_columns("value_surface")),
            (),
            "lacks value_surface: an",
        ),
        (
            lambda out, info: (out / "state" / "items_attributes_before.parquet").unlink(),
            (),
            "lacks the file: an earlier",
        ),
        (
            lambda out, info: info["options"].update(sorted_by="x"),
            (),
            "prepared the data, with sorted_by: use that one",
        ),
        (lambda out, info: info["log"].update(grid="x"), (), "described the log, by grid: use that one"),
        (
            lambda out, info: None,
            ("--no-counts",),
            "but these options count by nothing: leave out the options of counts",
        ),
        (lambda out, info: None, ("--count-columns", "surface"), "count by item, user, user_item, surface"),
        (
            lambda out, info: None,
            ("--max-history", "4"),
            "--max-history 4 has no place with --extend: the data set began",
        ),
        (lambda out, info: None, ("--min-count", "2"), "with --min-count 1, as all its parts go on"),
        (lambda out, info: None, ("--leave-last", "1"), "the data set began without --leave-last"),
        (lambda out, info: info["options"].update(max_history=9), ("--max-history", "1024"), "with --max-history 9"),
    ],
)
def test_what_nothing_can_be_added_to_is_told_before_the_log_is_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], edit: Edit, options: tuple[str, ...], message: str
) -> None:
    out, _ = first_day(tmp_path)
    info = json.loads((out / "dataset.json").read_text())
    edit(out, info)
    (out / "dataset.json").write_text(json.dumps(info))
    before = files_of(out)
    source = write_day(tmp_path / "day1", [{"no": "column of the log"}])
    try:
        status = run(source, "--extend", out, *options)
    except SystemExit as left:
        status = left.code
    error = capsys.readouterr().err
    assert status
    assert message in error
    assert error.count("error:") == 1
    assert files_of(out) == before


def test_a_data_set_from_before_an_option_goes_on_as_it_was_made(tmp_path: Path) -> None:
    out, log = first_day(tmp_path, "--no-count-user-columns")
    info = json.loads((out / "dataset.json").read_text())
    del info["options"]["count_user_columns"], info["options"]["count_columns"], info["options"]["histories"]
    (out / "dataset.json").write_text(json.dumps(info))
    rows = day_of(1, range(4), 9)
    assert run(write_day(tmp_path / "day1", rows), "--extend", out) == 0
    check_part(out, "part=00001", sorted(log + rows, key=lambda row: row["when"]), HOUR + DAY)


class Killed(BaseException):
    """Nothing catches it, as nothing catches the end of a process."""


def test_keys_that_a_killed_extension_left_do_not_keep_their_ids(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It ended before the description was written, and another delivery comes next."""
    out, log = first_day(tmp_path)
    replaced = os.replace

    def kill(source: Path, target: Path) -> None:
        if target.name == "dataset.json":
            raise Killed
        replaced(source, target)

    others = [{**row, "what": f"other {row['what']}"} for row in day_of(1, range(4), 9)]
    with monkeypatch.context() as patched, pytest.raises(Killed):
        patched.setattr(os, "replace", kill)
        run(write_day(tmp_path / "killed", others), "--extend", out)
    assert len(keys_of(out, "item")) > read_dataset_info(str(out)).spaces["item"].used - 1
    rows = day_of(1, range(4), 12)
    assert run(write_day(tmp_path / "day1", rows), "--extend", out) == 0
    assert set(keys_of(out, "item").values()) == {row["what"] for row in log + rows}
    check_part(out, "part=00001", sorted(log + rows, key=lambda row: row["when"]), HOUR + DAY)


def test_two_extensions_at_once_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, _ = first_day(tmp_path)
    source = write_day(tmp_path / "day1", day_of(1, range(4), 9))
    with workspace(out / "part"):
        before = files_of(out)
        assert run(source, "--extend", out) == 1
        assert f"{out}/.part-unfinished is in use" in capsys.readouterr().err
        assert files_of(out) == before
    assert run(source, "--extend", out) == 0


def test_what_an_ended_extension_left_is_in_nobodys_way(tmp_path: Path) -> None:
    out, log = first_day(tmp_path)
    rows = day_of(1, range(4), 9)
    (out / "train" / "part=00001").mkdir()
    (out / "train" / "part=00001" / "part-00007.parquet").write_bytes(b"torn")
    assert run(write_day(tmp_path / "day1", rows), "--extend", out) == 0
    check_part(out, "part=00001", sorted(log + rows, key=lambda row: row["when"]), HOUR + DAY)
    assert read_back(out) > 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "give --out, the folder to create, or for event_log --extend, the data set to add to"),
        (["--out", "x", "--extend", "y"], "give --out, the folder to create, or for event_log --extend"),
        (["--extend", "y", "--user-column", "u"], "--user-column has no effect with --extend"),
        (["--extend", "y", "--schema", "s.toml"], "--schema has no effect with --extend"),
        (["--extend", "y"], "y/dataset.json does not exist"),
    ],
)
def test_wrong_use_is_one_line(capsys: pytest.CaptureFixture[str], options: list[str], message: str) -> None:
    with pytest.raises(SystemExit) as left:
        main(["event_log", "--source", "in", *options])
    assert left.value.code == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert message in error


def test_a_data_set_without_state_is_not_extended(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, _ = first_day(tmp_path, "--no-state")
    assert not (out / "state").exists()
    assert run(tmp_path / "day0", "--extend", out) == 1
    assert "keeps no state to go on from: prepare it with event_log, without --no-state" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda dwell: dwell * 1000 + 5000, "half of the numbers event dwell of this delivery lie beyond 99% of those"),
        (lambda dwell: None, "event dwell is missing in every row of this delivery"),
        (lambda dwell: dwell if dwell > 30 else None, None),
    ],
)
def test_numbers_in_another_unit_than_the_first_delivery_are_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, change: Callable[[float], float | None], message: str | None
) -> None:
    out, _ = first_day(tmp_path)
    rows = [{**row, "dwell": change(row["dwell"])} for row in day_of(1, range(4), 9)]
    assert run(write_day(tmp_path / "next", rows), "--extend", out) == 0
    told = [record.message for record in caplog.records if "dwell" in record.message]
    assert len(told) == (message is not None)
    assert message is None or told[0].startswith(message)
