"""Frozen tables keep every bit, and so does their optimizer's state, under each sharding kind; others are trained as if
nothing were frozen."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from embeddings.config import TableConfig
from tests.embeddings import sharded
from tests.support.distributed import run_ranks

FROZEN = (
    # Every optimizer, rows of 16 bits, and a table whose width and type no trained one has.
    ("item", "city", "brand"),
    ("user", "gender", "tag"),
)


def tables(frozen: tuple[str, ...]) -> list[TableConfig]:
    """Those of the sharded tests."""
    return [replace(table, frozen=table.name in frozen) for table in sharded.TABLES]


def train_every_way(folder: str) -> dict[tuple[str, tuple[str, ...]], dict[str, Any]]:
    return {
        (layout, frozen): sharded.train(layout, Path(folder), configs=tables(frozen))
        for layout in sharded.LAYOUTS
        for frozen in ((), *FROZEN)
    }


@pytest.mark.parametrize("world_size", [1, 2])
def test_frozen_tables_keep_their_bits_and_the_others_are_trained_as_ever(world_size: int, tmp_path: Path) -> None:
    results = run_ranks(world_size, train_every_way, str(tmp_path))
    for layout in sharded.LAYOUTS:
        trained = sharded.whole([rank[layout, ()]["final"] for rank in results])
        for frozen in FROZEN:
            before = sharded.whole([rank[layout, frozen]["initial"] for rank in results])
            after = sharded.whole([rank[layout, frozen]["final"] for rank in results])
            assert before.keys() == after.keys() == trained.keys()
            for name, value in after.items():
                stays = name.split("/")[1] in frozen
                assert torch.equal(value, before[name]) == stays, (layout, frozen, name)
                assert torch.equal(value, trained[name]) != stays, (layout, frozen, name)
