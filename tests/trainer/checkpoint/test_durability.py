"""Whatever happens while a checkpoint is written, the newest one that counts is whole; whatever happens to one that
was written, what changes a value is noticed."""

import errno
import os
import random
import shutil
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from tests.support.distributed import run_ranks
from tests.support.volatile_store import PowerCut, VolatileStore
from tests.trainer.checkpoint import ranks
from trainer.checkpoint import store as store_module
from trainer.checkpoint.catalogue import Catalogue, DamagedCheckpoint, open_catalogue
from trainer.checkpoint.checkpointer import Checkpointer
from trainer.checkpoint.object_store import ObjectStore
from trainer.checkpoint.progress import Progress
from trainer.checkpoint.store import LocalStore, open_store
from trainer.run.run_dir import RunDir


class CountingStore(LocalStore):
    """Counts how often each folder's manifest is read."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.reads: Counter[str] = Counter()

    def read(self, path: str) -> bytes:
        folder, _, name = path.partition("/")
        self.reads[folder] += name == "manifest.json"
        return super().read(path)


def _save_in(store: VolatileStore, run: RunDir, step: int) -> None:
    saver = ranks.checkpointer(store, run, ranks.sharded(ranks.expected(step), "row_wise"), keep=1, asynchronous=False)
    try:
        saver.save(Progress(step=step))
    finally:
        saver.close()


def _cut_power_everywhere(folder: str) -> list[list[int]]:
    """For each number of operations before the cut: the steps that are found whole afterwards."""
    run = RunDir(Path(folder))
    before = VolatileStore()
    _save_in(before, run, 1)
    found = []
    for lives in range(100):
        store = VolatileStore(before.survives, lives)
        done = True
        try:
            _save_in(store, run, 2)
        except PowerCut:
            done = False
        after = Catalogue(VolatileStore(store.survives))
        after.clear_leftovers()
        found.append([after.verify(step).step for step in after.steps()])
        if done:
            return found
    raise AssertionError("a save has no end")


def test_a_power_cut_at_any_operation_leaves_a_whole_checkpoint(tmp_path: Path) -> None:
    (found,) = run_ranks(1, _cut_power_everywhere, str(tmp_path))
    assert len(found) > 8
    assert found[0] == [1] and found[-1] == [2]
    assert set(map(tuple, found)) == {(1,), (1, 2), (2,)}
    assert found == sorted(found), "once the new one counts it stays"


def _order_of_events(folder: str) -> list[tuple[str, str]]:
    """(event, path) of the system calls of a second save, synchronous so that they are this process's."""
    run = RunDir(Path(folder))
    events: list[tuple[str, str]] = []
    fsync, unlink = os.fsync, Path.unlink

    def noted_fsync(descriptor: int) -> None:
        events.append(("fsync", os.readlink(f"/proc/self/fd/{descriptor}")))
        fsync(descriptor)

    def noted_unlink(path: Path, missing_ok: bool = False) -> None:
        events.append(("unlink", str(path)))
        unlink(path, missing_ok)

    store = LocalStore(run.checkpoints)
    saver = ranks.checkpointer(store, run, ranks.sharded(ranks.expected(), "row_wise"), keep=1, asynchronous=False)
    saver.save(Progress(step=1))
    for file in (run.config_file, run.plan_file, run.metrics_file, run.eval_file):
        file.write_text("{}\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", noted_fsync)
        patch.setattr(Path, "unlink", noted_unlink)
        saver.save(Progress(step=2))
    saver.close()
    return events


def test_everything_has_reached_the_disk_before_a_checkpoint_counts_and_before_another_goes(tmp_path: Path) -> None:
    (events,) = run_ranks(1, _order_of_events, str(tmp_path))
    new = tmp_path / "checkpoints" / "step-00000002"
    counts = events.index(("fsync", str(new / "COMPLETE")))
    before = {path for _, path in events[:counts]}
    files = [new / "rank-00000.bin", new / "manifest.json", new, new.parent, tmp_path]
    run = RunDir(tmp_path)
    files += [run.config_file, run.plan_file, run.metrics_file, run.eval_file]
    assert before >= set(map(str, files))
    goes = next(index for index, (event, _) in enumerate(events) if event == "unlink")
    assert ("fsync", str(new)) in events[counts:goes]


