"""Start a run from another run's newest checkpoint: `train --init-from RUN_DIR`.

Rows of a table follow the keys behind their ids, not their numbers: where the other run's data had fewer keys, the new
ones keep their initial rows; where keys were numbered anew, each row is looked for by its key.
"""

import logging
from collections.abc import Collection, Iterator
from pathlib import Path, PurePosixPath
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch.distributed as dist

from pipelines.columns import IntArray
from pipelines.dataset_json import open_filesystem, read_dataset_info
from pipelines.features import DatasetInfo, Space
from pipelines.vocabulary import earlier_digests, vocabularies
from trainer.checkpoint.catalogue import Checkpoint, DamagedCheckpoint, open_catalogue
from trainer.checkpoint.chunks import ChunkError
from trainer.checkpoint.layout import dtype_name
from trainer.checkpoint.loading import fill, gather
from trainer.checkpoint.manifest import StoredTensor
from trainer.checkpoint.pieces import LivePiece, Tensors, local_pieces, narrowed
from trainer.checkpoint.region import Region
from trainer.command_line import WrongUse
from trainer.config import TrainConfig
from trainer.run_dir import RunDir
from trainer.typed_values import from_dict

logger = logging.getLogger(__name__)

InitPart = Literal["tables", "dense", "optimizers"]
INIT_PARTS: tuple[InitPart, ...] = ("tables", "dense", "optimizers")
_PREFIXES: dict[str, InitPart] = {
    "tables": "tables",
    "tables_optimizer": "optimizers",
    "dense": "dense",
    "dense_optimizer": "optimizers",
}
"""The part that a tensor belongs to, by the first word of its name."""


