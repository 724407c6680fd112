"""Fill live tensors from a checkpoint: each rank reads the regions that overlap with its own, whatever wrote them."""

import os
from collections.abc import Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from math import prod
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from trainer.checkpoint.catalogue import Catalogue, Checkpoint, DamagedCheckpoint, step_folder
from trainer.checkpoint.chunks import CHUNK_BYTES, ChunkError, ChunkReader, ThreadMemory
from trainer.checkpoint.layout import dtype_name
from trainer.checkpoint.manifest import DTYPE_BYTES, Manifest
from trainer.checkpoint.pieces import LivePiece, Tensors, local_pieces, narrowed, whole_shape
from trainer.checkpoint.region import Region
from trainer.checkpoint.store import Store

T = TypeVar("T")

GROUP_BYTES = 4 * CHUNK_BYTES
"""Bytes that one thread reads at a time."""
MAX_THREADS = 8
"""Threads of a rank that read; each holds about `GROUP_BYTES`."""


@dataclass(frozen=True, slots=True)
class _Read:
    """Whole rows of a stored piece, of which `part` goes into `target`."""

    file: str
    start: int
    dtype: torch.dtype
    rows: Region
    part: Region
    target: Tensor

    @property
    def num_bytes(self) -> int:
        return self.rows.numel * self.dtype.itemsize


def load_checkpoint(
    catalogue: Catalogue,
    checkpoint: Checkpoint,
    tensors: Tensors,
    group: dist.ProcessGroup,
    grown: Collection[str] = (),
) -> None:
    """Fill `tensors` in place from a checkpoint that any number of ranks wrote.  Called by every rank of `group`.

    Tables named in `grown` may have more rows than were stored; those keep the values that they have.

    Raises, on every rank alike:
        ValueError: the checkpoint lacks a tensor of the model, holds one that the model lacks, or one of another shape.
        DamagedCheckpoint: some bytes are not what was written; `tensors` hold nothing of use.
        OSError: some cannot be read, as little.
    """
    folder = step_folder(checkpoint.step)
    pieces = local_pieces(tensors)
    # A rank has no name for a table of which it holds no shard, so the names of all ranks are compared.
    held = {name: (dtype_name(value.dtype), whole_shape(value)) for name, value in tensors.items()}
    needed = {name: kind for kinds in gather(held, group) for name, kind in kinds.items()}
    try:
        check_fits(checkpoint.manifest, needed, grown)
    except ValueError as error:
        raise ValueError(f"checkpoint {catalogue.store.address}/{folder} {error}") from None
    problem = None
    try:
        fill(catalogue.store, checkpoint, pieces)
    except (ChunkError, OSError) as error:
        problem = catalogue.unread(checkpoint.step, error)
    problems = [problem for problem in gather(problem, group) if problem is not None]
    if problems:
        # Damage that one rank has met is damage, whatever keeps another from reading.
        raise next((problem for problem in problems if isinstance(problem, DamagedCheckpoint)), problems[0])


def gather(value: T, group: dist.ProcessGroup) -> list[T]:
    """Every rank's value, by rank.  Called by every rank."""
    values: list[T | None] = [None] * dist.get_world_size(group)
    dist.all_gather_object(values, value, group=group)  # every rank
    return values  # type: ignore[return-value]  # all are filled


@contextmanager
def refused_alike(group: dist.ProcessGroup, before: str = "") -> Iterator[None]:
    """A ValueError or OSError of one rank's block is raised by every rank, with the words of the first that has one and
    `before` in front of them.  Entered by every rank."""
    problem: tuple[type[OSError | ValueError], str] | None = None
    try:
        yield
    except (OSError, ValueError) as error:
        problem = OSError if isinstance(error, OSError) else ValueError, str(error)
    problems = [each for each in gather(problem, group) if each is not None]
    if problems:
        kind, words = problems[0]
        raise kind(f"{before}{words}")


