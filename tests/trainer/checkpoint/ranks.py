"""What the ranks of these tests run: a state of a few tensors, sharded in any of several ways, saved and loaded."""

from dataclasses import replace
from functools import partial, partialmethod
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import HashStore
from torch.distributed._shard.sharded_tensor import Shard, ShardedTensor, init_from_local_shards

from tests.trainer.checkpoint.dying_writer import start_dying_writer
from trainer.checkpoint import deltas, loading
from trainer.checkpoint.catalogue import Catalogue
from trainer.checkpoint.checkpointer import Checkpointer
from trainer.checkpoint.layout import Layout
from trainer.checkpoint.pieces import Tensors, Touched
from trainer.checkpoint.progress import Progress
from trainer.checkpoint.staging import Staging
from trainer.checkpoint.store import Store, open_store
from trainer.config import CheckpointConfig
from trainer.parallel.mesh import Mesh
from trainer.run.run_dir import RunDir, check_still_ours

LAYOUTS = ("row_wise", "column_wise", "table_wise", "grid", "replicated")
ROWS, COLUMNS = 147, 6
TOUCHED = (0, 3, 4, 10, 146)
"""Rows that change between the two checkpoints of a run with a delta."""


def expected(seed: int = 0) -> dict[str, Tensor]:
    """The whole state."""
    table = torch.arange(ROWS * COLUMNS, dtype=torch.float32).view(ROWS, COLUMNS) / 7 + seed
    return {
        "tables/item": table,
        "tables_optimizer/item/momentum1": table[:, 0].double(),
        "dense/weight": table[:3, :2].to(torch.bfloat16),
        "dense/mask": torch.tensor([True, False, seed == 0]),
        "dense_optimizer/weight/step": torch.tensor(5 + seed),
    }


def expected_after(touched: tuple[int, ...], seed: int = 1) -> dict[str, Tensor]:
    """The whole state when those rows of the tables have changed, and everything else."""
    before, after = expected(0), expected(seed)
    rows = torch.tensor(touched, dtype=torch.int64)
    return {
        name: before[name].index_copy(0, rows, value[rows]) if name.startswith("tables") else value
        for name, value in after.items()
    }


class TouchedOfTest:
    """Rows of any shard; `missed` are those that change without its knowing."""

    def __init__(self, tensors: Tensors, missed: tuple[int, ...] = ()) -> None:
        self.known = [row for row in TOUCHED if row not in missed]
        self.rows_of = {
            shard.metadata.shard_offsets[0]: shard.metadata.shard_sizes[0]
            for value in tensors.values()
            if isinstance(value, ShardedTensor)
            for shard in value.local_shards()
        }
        self.clears = 0

    def rows(self, table: str, first_row: int) -> Tensor | None:
        """As `trainer.checkpoint.pieces.Touched`."""
        assert table == "item"
        inside = [row - first_row for row in self.known if 0 <= row - first_row < self.rows_of[first_row]]
        return torch.tensor(inside, dtype=torch.int64)

    def clear(self) -> None:
        """As `trainer.checkpoint.pieces.Touched`."""
        self.clears += 1