class WarmStart:
    """What another run offers to start from.  Making one reads and checks it, and changes nothing."""

    def __init__(self, run_dir: Path, path: str, info: DatasetInfo, parts: Collection[str]) -> None:
        """`info` describes the data at `path`, of the run that is to start.

        Raises:
            WrongUse: `run_dir` holds no run with a complete checkpoint, or a part is unknown.
        """
        unknown = sorted(set(parts) - set(INIT_PARTS))
        if unknown or not parts:
            raise WrongUse(f"--init-parts must name some of {', '.join(INIT_PARTS)}, got {', '.join(parts) or 'none'}")
        run = RunDir(run_dir)
        saved = run.saved_config()
        if saved is None:
            raise WrongUse(f"--init-from {run_dir} holds no config.json: name a run directory that `train` made")
        self._run, self._path, self._info, self._parts = run, path, info, set(parts)
        self._known = run.saved_vocabularies()
        other = from_dict(TrainConfig, saved)
        self._old_path = other.data.path
        self._catalogue = open_catalogue(run, other.checkpoint.store)
        newest = self._catalogue.newest().checkpoint
        if newest is None:
            raise WrongUse(f"--init-from {run_dir} holds no complete checkpoint")
        self._checkpoint: Checkpoint = newest
        self._rows: dict[str, IntArray] = {}

    def load(self, tensors: Tensors, group: dist.ProcessGroup) -> None:
        """Fill what the other run has of `tensors`, in place.  Called by every rank of `group`.

        Raises, on every rank alike:
            ValueError: a dense tensor or a table's width differs, or keys cannot be compared.
            DamagedCheckpoint: bytes of the checkpoint are not what was written.
        """
        problem, pieces = None, []
        try:
            for piece in local_pieces(tensors):
                pieces += self._found(piece)
        except ValueError as error:
            problem = str(error)
        self._agree(problem, group)
        reason = None
        try:
            fill(self._catalogue.store, self._checkpoint, pieces)
        except (ChunkError, OSError) as error:
            reason = str(error)
        reasons = [each for each in gather(reason, group) if each is not None]
        if reasons:
            raise DamagedCheckpoint(f"--init-from {self._run.path}: {reasons[0]}")
        taken = sorted({piece.name.split("/")[0] for piece in pieces})
        logger.info("started from step %d of %s: %s", self._checkpoint.step, self._run.path, ", ".join(taken))

    def _agree(self, problem: str | None, group: dist.ProcessGroup) -> None:
        problems = [each for each in gather(problem, group) if each is not None]
        if problems:
            raise ValueError(f"--init-from {self._run.path}: {problems[0]}")

    def _found(self, piece: LivePiece) -> list[LivePiece]:
        """The parts of a live tensor that the checkpoint has, by the place that they have there."""
        kind, name = piece.name.split("/", 1)
        if _PREFIXES[kind] not in self._parts:
            return []
        stored = self._checkpoint.manifest.tensors.get(piece.name)
        if stored is None:
            if kind.startswith("tables"):
                return []  # a table that the other model did not have
            raise ValueError(f"the checkpoint lacks {piece.name!r}: leave {_PREFIXES[kind]} out by --init-parts")
        of_rows = kind.startswith("tables") and bool(piece.shape)
        self._check_shape(piece, stored, of_rows)
        if not of_rows:
            return [piece]
        return list(_by_rows(piece, self._rows_of(name.split("/")[0], stored.shape[0])))

    def _check_shape(self, piece: LivePiece, stored: StoredTensor, of_rows: bool) -> None:
        first, dtype = int(of_rows), dtype_name(piece.tensor.dtype)
        same = stored.shape[first:] == piece.shape[first:] and len(stored.shape) == len(piece.shape)
        if not same or stored.dtype != dtype:
            raise ValueError(
                f"{piece.name!r} has the shape {stored.shape} and type {stored.dtype} there, {piece.shape} and {dtype} "
                f"here: leave {_PREFIXES[piece.name.split('/')[0]]} out by --init-parts, or make the models alike"
            )

    def _rows_of(self, table: str, num_rows: int) -> IntArray:
        """[rows here] the row there of each id, -1 where there is none."""
        if table not in self._rows:
            self._rows[table] = self._map_rows(table, num_rows)
        return self._rows[table]

    def _map_rows(self, table: str, num_rows: int) -> IntArray:
        space = self._info.spaces[table]
        known, digest = self._known.get(table), vocabularies(self._info).get(table)
        same = np.arange(space.rows)
        unkeyed = known is None and digest is None
        # Without keys, as of a hash, ids mean the same only where there are as many.
        if (num_rows == space.rows) if unkeyed else known in (digest, *earlier_digests(self._info, table)):
            logger.info("table %s: ids mean what they meant", table)
            return np.where(same < num_rows, same, -1)
        if known is None or digest is None:
            raise ValueError(
                f"ids of table {table!r} cannot be compared: one of the data sets has no keys for them, and the tables "
                f"have {num_rows} and {space.rows} rows; leave tables out by --init-parts"
            )
        return self._by_key(table, space, num_rows)

    def _by_key(self, table: str, space: Space, num_rows: int) -> IntArray:
        """Rows by the keys of both data sets."""
        old_info = read_dataset_info(self._old_path)
        if vocabularies(old_info).get(table) != self._known[table]:
            raise ValueError(
                f"keys of table {table!r} were numbered anew, and {self._old_path} no longer holds those that "
                "the other run was trained with: leave tables out by --init-parts"
            )
        old, new = _keys(self._old_path, old_info.spaces[table]), _keys(self._path, space)
        if old[0].type != new[0].type:
            old, new = (old[0].cast(pa.string()), old[1]), (new[0].cast(pa.string()), new[1])
        place = pc.index_in(new[0], value_set=old[0]).fill_null(-1).to_numpy()
        rows = np.full(space.rows, -1, dtype=np.int64)
        rows[0] = 0
        rows[new[1]] = np.where(place >= 0, old[1][place], -1)
        rows[rows >= num_rows] = -1
        logger.info("table %s: %d of %d keys found by name", table, int((rows >= 0).sum()), space.used)
        return rows


def _by_rows(piece: LivePiece, rows: IntArray) -> Iterator[LivePiece]:
    """The parts of a live piece whose rows stand together in the checkpoint too, as they lie there; `rows` maps ids."""
    first, count = piece.region.offsets[0], piece.region.sizes[0]
    there = rows[first : first + count]
    starts = np.flatnonzero(np.diff(there, prepend=there[:1] - 2) != 1) if count else np.zeros(0, dtype=np.int64)
    for start, end in zip(starts.tolist(), [*starts[1:].tolist(), count], strict=True):
        if there[start] < 0:
            continue
        offsets, sizes = piece.region.offsets[1:], piece.region.sizes[1:]
        here = Region((first + start, *offsets), (end - start, *sizes))
        region = Region((int(there[start]), *offsets), (end - start, *sizes))
        yield LivePiece(piece.name, piece.shape, region, narrowed(piece.tensor, piece.region, here))


def _keys(path: str, space: Space) -> tuple[pa.Array, IntArray]:
    """(the keys of a space, the id of each)."""
    if space.keys is None:
        raise ValueError(f"{path} has no file of the keys of {space.name!r}: leave tables out by --init-parts")
    filesystem, folder = open_filesystem(path)
    table = pq.read_table(str(PurePosixPath(folder) / space.keys), filesystem=filesystem).combine_chunks()
    keys, ids = table.columns[:2]
    return keys.combine_chunks(), ids.to_numpy().astype(np.int64)
