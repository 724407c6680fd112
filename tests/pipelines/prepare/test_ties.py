"""Events of equal times: one order, whatever files, formats and threads; that of a sequence, wherever rows stand."""

from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines.prepare.__main__ import main
from tests.pipelines.prepare.test_event_log import HOUR
from tests.pipelines.prepare.test_prepare import prepare, write_lines

OPTIONS = ("--user-column", "u", "--item-column", "i", "--time-column", "t", "--action-columns", "like")
OPTIONS += ("--context-columns", "land", "--candidates", "3", "--max-history", "20")
Rows = list[dict[str, Any]]


def tied(seed: int, since: int = HOUR) -> Rows:
    """Events of few users at few times, each with its place in the log, which neither item nor label follows."""
    generator = np.random.default_rng(seed)
    times = np.sort(generator.integers(0, 40, 600)) * 600 + since
    return [
        {
            "u": f"u{generator.integers(5)}",
            "i": f"i{generator.integers(50)}",
            "t": int(time),
            "like": int(generator.integers(2)),
            "land": f"l{generator.integers(9)}",
            "seq": 7 * place,
        }
        for place, time in enumerate(times)
    ]


def write(folder: Path, parts: list[Rows], suffix: str) -> Path:
    for number, rows in enumerate(parts):
        path = folder / f"{number:03d}.{suffix}"
        if suffix == "csv":
            write_lines(path, [",".join(rows[0]), *(",".join(map(str, row.values())) for row in rows)])
        else:
            folder.mkdir(parents=True, exist_ok=True)
            pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=37)
    return folder


def divided(rows: Rows, count: int, generator: np.random.Generator) -> list[Rows]:
    """Neighbouring rows in files of any lengths."""
    bounds = np.sort(generator.choice(np.arange(1, len(rows)), count - 1, replace=False)).tolist()
    return [rows[first:last] for first, last in zip([0, *bounds], [*bounds, len(rows)], strict=True)]


def samples(out: Path) -> list[dict[str, Any]]:
    """Everything that both splits hold, those of later parts behind."""
    paths = [path for split in ("train", "eval") for path in sorted((out / split).rglob("*.parquet"))]
    return [row for path in paths for row in pq.ParquetFile(path).read().to_pylist()]


def prepared(tmp_path: Path, days: list[Path], name: str, *options: str) -> list[dict[str, Any]]:
    """Samples of the first day, with each other day added to it."""
    out = tmp_path / name
    assert prepare("event_log", days[0], out, *OPTIONS, *options) == 0
    for day in days[1:]:
        assert main(["event_log", "--source", str(day), "--extend", str(out)]) == 0
    return samples(out)


@pytest.mark.parametrize(
    ("count", "suffix", "threads"), [(1, "csv", 2), (7, "csv", 1), (30, "parquet", 3), (2, "parquet", 4)]
)
def test_the_order_of_the_log_stands_however_its_rows_are_divided(
    tmp_path: Path, count: int, suffix: str, threads: int
) -> None:
    generator = np.random.default_rng(count)
    whole, parts = [], []
    for day in range(2):
        rows = tied(day, HOUR + day * 86_400)
        whole.append(write(tmp_path / f"whole{day}", [rows], "parquet"))
        parts.append(write(tmp_path / f"parts{day}", divided(rows, count, generator), suffix))
    expected = prepared(tmp_path, whole, "one", "--threads", "1")
    assert prepared(tmp_path, parts, "other", "--threads", str(threads)) == expected
    # Enough is tied that another order would show.
    assert len({row["t"] for row in tied(0)}) <= 40


@pytest.mark.parametrize(
    ("seed", "kind", "suffix"), [(0, int, "parquet"), (1, lambda place: f"k{place:09d}", "parquet"), (2, int, "csv")]
)
def test_a_sequence_is_the_order_wherever_rows_stand(tmp_path: Path, seed: int, kind: Any, suffix: str) -> None:
    """Numbers by their size, in text as well: 9 comes before 10."""
    generator = np.random.default_rng(seed)
    ordered, mixed = [], []
    for day in range(2):
        rows = [{**row, "seq": kind(row["seq"])} for row in tied(seed + 10 * day, HOUR + day * 86_400)]
        ordered.append(write(tmp_path / f"ordered{day}", [rows], "parquet"))
        moved = [rows[place] for place in generator.permutation(len(rows))]
        mixed.append(write(tmp_path / f"mixed{day}", divided(moved, 5, generator), suffix))
    expected = prepared(tmp_path, ordered, "one")
    assert prepared(tmp_path, mixed, "sequence", "--sequence-column", "seq") == expected
    assert prepared(tmp_path, mixed, "files") != expected


def test_a_missing_place_in_a_sequence_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write(tmp_path / "in", [[{**row, "seq": row["seq"] or None} for row in tied(0)]], "parquet")
    assert prepare("event_log", source, tmp_path / "out", *OPTIONS, "--sequence-column", "seq") == 1
    assert "000.parquet, row 1: seq must not be missing" in capsys.readouterr().err


def test_a_sequence_may_be_of_any_type(tmp_path: Path) -> None:
    """Times of a second kind, such as when a row was written."""
    rows = tied(3)
    ordered = write(tmp_path / "ordered", [rows], "parquet")
    generator = np.random.default_rng(3)
    moved = [{**rows[place], "seq": datetime.fromtimestamp(place, UTC)} for place in generator.permutation(len(rows))]
    mixed = write(tmp_path / "mixed", divided(moved, 4, generator), "parquet")
    assert prepared(tmp_path, [mixed], "sequence", "--sequence-column", "seq") == prepared(tmp_path, [ordered], "one")
