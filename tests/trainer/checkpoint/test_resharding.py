"""Saved under any layout on any number of ranks, loaded under every other: equal element by element."""

from pathlib import Path
from typing import Any

import pytest

from tests.support.distributed import run_ranks
from tests.support.training import read_checkpoint
from tests.trainer.checkpoint import ranks

WORLD_SIZES = (1, 2, 4)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run for each layout and number of ranks, written in a process of its own and not."""
    folder = tmp_path_factory.mktemp("runs")
    for world_size in WORLD_SIZES:
        run_ranks(world_size, ranks.save_every_way, str(folder))
    return folder


def test_the_bytes_are_where_the_format_says(folder: Path) -> None:
    """An independent reader, of the format's description alone."""
    whole = ranks.expected()
    runs = sorted(folder.iterdir())
    assert len(runs) == len(ranks.LAYOUTS) * len(WORLD_SIZES)
    for run in runs:
        stored = read_checkpoint(run / "checkpoints" / "step-00000001")
        assert stored.keys() == whole.keys()
        for name, value in whole.items():
            assert stored[name].dtype == value.dtype and stored[name].equal(value), (run.name, name)


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_any_layout_loads_every_other(folder: Path, world_size: int) -> None:
    results: list[dict[Any, Any]] = run_ranks(world_size, ranks.load_every_way, str(folder))
    for result in results:
        assert len(result) == len(ranks.LAYOUTS) ** 2 * len(WORLD_SIZES)
        assert set(map(str, result.values())) == {"(1, [])"}, result