def check_fits(manifest: Manifest, needed: dict[str, tuple[str, tuple[int, ...]]], grown: Collection[str] = ()) -> None:
    """Refuse a checkpoint whose tensors are not those of the model; `needed`: name -> (type, shape), of all ranks.

    Tables named in `grown`, and their optimizers' state, may have more rows in the model.

    Raises:
        ValueError: naming the first tensor that one lacks or that differs.
    """
    stored = {name: (tensor.dtype, tensor.shape) for name, tensor in manifest.tensors.items()}
    # Of a tensor without a value, as the borders of a number that never changes, nothing is stored.
    needed = {name: (dtype, shape) for name, (dtype, shape) in needed.items() if 0 not in shape}
    missing, unknown = sorted(set(needed) - set(stored)), sorted(set(stored) - set(needed))
    if missing or unknown:
        problem = (
            f"lacks {missing[0]!r}, which the model has" if missing else f"holds {unknown[0]!r}, which the model lacks"
        )
        raise ValueError(f"{problem}: it is of another model (code or configuration)")
    for name, (dtype, shape) in needed.items():
        there = stored[name][1]
        if _of_table(name) in grown and shape and there and there[0] < shape[0]:
            there = (shape[0], *there[1:])
        if (stored[name][0], there) != (dtype, shape):
            raise ValueError(
                f"holds {name!r} of shape {stored[name][1]} and type {stored[name][0]}, the model's is {shape}, {dtype}"
            )


def _of_table(name: str) -> str | None:
    """The table that a tensor belongs to, `tables/TABLE` or `tables_optimizer/TABLE/STATE`; None for dense ones."""
    kind, _, rest = name.partition("/")
    return rest.split("/")[0] if kind in ("tables", "tables_optimizer") else None


def fill(store: Store, checkpoint: Checkpoint, pieces: list[LivePiece]) -> None:
    """Read every value of `pieces` from a checkpoint that `check_fits`, and from its base what it leaves out.

    Raises:
        ChunkError: bytes that are needed are not what was written.
        OSError: they cannot be read.
    """
    if checkpoint.base is not None:
        fill(store, checkpoint.base, pieces)
    folder, manifest = step_folder(checkpoint.step), checkpoint.manifest
    groups = list(_grouped(sorted(_reads(manifest, pieces), key=lambda read: (read.file, read.start))))
    memory = ThreadMemory()
    threads = min(MAX_THREADS, len(os.sched_getaffinity(0)))
    with ThreadPoolExecutor(threads) as pool:
        # The first error ends the load.
        for _ in pool.map(partial(_fill_group, store, folder, manifest, memory), groups):
            pass
        rows = _row_reads(store, folder, manifest, pieces)
        for _ in pool.map(partial(_fill_rows, store, folder, manifest, memory), rows):
            pass


def _reads(manifest: Manifest, pieces: list[LivePiece]) -> Iterator[_Read]:
    for live in pieces:
        stored = manifest.tensors[live.name]
        for piece in stored.pieces:
            part = piece.region.overlap(live.region)
            if part is not None and piece.rows is None:
                yield from _rows(piece.file, piece.start, stored.dtype, piece.region, part, live)


