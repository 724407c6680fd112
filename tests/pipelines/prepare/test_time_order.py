"""Samples sorted by time on disk: the order of a sort in memory, whatever the sizes of runs and pieces."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from pipelines.prepare.samples import time_order
from pipelines.prepare.samples.time_order import TimeOrder


def samples(count: int, latest: int) -> pa.Table:
    """Samples of random lengths, numbered as they come."""
    generator = np.random.default_rng(count)
    lens = generator.integers(0, 30, count)
    times = [[int(time), int(time) + 5] for time in generator.integers(0, latest, count)]
    columns = {"user_id": np.arange(count), "history_length": pa.array(lens, pa.int32())}
    columns |= {"num_candidates": pa.array([2] * count, pa.int32()), "candidate_timestamp": times}
    return pa.table(columns | {"history_item_id": [list(range(length)) for length in lens]})


@pytest.mark.parametrize("latest", [1, 7, 10_000])
@pytest.mark.parametrize(("run_events", "piece_events"), [(10**9, 10**9), (500, 40), (60, 1), (1, 100)])
def test_it_is_the_order_of_a_stable_sort(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, latest: int, run_events: int, piece_events: int
) -> None:
    monkeypatch.setattr(time_order, "PIECE_EVENTS", piece_events)
    table = samples(200, latest)
    order = TimeOrder(tmp_path / "runs", run_events)
    for start in range(0, 200, 9):
        order.add(table.slice(start, 9))
    found = pa.concat_tables(order.read())
    times = [row[0] for row in table["candidate_timestamp"].to_pylist()]
    expected = sorted(range(200), key=lambda place: times[place])
    assert found["user_id"].to_pylist() == expected
    assert found.equals(table.take(expected))


def test_no_samples_are_none(tmp_path: Path) -> None:
    assert list(TimeOrder(tmp_path / "runs", 100).read()) == []


def test_what_is_in_hand_does_not_grow_with_the_samples(tmp_path: Path) -> None:
    table = samples(2000, 10**6)
    order = TimeOrder(tmp_path / "runs", 3000)
    for start in range(0, 2000, 20):
        order.add(table.slice(start, 20))
    sizes = [piece.num_rows for piece in order.read()]
    assert sum(sizes) == 2000
    assert max(sizes) < 2000