def _blocks(layout: str, rank: int, ranks: int) -> list[tuple[slice, slice]]:
    rows, columns = -(-ROWS // ranks), -(-COLUMNS // ranks)
    everything = slice(0, None)
    if layout == "row_wise":
        return [(slice(rank * rows, (rank + 1) * rows), everything)]
    if layout == "column_wise":
        return [(everything, slice(rank * columns, (rank + 1) * columns))]
    if layout == "table_wise":
        return [(everything, everything)] if rank == ranks - 1 else []
    # Quarters, dealt out.
    quarters = [(r, c) for r in (slice(0, 4), slice(4, None)) for c in (slice(0, 1), slice(1, None))]
    return quarters[rank::ranks]


def sharded(whole: dict[str, Tensor], layout: str) -> Tensors:
    """This rank's part of the state: the tables as `layout` says, all else on every rank."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    tensors: Tensors = {name: value.clone() for name, value in whole.items()}
    for name, value in whole.items():
        if layout == "replicated" or not name.startswith("tables"):
            continue
        shards, seen = [], set()
        for rows, columns in _blocks(layout, rank, ranks):
            box = (rows, columns)[: value.dim()]
            offsets = tuple(part.start for part in box)
            part = value[box].clone()
            if part.numel() and offsets not in seen:
                shards.append(Shard.from_tensor_and_offsets(part, list(offsets), rank))
                seen.add(offsets)
        if value.dim() == 1 and layout == "column_wise":
            shards = [Shard.from_tensor_and_offsets(value.clone(), [0], rank)] if rank == 0 else []
        if value.dim() == 1 and layout == "grid":
            shards = [shard for shard in shards if _owns(shard.metadata.shard_offsets[0], rank, ranks)]
        tensors[name] = init_from_local_shards(shards, *value.shape)
    return tensors


def _owns(row: int, rank: int, ranks: int) -> bool:
    """Of the two quarters of a row the first's rank holds the rows of a vector."""
    return (0 if row == 0 else 2) % ranks == rank


def checkpointer(
    store: Store, run: RunDir, tensors: Tensors, touched: Touched | None = None, **config: Any
) -> Checkpointer:
    """Of this rank."""
    ranks = dist.get_world_size()
    mesh = Mesh(rank=dist.get_rank(), world_size=ranks, local_world_size=ranks, device=torch.device("cpu"))
    return Checkpointer(
        run,
        Catalogue(store),
        mesh,
        lambda: tensors,
        replace(CheckpointConfig(), **config),
        touched=touched,
        check_ours=partial(check_still_ours, run) if run.config_file.is_file() else lambda: None,
    )


def save(run_dir: str, layout: str, steps: tuple[int, ...] = (1,), **config: Any) -> None:
    """Save the state of each of `steps`; that of step s has seed s - 1."""
    run = RunDir(Path(run_dir))
    run.path.mkdir(exist_ok=True, parents=True)
    tensors = sharded(expected(), layout)
    saver = checkpointer(open_store(str(run.checkpoints)), run, tensors, **config)
    for step in steps:
        for name, value in sharded(expected(step - 1), layout).items():
            _assign(tensors[name], value)
        saver.save(Progress(step=step))
        # The training goes on while the writing does.
        for value in tensors.values():
            _assign(value, None)
    saver.wait()
    saver.close()


def save_delta(run_dir: str, layout: str, *, asynchronous: bool = False) -> None:
    """A full checkpoint of step 1 and a delta of step 2."""
    run = RunDir(Path(run_dir))
    run.path.mkdir(exist_ok=True, parents=True)
    tensors = sharded(expected(), layout)
    touched = TouchedOfTest(tensors)
    saver = checkpointer(
        open_store(str(run.checkpoints)), run, tensors, touched, deltas=1, keep=1, asynchronous=asynchronous
    )
    saver.save(Progress(step=1))
    saver.wait()
    for name, value in sharded(expected_after(TOUCHED), layout).items():
        _assign(tensors[name], value)
    saver.save(Progress(step=2))
    saver.wait()
    saver.close()
    # Replicated tables are in a delta as in a full one, which it then is.
    assert touched.clears == (2 if layout == "replicated" else 1)


def save_folded(
    run_dir: str, layout: str, *, asynchronous: bool, steps: int = 5, missed: tuple[int, ...] = ()
) -> list[int]:
    """Checkpoints of so many steps, those of odd ones full, those of even ones deltas; returns the bytes that each
    copied."""
    run = RunDir(Path(run_dir))
    run.path.mkdir(exist_ok=True, parents=True)
    tensors, copied = sharded(expected(), layout), []
    fill = Staging.fill

    def noted(staging: Staging, contents: Layout, *, as_delta: bool = False) -> None:
        copied.append(contents.num_bytes)
        fill(staging, contents, as_delta=as_delta)

    saver = checkpointer(
        open_store(str(run.checkpoints)),
        run,
        tensors,
        TouchedOfTest(tensors, missed),
        deltas=1,
        keep=99,
        asynchronous=asynchronous,
    )
    with patch.object(Staging, "fill", noted):
        for step in range(1, steps + 1):
            for name, value in sharded(expected_after(TOUCHED, step - 1), layout).items():
                _assign(tensors[name], value)
            saver.save(Progress(step=step))
    saver.wait()
    saver.close()
    return copied


def fold_every_way(folder: str) -> dict[str, list[int]]:
    """By layout: the bytes that each asynchronous save of this rank copied; beside them the same saves without.

    Every row is compared within four saves.
    """
    deltas.PARTS, copied = 4, {}
    for layout in LAYOUTS:
        copied[layout] = save_folded(f"{folder}/{layout}-beside", layout, asynchronous=True)
        save_folded(f"{folder}/{layout}", layout, asynchronous=False)
    return copied


def miss_rows(folder: str) -> dict[str, list[int]]:
    """By layout, each row missed alone: the bytes that each save copied."""
    deltas.PARTS = 2
    return {
        f"{layout}-{row}": save_folded(f"{folder}/{layout}-{row}", layout, asynchronous=True, missed=(row,))
        for layout in LAYOUTS[:-1]
        for row in (TOUCHED[0], TOUCHED[-1])
    }


def save_and_kill_writers(run_dir: str, acts: int) -> None:
    """Folded checkpoints, whose writer is killed before each of so many acts, of one checkpoint after the other."""
    moves, starts = len(expected()), [Staging._start]

    def start(staging: Staging) -> Any:
        return starts.pop()(staging)

    for act in reversed(range(acts)):
        # Before that, one that comes in the midst of a folding does all of it.
        spared = moves if 0 < act <= 2 * moves else 0
        starts.append(partial(start_dying_writer, acts=act, spared=spared, victim="writer"))
    with patch.object(Staging, "_start", start):
        save_folded(run_dir, "row_wise", asynchronous=True, steps=2 * acts + 1)
    assert not starts, "not every one was killed"


def save_until_killed(run_dir: str, acts: int) -> None:
    """A full checkpoint, a delta and a folded one; this process and its writer are killed before such an act."""
    dist.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    with patch.object(Staging, "_start", partialmethod(start_dying_writer, acts=acts, spared=0, victim="rank")):
        save_folded(run_dir, "row_wise", asynchronous=True, steps=3)


def load(run_dir: str, layout: str, **config: Any) -> tuple[int, list[str]]:
    """(the step that was restored, what differs from its state)."""
    run = RunDir(Path(run_dir))
    tensors = sharded({name: torch.zeros_like(value) for name, value in expected().items()}, layout)
    store = open_store(str(run.checkpoints))
    loader = checkpointer(store, run, tensors, **config)
    progress = loader.restore(Catalogue(store).newest()).progress
    loader.close()
    delta = run_dir.endswith("-delta")
    wanted = sharded(expected_after(TOUCHED) if delta else expected(progress.step - 1), layout)
    return progress.step, [name for name in wanted if not _equal(tensors[name], wanted[name])]


def _parts(value: Any) -> list[Tensor]:
    return [shard.tensor for shard in value.local_shards()] if isinstance(value, ShardedTensor) else [value]


def _assign(target: Any, source: Any) -> None:
    for index, part in enumerate(_parts(target)):
        part.copy_(torch.zeros_like(part) if source is None else _parts(source)[index])


def _equal(one: Any, other: Any) -> bool:
    return all(torch.equal(a, b) for a, b in zip(_parts(one), _parts(other), strict=True))


def store_works(address: str) -> tuple[int, list[str], list[str]]:
    """Save and load at an address, with damage in between: (step, what differs, folders)."""
    run = RunDir(Path(address.removeprefix("file://")).with_name("run"))
    run.path.mkdir(exist_ok=True)
    store, tensors = open_store(address), sharded(expected(), "row_wise")
    saver = checkpointer(store, run, tensors, keep=2)
    for step in (1, 2, 3):
        for name, value in sharded(expected(step - 1), "row_wise").items():
            _assign(tensors[name], value)
        saver.save(Progress(step=step))
    saver.wait()
    if dist.get_rank() == 0:
        with store.writing("step-00000003/rank-00001.bin") as file:
            file.write(b"other bytes")
    dist.barrier()
    restart = saver.restore(Catalogue(store).newest())
    saver.close()
    wanted = sharded(expected(1), "row_wise")
    differs = [name for name in wanted if not _equal(tensors[name], wanted[name])]
    dist.barrier()
    return restart.progress.step, differs, store.folders()


def save_every_way(folder: str) -> None:
    """A run a layout; on an even number of ranks asynchronously."""
    ranks = dist.get_world_size()
    for layout in LAYOUTS:
        save(f"{folder}/{layout}-{ranks}", layout, asynchronous=ranks % 2 == 0)
        # Of replicated tables nobody knows the rows.
        save_delta(f"{folder}/{layout}-{ranks}-delta", layout, asynchronous=ranks % 2 == 1)


def load_every_way(folder: str) -> dict[tuple[str, str], tuple[int, list[str]]]:
    """(run, layout) -> what `load` says; a few rows at a time, as of large tables."""
    loading.GROUP_BYTES = 192
    runs = sorted(path.name for path in Path(folder).iterdir())
    return {(run, layout): load(f"{folder}/{run}", layout) for run in runs for layout in LAYOUTS}


def save_not_finite(run_dir: str) -> tuple[str, list[str]]:
    """Save a whole state, then one in which the last rank's shard holds a NaN: (what that says, the folders)."""
    run = RunDir(Path(run_dir))
    run.path.mkdir(exist_ok=True)
    store, tensors = open_store(str(run.checkpoints)), sharded(expected(), "row_wise")
    saver = checkpointer(store, run, tensors, keep=1)
    saver.save(Progress(step=1))
    if dist.get_rank() == dist.get_world_size() - 1:
        _parts(tensors["tables/item"])[0][-1, 2] = torch.nan
    said = ""
    try:
        saver.save(Progress(step=2))
    except FloatingPointError as error:
        said = str(error)
    saver.close()
    return said, store.folders()
