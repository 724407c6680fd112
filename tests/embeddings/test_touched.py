"""Rows that were looked up in training are marked on the rank that holds them, and no others."""

from pathlib import Path

import pytest

from tests.embeddings import touched_ranks
from tests.embeddings.sharded import LAYOUTS, STEPS, TABLES, global_batch
from tests.support.distributed import run_ranks


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_every_shard_knows_which_of_its_rows_all_ranks_looked_up(world_size: int, tmp_path: Path) -> None:
    expected = {
        table.name: {
            row for step in range(STEPS) for f in table.features for ids in global_batch(step)[f] for row in ids
        }
        for table in TABLES
    }
    results = run_ranks(world_size, touched_ranks.train_every_layout, str(tmp_path))
    seen = 0
    for layout in LAYOUTS:
        for result in results:
            for table, first, count, marked, cleared in result[layout]:
                inside = {row for row in expected[table] if first <= row < first + count}
                assert marked == sorted(inside), (layout, table, first)
                assert cleared == []
                seen += 1
    assert seen >= len(TABLES)