def _catalogue(run_dir: Path) -> Catalogue:
    return Catalogue(open_store(str(RunDir(run_dir).checkpoints)))


def test_every_flipped_bit_of_every_file_is_noticed(saved: Path) -> None:
    chance = random.Random(1)
    catalogue = _catalogue(saved)
    catalogue.verify(2)
    files = sorted((saved / "checkpoints" / "step-00000002").iterdir())
    assert [file.name for file in files] == ["COMPLETE", "manifest.json", "rank-00000.bin", "rank-00001.bin"]
    for index in range(1000):
        file = files[index % len(files)]
        content = file.read_bytes()
        bit = chance.randrange(8 * len(content))
        changed = bytearray(content)
        changed[bit // 8] ^= 1 << bit % 8
        file.write_bytes(changed)
        with pytest.raises(DamagedCheckpoint):
            catalogue.verify(2)
        file.write_bytes(content)
    catalogue.verify(2)


def _damage_everything(folder: str) -> list[tuple[str, str, list[str], object, list[str]]]:
    """(what was done, the strict answer, folders after it, the answer otherwise, folders after that)."""
    found = []
    for name in ("manifest.json", "rank-00000.bin", "rank-00001.bin"):
        for damage in ("cut", "flipped", "deleted", "a folder"):
            run = Path(folder, f"{name}-{damage}")
            shutil.copytree(Path(folder, "whole"), run)
            store = LocalStore(RunDir(run).checkpoints)
            file = run / "checkpoints" / "step-00000002" / name
            content = file.read_bytes()
            file.unlink()
            if damage == "a folder":
                file.mkdir()
            elif damage != "deleted":
                file.write_bytes(content[:-1] if damage == "cut" else bytes([content[0] ^ 1]) + content[1:])
            with pytest.raises(DamagedCheckpoint) as strict:
                ranks.load(str(run), "row_wise", strict=True)
            untouched = store.folders()
            found.append((name, str(strict.value), untouched, ranks.load(str(run), "row_wise"), store.folders()))
    return found


def test_a_damaged_checkpoint_is_set_aside_and_the_one_before_it_loaded(saved: Path, tmp_path: Path) -> None:
    shutil.copytree(saved, tmp_path / "whole")
    found = run_ranks(1, _damage_everything, str(tmp_path))[0]
    assert len(found) == 12
    for name, strict, untouched, loaded, after in found:
        assert "checkpoints/step-00000002 is damaged: " in strict and name in strict
        assert untouched == ["step-00000001", "step-00000002"]
        assert loaded == (1, [])
        assert after == ["damaged-step-00000002", "step-00000001"]


def test_where_no_other_is_left_the_run_does_not_begin_anew(saved: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(saved, run)
    for step in (1, 2):
        file = run / "checkpoints" / f"step-0000000{step}" / "rank-00000.bin"
        file.write_bytes(file.read_bytes()[::-1])
    for message in run_ranks(2, _nothing_left, str(run)):
        assert "no older checkpoint is left: train anew in another --run-dir" in message
    # It is found again by the next start.
    assert _catalogue(run).steps() == [1]


@pytest.mark.parametrize("name", ["manifest.json", "COMPLETE", "rank-00001.bin"])
def test_what_has_no_end_or_no_bound_is_not_read(name: str, saved: Path, tmp_path: Path) -> None:
    """A device in a file's place, and a file of a tebibyte."""
    shutil.copytree(saved, tmp_path / "run")
    file, catalogue = tmp_path / "run/checkpoints/step-00000002" / name, open_catalogue(RunDir(tmp_path / "run"), None)
    os.truncate(file, 2**40)
    with pytest.raises(DamagedCheckpoint, match=rf"{name} has {2**40} bytes"):
        catalogue.open(2)
    file.unlink()
    file.symlink_to("/dev/zero")
    with pytest.raises((DamagedCheckpoint, OSError)):
        catalogue.open(2)


def test_a_checkpoint_under_another_steps_name_is_damaged(saved: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(saved, run)
    (run / "checkpoints" / "step-00000002").rename(run / "checkpoints" / "step-00000009")
    with pytest.raises(DamagedCheckpoint, match="its state is of step 2: the folder has been renamed"):
        _catalogue(run).open(9)
    assert run_ranks(1, ranks.load, str(run), "row_wise") == [(1, [])]


def _nothing_left(run_dir: str) -> str:
    with pytest.raises(DamagedCheckpoint) as caught:
        ranks.load(run_dir, "row_wise")
    return str(caught.value)


def test_what_was_never_finished_is_cleared_at_the_start(saved: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(saved, run)
    unfinished = run / "checkpoints" / "step-00000003"
    shutil.copytree(run / "checkpoints" / "step-00000002", unfinished)
    (unfinished / "COMPLETE").unlink()
    assert run_ranks(1, ranks.load, str(run), "row_wise") == [(2, [])]
    assert _catalogue(run).store.folders() == ["step-00000001", "step-00000002"]


@pytest.mark.parametrize("scheme", ["", "file://"], ids=["a folder", "through pyarrow"])
def test_any_store_saves_keeps_two_and_sets_a_damaged_one_aside(scheme: str, tmp_path: Path) -> None:
    expected = (2, [], ["damaged-step-00000003", "step-00000002"])
    assert run_ranks(2, ranks.store_works, f"{scheme}{tmp_path}/store") == [expected] * 2


class _FailingFileSystem:
    """One that fails its call of number `fails`, before it takes place or after it."""

    def __init__(self, whole: Any, fails: int, before: bool) -> None:
        self._whole, self._fails, self._before, self.calls = whole, fails, before, 0

    def __getattr__(self, name: str) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            self.calls += 1
            failing = self.calls - 1 == self._fails
            if failing and self._before:
                raise OSError(f"{name} is not answered")
            answer = getattr(self._whole, name)(*arguments, **options)
            if failing:
                raise OSError(f"the answer to {name} is lost")
            return answer

        return call


def _go_on(saver: Checkpointer, store: ObjectStore) -> None:
    saver.restore(Catalogue(store).newest())


def _fails(act: Callable[[], object]) -> bool:
    try:
        act()
    except OSError:
        return True
    return False


def _fail_every_request(folder: str) -> list[tuple[bool, bool, list[int]]]:
    """For each request of a save and a restore, before and after it took place: (failed at the save, at the restore,
    the steps that are found whole afterwards)."""
    found = []
    for number in range(200):
        for before in (True, False):
            run, tensors = RunDir(Path(folder, f"run-{number}-{before}")), ranks.sharded(ranks.expected(), "row_wise")
            run.path.mkdir()
            store = ObjectStore(f"file://{run.path}/store")
            whole = store._filesystem
            saver = ranks.checkpointer(store, run, tensors, keep=1, asynchronous=False)
            saver.save(Progress(step=1))
            store._filesystem = failing = _FailingFileSystem(whole, number, before)
            failed = [_fails(partial(saver.save, Progress(step=2))), _fails(partial(_go_on, saver, store))]
            saver.close()
            store._filesystem = whole
            catalogue = Catalogue(store)
            found.append((*failed, [catalogue.verify(step).step for step in catalogue.steps()]))
        if failing.calls <= number:
            return found
    raise AssertionError("a save has no end")


def test_whatever_request_an_object_store_fails_what_was_complete_stays(tmp_path: Path) -> None:
    (found,) = run_ranks(1, _fail_every_request, str(tmp_path))
    assert found[-1] == (False, False, [2])
    for save_failed, restore_failed, steps in found:
        assert not (save_failed and restore_failed), "one request failed, the next act meets none"
        # A save that was told to have failed may have counted; one that succeeded has.
        assert steps and steps[-1] in ((1, 2) if save_failed else (2,))


def _full_disk(run_dir: str) -> list[str]:
    """What every rank says when the first rank's disk takes no more."""
    run = RunDir(Path(run_dir))
    run.path.mkdir(exist_ok=True)
    store = (_FullStore if dist.get_rank() == 0 else LocalStore)(run.checkpoints)
    saver = ranks.checkpointer(store, run, ranks.sharded(ranks.expected(), "row_wise"), asynchronous=False)
    with pytest.raises(OSError) as caught:
        saver.save(Progress(step=7))
    saver.close()
    return [str(caught.value), *store.folders()]


class _FullStore(LocalStore):
    def writing(self, path: str):  # type: ignore[no-untyped-def]
        raise OSError(28, "No space left on device", path)

    def remove_file(self, path: str) -> None:
        raise OSError(30, "Read-only file system", path)


def test_a_full_disk_is_one_line_on_every_rank_and_leaves_nothing_behind(tmp_path: Path) -> None:
    said = run_ranks(2, _full_disk, str(tmp_path / "run"))
    assert said[0][0].startswith("the checkpoint of step 7 cannot be written: [Errno 28] No space left on device")
    assert said[0][0] == said[1][0]
    assert not list((tmp_path / "run" / "checkpoints").iterdir())


def test_a_large_file_goes_to_the_disk_while_it_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So its pages can be given back: at no time are more than two parts of it in memory alone."""
    monkeypatch.setattr(store_module, "DRAIN_BYTES", 100)
    synced, fdatasync = [0], os.fdatasync

    def watched(descriptor: int) -> None:
        size = os.fstat(descriptor).st_size
        fdatasync(descriptor)
        synced.append(size)

    monkeypatch.setattr(os, "fdatasync", watched)
    content = os.urandom(1000)
    with open_store(str(tmp_path)).writing("step-00000001/rank-00000.bin") as file:
        for start in range(0, 1000, 40):
            assert file.write(memoryview(content)[start : start + 40]) == 40
            assert start + 40 - synced[-1] <= 2 * (100 + 40)
    assert (tmp_path / "step-00000001" / "rank-00000.bin").read_bytes() == content


def test_a_disk_that_fails_beside_the_writing_fails_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether further bytes come after that or not: the system tells of such an error once."""
    monkeypatch.setattr(store_module, "DRAIN_BYTES", 100)

    def broken(descriptor: int) -> None:
        raise OSError(errno.EIO, "the disk is broken")

    monkeypatch.setattr(os, "fdatasync", broken)
    for times in (1, 5):
        with pytest.raises(OSError, match="the disk is broken"), open_store(str(tmp_path)).writing("a/b") as file:
            for _ in range(times):
                file.write(memoryview(bytes(100)))


def test_a_file_system_that_cannot_sync_folders_takes_checkpoints(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It answers EINVAL for every folder; for a file that answer stays an error."""
    fsync, never = os.fsync, set[str]()

    def knows_files_alone(descriptor: int) -> None:
        path = os.readlink(f"/proc/self/fd/{descriptor}")
        if os.path.isdir(path) or path in never:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", knows_files_alone)
    store = LocalStore(tmp_path)
    for name in ("first", "second"):
        with store.writing(f"step-00000001/{name}") as file:
            file.write(b"state")
        store.settle("step-00000001")
        store.remove_file("step-00000001/second")
    store.rename("step-00000001", "step-00000002")
    assert store.read("step-00000002/first") == b"state"
    never.add(str(tmp_path / "a" / "b"))
    with pytest.raises(OSError, match="Invalid argument"), store.writing("a/b"):
        pass


def test_the_bases_of_checkpoints_are_read_once_and_known_anew_after_a_change(tmp_path: Path) -> None:
    """Retention asks after every save."""
    run_ranks(1, ranks.save_delta, str(tmp_path / "run"), "row_wise")
    catalogue = Catalogue(CountingStore(tmp_path / "run" / "checkpoints"))
    assert [catalogue.base(step) for step in (1, 2, 1, 2)] == [None, 1, None, 1]
    # A delta is opened with its base.
    assert catalogue.store.reads == {"step-00000001": 2, "step-00000002": 1}
    catalogue.set_aside(1, "abandoned")
    assert catalogue.base(1) is None
