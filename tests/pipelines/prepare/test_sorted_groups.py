"""Sorted rows in pieces, and what is counted of them, whatever the pieces."""

import numpy as np
import pyarrow as pa
import pytest

from pipelines.counts import group_counts
from pipelines.prepare.samples.counts import shared_totals
from pipelines.prepare.samples.sorted_groups import whole_groups


def batches(table: pa.Table, size: int) -> list[pa.RecordBatch]:
    """The rows in batches of this size, an empty one among them."""
    return [*table.slice(0, 0).combine_chunks().to_batches(), *table.to_batches(max_chunksize=size)]


def sorted_events(seed: int) -> pa.Table:
    """Events of few items at few moments, some of which only count or only ask."""
    generator = np.random.default_rng(seed)
    size = 300
    item, moment = generator.integers(4, size=size), generator.integers(9, size=size)
    order = np.lexsort((moment, item))
    event = pa.array(np.arange(size), mask=generator.random(size) < 0.2)
    columns = {"key": item[order], "moment": moment[order], "event": event}
    return pa.table(columns | {"action": generator.integers(4, size=size), "counts": generator.random(size) < 0.7})


@pytest.mark.parametrize("size", [1, 3, 10, 1000])
def test_no_piece_divides_a_group_and_none_is_lost(size: int) -> None:
    table = sorted_events(0)
    pieces = list(whole_groups(batches(table, size), ("key", "moment")))
    assert pa.concat_tables(pieces).combine_chunks().equals(table)
    groups = [set(zip(*(piece[key].to_pylist() for key in ("key", "moment")), strict=True)) for piece in pieces]
    assert sum(map(len, groups)) == len(set.union(*groups))


@pytest.mark.parametrize("size", [1, 3, 10, 1000])
def test_an_item_is_counted_over_all_pieces(size: int) -> None:
    table = sorted_events(1)
    rows = table.to_pylist()
    expected = {}
    for row in rows:
        earlier = [
            each["action"]
            for each in rows
            if each["key"] == row["key"] and each["moment"] < row["moment"] and each["counts"]
        ]
        expected[row["event"]] = (len(earlier), *(sum(each >> bit & 1 for each in earlier) for bit in range(2)))
    del expected[None]
    found = {}
    pieces = whole_groups(batches(table, size), ("key", "moment"))
    for counts in shared_totals(pieces, group_counts("item", 2)):
        for event, _, *values in zip(*(column.to_pylist() for column in counts.columns), strict=True):
            found[event] = tuple(values)
    assert found == expected
