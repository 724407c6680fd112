"""What cannot be read, replaced or removed now is no damage: whole checkpoints stay where they are."""

import errno
import os
import shutil
from pathlib import Path

import pytest
import torch.distributed as dist

from tests.support.distributed import run_ranks
from tests.trainer.checkpoint import ranks
from trainer.checkpoint.catalogue import Catalogue
from trainer.checkpoint.manifest import digest
from trainer.checkpoint.progress import Progress
from trainer.checkpoint.store import LocalStore
from trainer.run.run_dir import RunDir


class _AnsweringStore(LocalStore):
    """One whose files of step 2 answer with an error, and whose folders cannot be removed."""

    def __init__(self, root: Path, number: int) -> None:
        super().__init__(root)
        self._number = number

    def read_into(self, path: str, start: int, buffer: memoryview) -> int:
        if path.startswith("step-00000002"):
            raise OSError(self._number, os.strerror(self._number), path)
        return super().read_into(path, start, buffer)

    def remove(self, folder: str) -> None:
        if folder.startswith("step-"):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), folder)
        super().remove(folder)


def _restore(store: LocalStore, run_dir: Path, back_to: int | None = None) -> tuple[int | str, list[str]]:
    """(the step that was restored, or what was said; folders)."""
    tensors = ranks.sharded(ranks.expected(), "row_wise")
    loader = ranks.checkpointer(store, RunDir(run_dir), tensors)
    found: int | str
    try:
        catalogue = Catalogue(store)
        newest = catalogue.newest() if back_to is None else catalogue.back_to(back_to)
        found = loader.restore(newest).progress.step
    except (OSError, ValueError) as error:
        found = str(error)
    loader.close()
    dist.barrier()
    return found, store.folders()


def _meet_what_is_no_damage(folder: str) -> dict[str, tuple[int | str, list[str]]]:
    """What was met -> what `_restore` returns."""
    found = {}
    for name in ("EACCES", "ESTALE", "ETIMEDOUT", "EIO", "newer", "back to a damaged one", "no folder"):
        run = Path(folder, name)
        store = LocalStore(RunDir(run).checkpoints)
        if dist.get_rank() == 0:
            shutil.copytree(Path(folder, "whole"), run)
            changed = run / "checkpoints" / "step-00000002"
            if name == "newer":
                content = (changed / "manifest.json").read_bytes().replace(b'"format": 3', b'"format": 4')
                (changed / "manifest.json").write_bytes(content)
                (changed / "COMPLETE").write_text(digest(content))
            if name == "back to a damaged one":
                file = run / "checkpoints" / "step-00000001" / "rank-00000.bin"
                file.write_bytes(file.read_bytes()[::-1])
            if name == "no folder":
                shutil.rmtree(run / "checkpoints")
                (run / "checkpoints").symlink_to(run / "nowhere")
        dist.barrier()
        if name.startswith("E"):
            store = _AnsweringStore(RunDir(run).checkpoints, getattr(errno, name))
        found[name] = _restore(store, run, back_to=1 if name.startswith("back") else None)
    return found


def test_only_what_is_damaged_is_set_aside_and_what_was_asked_for_is_not_replaced(saved: Path, tmp_path: Path) -> None:
    """A file that may not be read, a server that does not answer, and a newer version's checkpoint are as they were."""
    shutil.copytree(saved, tmp_path / "whole")
    untouched = ["step-00000001", "step-00000002"]
    for found in run_ranks(2, _meet_what_is_no_damage, str(tmp_path)):
        for name in ("EACCES", "ESTALE", "ETIMEDOUT"):
            said, folders = found[name]
            assert "checkpoints/step-00000002 cannot be read: [Errno" in said and "give access to it" in said
            assert folders == untouched
        assert found["EIO"] == (1, ["damaged-step-00000002", "step-00000001"])
        assert "step-00000002 is of format 4, written by" in found["newer"][0] and found["newer"][1] == untouched
        said, folders = found["back to a damaged one"]
        assert "checkpoints/step-00000001 is damaged: " in said and folders == untouched
        assert "checkpoints cannot be written to " in found["no folder"][0]


