"""A checkpoint is what its own ranks wrote, and a delta needs its own full one: what lies elsewhere, or in its place,
is neither called complete nor loaded."""

import shutil
import subprocess
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import pytest
import torch.distributed as dist

from tests.support.distributed import run_ranks
from tests.trainer.checkpoint import ranks
from trainer.checkpoint.catalogue import Catalogue
from trainer.checkpoint.checkpointer import Checkpointer
from trainer.checkpoint.progress import Progress
from trainer.checkpoint.store import LocalStore
from trainer.run import late_files
from trainer.run.run_dir import RunDir, locked


def _said(act: Callable[[], object]) -> str:
    with pytest.raises((OSError, ValueError)) as refused:
        act()
    return f"{type(refused.value).__name__}: {refused.value}"


def _said_of_a_second_save(saver: Checkpointer, between: Callable[[], object]) -> str:
    """What a save of step 2 says after `between`, which the first rank does when all have saved step 1."""
    saver.save(Progress(step=1))
    saver.wait()
    dist.barrier()
    if dist.get_rank() == 0:
        between()
    dist.barrier()
    saver.save(Progress(step=2))
    said = _said(saver.wait)
    saver.close()
    return said


class _SplitStore(LocalStore):
    """Shared by all ranks at first, then each machine's own: the shared one is no longer mounted."""

    def __init__(self, shared: Path, own: Path) -> None:
        super().__init__(shared)
        self._own = own

    def split(self) -> None:
        self._root = self._own


def _save_on_split_disks(folder: str) -> list[str]:
    """What is said at the start, where each rank has a disk of its own, and in a save, where that comes later."""
    late_files.LAG_S = 0.0  # This process is the test's alone, and what its disk does not show, no time will.
    run, own = RunDir(Path(folder)), Path(folder, f"disk-of-{dist.get_rank()}")
    own.mkdir(parents=True)
    tensors = ranks.sharded(ranks.expected(), "row_wise")
    store = _SplitStore(run.checkpoints, own)
    saver = ranks.checkpointer(store, run, tensors)
    saver.restore(Catalogue(store).newest())
    saver.save(Progress(step=1))
    saver.wait()
    store.split()
    saver.save(Progress(step=2))
    said = [_said(saver.wait), _said(lambda: saver.restore(Catalogue(store).newest()))]
    saver.close()
    return [*said, *store.folders()]


def test_ranks_that_share_no_disk_are_told_before_work_is_lost_and_count_nothing(tmp_path: Path) -> None:
    first, second = run_ranks(2, _save_on_split_disks, str(tmp_path))
    assert first[:2] == second[:2]
    saving, starting = first[:2]
    assert "rank-00001.bin is missing, " in saving
    assert "rank 1 does not see what rank 0 writes to" in starting and "file system that all machines share" in starting
    assert first[2:] == [], "nothing is left behind"
    assert Catalogue(LocalStore(RunDir(tmp_path).checkpoints)).steps() == [1]


class _LateStore(LocalStore):
    """Shows what is there at the third look only, as a client of NFS that has asked for its folder before."""

    looks = 0

    def size(self, path: str) -> int | None:
        self.looks += 1
        return super().size(path) if self.looks > 2 else None


def test_a_file_system_that_shows_late_what_another_machine_has_written_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    late = _LateStore(tmp_path)
    monkeypatch.setattr(late_files, "time", SimpleNamespace(monotonic=lambda: float(late.looks), sleep=lambda _: None))
    trial = Catalogue(LocalStore(tmp_path)).begin_trial()
    assert Catalogue(late).sees_trial(trial)
    assert not Catalogue(late).sees_trial("trial-of-nobody")
    assert late.looks > 2 + late_files.LAG_S


def test_a_delta_is_not_loaded_with_another_checkpoint_of_its_full_ones_step(tmp_path: Path) -> None:
    """As where two runs' checkpoints are copied together, or one that was set aside is given its name again."""
    run, other = tmp_path / "run", tmp_path / "other"
    run_ranks(2, ranks.save_delta, str(run), "row_wise")
    run_ranks(2, ranks.save, str(other), "column_wise")
    place = run / "checkpoints" / "step-00000001"
    shutil.rmtree(place)
    shutil.copytree(other / "checkpoints" / "step-00000001", place)
    assert Catalogue(LocalStore(run / "checkpoints")).steps() == [1, 2]
    assert run_ranks(2, ranks.load, str(run), "row_wise") == [(1, [])] * 2
    assert [path.name for path in sorted((run / "checkpoints").iterdir())] == ["damaged-step-00000002", "step-00000001"]


