"""A full checkpoint that is made in memory of the last full one and the rows touched since equals any other; whatever
is killed while it is made, nothing that counted is lost."""

import json
import multiprocessing
import signal
from pathlib import Path

import pytest
import torch

from tests.support.distributed import run_ranks
from tests.support.training import read_checkpoint
from tests.trainer.checkpoint import ranks
from trainer.checkpoint.catalogue import Catalogue
from trainer.checkpoint.store import LocalStore


def test_a_folded_checkpoint_equals_one_that_was_copied_whole(tmp_path: Path) -> None:
    copied = run_ranks(2, ranks.fold_every_way, str(tmp_path))
    for layout in ranks.LAYOUTS:
        folders = sorted((tmp_path / layout / "checkpoints").iterdir())
        bases = [json.loads((folder / "manifest.json").read_text())["base"] for folder in folders]
        # Of replicated tables nobody knows the rows: every checkpoint is full.
        assert bases == ([None] * 5 if layout == "replicated" else [None, 1, None, 3, None])
        for folder in folders:
            beside = tmp_path / f"{layout}-beside" / "checkpoints" / folder.name
            for file in folder.glob("rank-*.bin"):
                assert (beside / file.name).read_bytes() == file.read_bytes(), (layout, folder.name, file.name)
            step = int(folder.name.rpartition("-")[2])
            wanted, found = ranks.expected_after(ranks.TOUCHED, step - 1), read_checkpoint(beside)
            assert all(found[name].equal(value) for name, value in wanted.items()), (layout, step)
        by_save = torch.tensor([rank[layout] for rank in copied]).sum(0)
        if layout != "replicated":
            assert (by_save[1:] <= by_save[0] // 2).all(), "only the first one copies the whole state"


def test_a_row_that_changed_unmarked_is_found_in_the_copy_and_saved(tmp_path: Path) -> None:
    """Every row is compared within two saves here; a full checkpoint that is right follows at once."""
    run_ranks(2, ranks.miss_rows, str(tmp_path))
    runs = sorted(tmp_path.iterdir())
    assert len(runs) == 8
    for run in runs:
        right = []
        for step in (2, 3):
            folder = run / "checkpoints" / f"step-{step:08d}"
            found, wanted = read_checkpoint(folder), ranks.expected_after(ranks.TOUCHED, step - 1)
            is_full = json.loads((folder / "manifest.json").read_text())["base"] is None
            right.append(is_full and all(found[name].equal(value) for name, value in wanted.items()))
        assert any(right), run.name


FOLDING = 2 * len(ranks.expected())
"""Acts of a writer until all rows stand in their places."""
WRITING = 4
"""Acts after that."""


def test_a_writer_killed_at_any_act_is_replaced_and_the_checkpoint_is_the_same(tmp_path: Path) -> None:
    run_ranks(1, ranks.save_and_kill_writers, str(tmp_path), FOLDING + WRITING)
    for step in range(1, 2 * (FOLDING + WRITING) + 2):
        found = read_checkpoint(tmp_path / "checkpoints" / f"step-{step:08d}")
        wanted = ranks.expected_after(ranks.TOUCHED, step - 1)
        assert all(found[name].equal(value) for name, value in wanted.items()), step


@pytest.mark.parametrize("acts", [FOLDING - 1, FOLDING + WRITING - 1])
def test_a_run_killed_in_the_folding_goes_on_from_the_delta(acts: int, tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    process = context.Process(target=ranks.save_until_killed, args=(str(tmp_path), acts))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    catalogue = Catalogue(LocalStore(tmp_path / "checkpoints"))
    catalogue.clear_leftovers()
    assert [catalogue.verify(step).step for step in catalogue.steps()] == [1, 2]
    found, wanted = read_checkpoint(tmp_path / "checkpoints" / "step-00000002"), ranks.expected_after(ranks.TOUCHED, 1)
    assert all(found[name].equal(value) for name, value in wanted.items())
