"""Rows that were looked up in training are marked on the rank that holds them; ids without one read row 0."""

from pathlib import Path

import pytest

from tests.embeddings.rows import touched_ranks
from tests.embeddings.sharded import LAYOUTS, STEPS, TABLES, global_batch
from tests.support.distributed import run_ranks


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_every_shard_knows_which_of_its_rows_all_ranks_looked_up(world_size: int, tmp_path: Path) -> None:
    """In every layout; and every rank knows of all tables which ids have no row that was trained."""
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
            shards, replaced = result[layout]
            for table, first, count, marked, cleared in shards:
                inside = {row for row in expected[table] if first <= row < first + count}
                assert marked == sorted(inside), (layout, table, first)
                assert cleared == []
                seen += 1
            for config in TABLES:
                # Plain SGD keeps nothing to know by; an unknown row that is not trained is no better than the id's own.
                trained, rows = expected[config.name], range(config.num_embeddings)
                own = (config.optimizer is not None and config.optimizer.kind == "sgd") or 0 not in trained
                for feature in config.features:
                    assert replaced[feature] == [row if own or row in trained else 0 for row in rows], (layout, feature)
            assert replaced["noise"] == [10**9]
    assert seen >= len(TABLES)
    assert 0 in expected["item"] and len(expected["item"]) < 53, "both cases are there"