def _rows(file: str, start: int, dtype: str, stored: Region, part: Region, live: LivePiece) -> Iterator[_Read]:
    """The rows of `stored` that `part` touches, in runs of at most `GROUP_BYTES`."""
    torch_dtype = getattr(torch, dtype)
    if not stored.sizes:
        yield _Read(file, start, torch_dtype, stored, part, live.tensor)
        return
    row_bytes = stored.numel // stored.sizes[0] * DTYPE_BYTES[dtype]
    step = max(1, GROUP_BYTES // row_bytes)
    end = part.offsets[0] + part.sizes[0]
    for first in range(part.offsets[0], end, step):
        count = min(step, end - first)
        run = Region((first, *part.offsets[1:]), (count, *part.sizes[1:]))
        yield _Read(
            file,
            start + (first - stored.offsets[0]) * row_bytes,
            torch_dtype,
            Region((first, *stored.offsets[1:]), (count, *stored.sizes[1:])),
            run,
            narrowed(live.tensor, live.region, run),
        )


def _grouped(reads: list[_Read]) -> Iterator[list[_Read]]:
    """Neighbours in a file together, as many as make `GROUP_BYTES`."""
    group: list[_Read] = []
    num_bytes = 0
    for read in reads:
        if group and (group[0].file != read.file or num_bytes >= GROUP_BYTES):
            yield group
            group, num_bytes = [], 0
        group.append(read)
        num_bytes += read.num_bytes
    if group:
        yield group


def _fill_group(store: Store, folder: str, manifest: Manifest, memory: ThreadMemory, reads: list[_Read]) -> None:
    file = reads[0].file
    name = f"{folder}/{file}"
    reader = ChunkReader(name, manifest.files[file], partial(store.read_into, name), memory)
    for read in reads:
        content = reader.bytes(read.start, read.start + read.num_bytes)
        values = torch.frombuffer(content, dtype=read.dtype).view(read.rows.sizes)
        read.target.copy_(narrowed(values, read.rows, read.part))


@dataclass(frozen=True, slots=True)
class _RowsRead:
    """Rows of a stored piece that holds them by their numbers, one after another there and anywhere in `target`."""

    file: str
    start: int
    values: Region
    """The region that is read of the stored rows, counted from the first of them."""
    part: Region
    """What goes into `target`."""
    places: Tensor
    """[rows] int64, in `target`."""
    target: Tensor


def _row_reads(store: Store, folder: str, manifest: Manifest, pieces: list[LivePiece]) -> Iterator[_RowsRead]:
    """In runs of at most `GROUP_BYTES`; reads the rows' numbers.

    Raises:
        ChunkError, OSError: they cannot be read.
    """
    for live in pieces:
        stored = manifest.tensors[live.name]
        for piece in stored.pieces:
            part = piece.region.overlap(live.region)
            if part is None or piece.rows is None or not piece.rows.count:
                continue
            name = f"{folder}/{piece.file}"
            reader = ChunkReader(name, manifest.files[piece.file], partial(store.read_into, name))
            numbers = reader.bytes(piece.rows.start, piece.rows.start + 8 * piece.rows.count)
            rows = torch.frombuffer(numbers, dtype=torch.int64)
            if (rows[1:] <= rows[:-1]).any():
                raise ChunkError(f"{name} does not name the rows of {live.name!r} in ascending order")
            ends = torch.tensor([part.offsets[0], part.offsets[0] + part.sizes[0]])
            first, last = torch.searchsorted(rows, ends).tolist()
            row_bytes = prod(piece.region.sizes[1:]) * DTYPE_BYTES[stored.dtype]
            target, step = narrowed(live.tensor, live.region, part), max(1, GROUP_BYTES // row_bytes)
            for begin in range(first, last, step):
                places = rows[begin : min(begin + step, last)] - part.offsets[0]
                yield _RowsRead(
                    piece.file,
                    piece.start + begin * row_bytes,
                    Region((0, *piece.region.offsets[1:]), (len(places), *piece.region.sizes[1:])),
                    Region((0, *part.offsets[1:]), (len(places), *part.sizes[1:])),
                    places,
                    target,
                )


def _fill_rows(store: Store, folder: str, manifest: Manifest, memory: ThreadMemory, read: _RowsRead) -> None:
    name = f"{folder}/{read.file}"
    reader = ChunkReader(name, manifest.files[read.file], partial(store.read_into, name), memory)
    device, dtype = read.target.device, read.target.dtype
    content = reader.bytes(read.start, read.start + read.values.numel * dtype.itemsize)
    values = narrowed(torch.frombuffer(content, dtype=dtype).view(read.values.sizes), read.values, read.part)
    read.target.index_copy_(0, read.places.to(device), values.to(device))