def _keep_one_of_three(folder: str) -> list[str]:
    run = RunDir(Path(folder))
    store = _AnsweringStore(run.checkpoints, errno.EIO)
    saver = ranks.checkpointer(store, run, ranks.sharded(ranks.expected(), "row_wise"), keep=1, asynchronous=False)
    for step in (1, 3, 4):
        saver.save(Progress(step=step))
    saver.close()
    assert Catalogue(store).steps() == [4]
    return store.folders()


def test_a_checkpoint_counts_though_an_older_one_cannot_be_removed(tmp_path: Path) -> None:
    (folders,) = run_ranks(1, _keep_one_of_three, str(tmp_path))
    assert folders == ["step-00000001", "step-00000003", "step-00000004"]


class _KeptStore(LocalStore):
    """One in which the checkpoint of step 2 cannot be deleted."""

    def remove_file(self, path: str) -> None:
        if path.startswith("step-00000002"):
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), path)
        super().remove_file(path)


def _keep_a_delta(folder: str) -> list[int]:
    """A full checkpoint, a delta, and a full one, which alone should stay; the steps that verify."""
    run, tensors = RunDir(Path(folder)), ranks.sharded(ranks.expected(), "row_wise")
    touched = ranks.TouchedOfTest(tensors)
    saver = ranks.checkpointer(_KeptStore(run.checkpoints), run, tensors, touched, deltas=1, keep=1, asynchronous=False)
    for step in (1, 2, 3):
        saver.save(Progress(step=step))
    saver.close()
    catalogue = Catalogue(LocalStore(run.checkpoints))
    return [catalogue.verify(step).step for step in catalogue.steps()]


def test_a_delta_that_cannot_be_removed_keeps_what_it_needs(tmp_path: Path) -> None:
    assert run_ranks(1, _keep_a_delta, str(tmp_path)) == [[1, 2, 3]]


def _begin_while_another_ends(folder: str) -> str:
    """The newest is looked for, another job saves one more, then this one begins."""
    run, tensors = RunDir(Path(folder)), ranks.sharded(ranks.expected(), "row_wise")
    catalogue = Catalogue(LocalStore(run.checkpoints))
    newest = catalogue.newest()
    late = ranks.checkpointer(LocalStore(run.checkpoints), run, tensors, asynchronous=False)
    late.save(Progress(step=newest.progress.step + 1))
    late.close()
    loader = ranks.checkpointer(LocalStore(run.checkpoints), run, tensors)
    with pytest.raises(OSError) as refused:
        loader.restore(newest)
    loader.close()
    return str(refused.value)


@pytest.mark.parametrize("begun", [True, False])
def test_what_another_job_saved_meanwhile_is_neither_left_behind_nor_written_over(
    begun: bool, saved: Path, tmp_path: Path
) -> None:
    if begun:
        shutil.copytree(saved, tmp_path / "run")
    step = 3 if begun else 1
    for said in run_ranks(2, _begin_while_another_ends, str(tmp_path / "run")):
        assert f"checkpoints/step-0000000{step} was written by another job while this one began: start the" in said
    assert Catalogue(LocalStore(tmp_path / "run" / "checkpoints")).steps()[-1] == step


class _TrainedOnStore(LocalStore):
    """A store whose checkpoints go when the first file of tensors is about to be read."""

    def read_into(self, path: str, start: int, buffer: memoryview) -> int:
        for step in Catalogue(LocalStore(Path(self.address))).steps():
            Catalogue(LocalStore(Path(self.address))).remove(step)
        return super().read_into(path, start, buffer)


def test_a_checkpoint_that_goes_while_it_is_read_is_not_called_damaged(saved: Path, tmp_path: Path) -> None:
    """An evaluation or an export takes minutes, in which the run goes on and keeps newer ones."""
    shutil.copytree(saved, tmp_path / "run")
    catalogue = Catalogue(_TrainedOnStore(tmp_path / "run" / "checkpoints"))
    with pytest.raises(OSError, match="step-00000002 was removed while it was read, by the run's training"):
        catalogue.verify(2)


def test_a_checkpoint_that_is_a_link_is_removed_without_what_it_leads_to(tmp_path: Path) -> None:
    kept = tmp_path / "elsewhere" / "rank-00000.bin"
    kept.parent.mkdir()
    kept.write_bytes(b"state")
    store = LocalStore(tmp_path / "checkpoints")
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "step-00000001").symlink_to(kept.parent)
    store.remove("step-00000001")
    assert store.folders() == [] and kept.read_bytes() == b"state"
