"""Saved under any layout on any number of ranks, loaded under every other: equal element by element."""

import json
import shutil
from math import prod
from pathlib import Path
from typing import Any

import pytest

from tests.support.distributed import run_ranks
from tests.support.training import read_checkpoint
from tests.trainer.checkpoint import ranks
from trainer.checkpoint.catalogue import Catalogue
from trainer.checkpoint.listing import list_checkpoints
from trainer.checkpoint.store import LocalStore

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
    assert len(runs) == 2 * len(ranks.LAYOUTS) * len(WORLD_SIZES)
    for run in runs:
        stored = read_checkpoint(max((run / "checkpoints").iterdir()))
        wanted = ranks.expected_after(ranks.TOUCHED) if run.name.endswith("-delta") else whole
        assert stored.keys() == wanted.keys()
        for name, value in wanted.items():
            assert stored[name].dtype == value.dtype and stored[name].equal(value), (run.name, name)


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_any_layout_loads_every_other(folder: Path, world_size: int) -> None:
    results: list[dict[Any, Any]] = run_ranks(world_size, ranks.load_every_way, str(folder))
    for result in results:
        assert len(result) == 2 * len(ranks.LAYOUTS) ** 2 * len(WORLD_SIZES)
        for (run, layout), found in result.items():
            assert found == (2 if run.endswith("-delta") else 1, []), (run, layout, found)


def test_a_delta_of_a_damaged_checkpoint_is_not_called_whole(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "row_wise-2-delta" / "checkpoints", tmp_path / "checkpoints")
    base = tmp_path / "checkpoints" / "step-00000001" / "rank-00000.bin"
    base.write_bytes(base.read_bytes()[::-1])
    lines, fine = list_checkpoints(Catalogue(LocalStore(tmp_path / "checkpoints")), verify=True)
    assert not fine
    assert "is damaged: rank-00000.bin has changed" in lines[1]
    assert "rows touched since step 1, which is not in order: nor is this one" in lines[2]


def test_a_delta_holds_the_touched_rows_alone_and_keeps_what_it_needs(folder: Path) -> None:
    """`keep=1` would delete the full one."""
    for run in sorted(folder.glob("*-delta")):
        manifests = [json.loads((path / "manifest.json").read_text()) for path in sorted(run.glob("checkpoints/*"))]
        if run.name.startswith("replicated"):
            assert [manifest["base"] for manifest in manifests] == [None], run
            continue
        assert [manifest["base"] for manifest in manifests] == [None, 1], run
        for name in ("tables/item", "tables_optimizer/item/momentum1"):
            pieces = manifests[1]["tensors"][name]["pieces"]
            # Of a shard of a few rows, all of it may take less space than those with their numbers.
            held = sum(
                piece.get("rows", {"count": piece["sizes"][0]})["count"] * prod(piece["sizes"][1:]) for piece in pieces
            )
            touched = len(ranks.TOUCHED) * (ranks.COLUMNS if name == "tables/item" else 1)
            assert touched <= held <= touched + 4 * ranks.COLUMNS