def _save_a_delta_of_nothing(folder: str) -> str:
    """A full checkpoint, which then goes, and a delta of it."""
    run, tensors = RunDir(Path(folder)), ranks.sharded(ranks.expected(), "row_wise")
    store = LocalStore(run.checkpoints)
    saver = ranks.checkpointer(store, run, tensors, ranks.TouchedOfTest(tensors), deltas=1)
    return _said_of_a_second_save(saver, lambda: store.rename("step-00000001", "elsewhere"))


def test_a_delta_does_not_count_where_what_it_needs_has_gone(tmp_path: Path) -> None:
    for said in run_ranks(2, _save_a_delta_of_nothing, str(tmp_path)):
        assert "checkpoints/step-00000001, which it needs, has gone or is another now" in said
    assert Catalogue(LocalStore(RunDir(tmp_path).checkpoints)).steps() == []


def _start_no_writer(folder: str) -> str:
    """The second rank's machine starts no further process."""
    tensors = ranks.sharded(ranks.expected(), "row_wise")
    saver = ranks.checkpointer(LocalStore(Path(folder)), RunDir(Path(folder)), tensors)
    with patch.object(subprocess, "Popen", side_effect=BlockingIOError(11, "Resource temporarily unavailable")):
        said = _said(saver.reserve) if dist.get_rank() else None
    said = said or _said(saver.reserve)
    saver.close()
    return said


def test_a_writer_that_cannot_be_started_is_told_by_every_rank_before_the_first_step(tmp_path: Path) -> None:
    first, second = run_ranks(2, _start_no_writer, str(tmp_path))
    assert first == second
    assert first.startswith("OSError: the process that writes checkpoints cannot be started on ")
    assert "(Resource temporarily unavailable): raise what limits this user's processes and memory" in first


def _save_while_another_trains(folder: str) -> list[str]:
    """The lock is removed after the first save, and another job takes it."""
    run, tensors = RunDir(Path(folder)), ranks.sharded(ranks.expected(), "row_wise")
    store = LocalStore(run.checkpoints)
    run.config_file.touch()
    saver = ranks.checkpointer(store, run, tensors)
    with locked(run) if dist.get_rank() == 0 else nullcontext():
        saver.save(Progress(step=1))
        saver.wait()
        if dist.get_rank() == 0:
            run.lock_file.unlink()
            run.lock_file.write_text("process 7 on elsewhere\n")
            with store.writing("step-00000002/rank-00000.bin") as file:
                file.write(b"what the other job is writing")
        dist.barrier()
        saver.save(Progress(step=2))
        said = _said(saver.wait)
        saver.close()
    return [said, store.read("step-00000002/rank-00000.bin").decode()]


def test_a_job_whose_run_another_one_trains_ends_and_touches_nothing(tmp_path: Path) -> None:
    """Where file systems know no locks, or somebody has removed one."""
    for said, content in run_ranks(2, _save_while_another_trains, str(tmp_path)):
        assert "lock names another job (process 7 on elsewhere), which trains this run now" in said
        assert content == "what the other job is writing"
    assert Catalogue(LocalStore(RunDir(tmp_path).checkpoints)).steps() == [1]


def _save_where_the_run_was(folder: str) -> str:
    run, tensors = RunDir(Path(folder, "run")), ranks.sharded(ranks.expected(), "row_wise")
    run.path.mkdir(exist_ok=True)
    run.config_file.touch()
    saver = ranks.checkpointer(LocalStore(run.checkpoints), run, tensors)
    return _said_of_a_second_save(saver, lambda: run.path.rename(run.path.with_name("moved")))


def test_nothing_is_saved_under_the_old_name_of_a_run_that_was_moved(tmp_path: Path) -> None:
    for said in run_ranks(2, _save_where_the_run_was, str(tmp_path)):
        assert "run holds this run no longer: it was moved or removed while it was trained; start the same" in said
    assert [path.name for path in tmp_path.iterdir()] == ["moved"]
