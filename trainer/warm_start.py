"""Start a run from another run's newest checkpoint: `train --init-from RUN_DIR`, or from parts of it: `--init-only`.

Rows of a table follow the keys behind their ids, not their numbers: where the other run's data had fewer keys, the new
ones keep their initial rows; where keys were numbered anew, each row is looked for by its key.
"""

import logging
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
import torch.distributed as dist

from embeddings.rows.trained import TRAINED_ELSEWHERE
from pipelines.features import DatasetInfo, Space
from pipelines.storage.columns import IntArray
from pipelines.storage.dataset_json import read_dataset_info
from pipelines.storage.keys import key_columns
from pipelines.storage.vocabulary import ACTIONS, earlier_digests, vocabularies
from trainer.checkpoint.catalogue import Checkpoint, open_catalogue
from trainer.checkpoint.chunks import ChunkError
from trainer.checkpoint.layout import dtype_name
from trainer.checkpoint.loading import fill, gather, refused_alike
from trainer.checkpoint.manifest import StoredTensor
from trainer.checkpoint.pieces import LivePiece, Tensors, local_pieces, narrowed
from trainer.checkpoint.region import Region
from trainer.command_line import WrongUse
from trainer.name_patterns import renaming
from trainer.run.run_dir import RunDir

logger = logging.getLogger(__name__)

MAPS = "ids"
"""The part of a checkpoint with the maps of unbounded ids."""


@dataclass(frozen=True, slots=True)
class _Taken:
    """What was found for a tensor."""

    source: str
    """The name of the part in the other run."""
    rows: tuple[int, int] | None
    """For a table: (rows that were found, rows that there are); None for other parts."""


class WarmStart:
    """What another run offers to start from.  Making one reads and checks it, and changes nothing."""

    def __init__(self, run_dir: Path, path: str, info: DatasetInfo, only: Sequence[str]) -> None:
        """`info` describes the data at `path`, of the run that is to start; `only` names what is taken, as `Renaming`,
        all if it is empty.

        Raises:
            WrongUse: `run_dir` holds no run with a complete checkpoint, or nothing of such a name.
        """
        run = RunDir(run_dir)
        other = run.trained_config()
        self._run, self._path, self._info = run, path, info
        self._known = run.saved_vocabularies()
        self._old_path = other.data.path
        self._catalogue = open_catalogue(run, other.checkpoint.store)
        newest = self._catalogue.newest().checkpoint
        if newest is None:
            raise WrongUse(f"--init-from {run_dir} holds no complete checkpoint")
        self._checkpoint: Checkpoint = newest
        self._all = not only
        actions = vocabularies(info)[ACTIONS]
        if self._all and self._known.get(ACTIONS, actions) != actions:
            raise WrongUse(
                f"--init-from {run_dir} learnt the actions {self._known[ACTIONS]}, but {path} has {actions}: name what "
                "means the same here by --init-only, as 'tables/*'"
            )
        try:
            self._renamings = [renaming(text) for text in only] or [renaming("*")]
            self._sources = self._choose()
        except ValueError as error:
            raise WrongUse(f"--init-only {error}") from None
        self._rows: dict[tuple[str, str], IntArray] = {}

    def _choose(self) -> dict[str, str]:
        """Name here -> name there, of all that the patterns mean."""
        sources: dict[str, str] = {}
        stored = self._checkpoint.manifest.tensors
        for each in self._renamings:
            found = {here: there for there in stored if (here := each(there)) is not None}
            if not found:
                raise ValueError(f"{each} is none of the names in {self._run.path}, as {', '.join(_examples(stored))}")
            for here, there in found.items():
                if _kind(here) != _kind(there):
                    raise ValueError(f"{each} would make {there!r} another part of the model, {here!r}")
                if sources.setdefault(here, there) != there:
                    raise ValueError(
                        f"{each} takes {there!r} for {here!r}, for which {sources[here]!r} is taken already"
                    )
        return sources

    def load(self, tensors: Tensors, group: dist.ProcessGroup) -> None:
        """Fill what the other run has of `tensors`, in place, and log what that was.  Called by every rank of `group`.

        Raises, on every rank alike:
            ValueError: a tensor's shape or type differs, keys cannot be compared, or a name is none of the model's.
            DamagedCheckpoint: bytes of the checkpoint are not what was written.
            OSError: they cannot be read.
        """
        pieces = []
        taken: dict[str, _Taken] = {}
        live = local_pieces(tensors)
        with refused_alike(group, f"--init-from {self._run.path}: "):
            self._check_maps(tensors)
            for piece in live:
                found, part = self._found(piece)
                if found is not None:
                    taken[piece.name] = found
                    pieces.append((found.source, part))
        # A rank has no name for a table of which it holds no shard.
        names = sorted({name for each in gather(list(tensors), group) for name in each})
        taken = {name: found for each in gather(taken, group) for name, found in each.items()}
        self._check_all_used(names)
        failure = None
        try:
            fill(self._catalogue.store, self._checkpoint, [part for _, parts in pieces for part in parts])
            for piece in live:
                self._mark_trained(piece)
        except (ChunkError, OSError) as error:
            failure = self._catalogue.unread(self._checkpoint.step, error)
        for each in gather(failure, group):
            if each is not None:
                raise each
        left = sorted(set(self._checkpoint.manifest.tensors) - {found.source for found in taken.values()})
        lines = [*_table(names, taken), *(f"  {name:<50} not taken" for name in left if _is_weight(name))]
        logger.info("started from step %d of %s:\n%s", self._checkpoint.step, self._run.path, "\n".join(lines))

    def _check_all_used(self, names: Collection[str]) -> None:
        """Raise ValueError if a pattern was given that means nothing of the model, whose tensors have these `names`."""
        for each in self._renamings:
            means = {each(there) for there in self._checkpoint.manifest.tensors} - {None}
            if not self._all and means.isdisjoint(names):
                raise ValueError(
                    f"--init-only {each} is nothing of this model, which has {', '.join(_examples(names))}"
                )

    def _check_maps(self, tensors: Tensors) -> None:
        """Raise ValueError if rows of unbounded ids would come without the map that says whose they are, or the map
        alone."""
        for table in self._info.spaces:
            rows, keys = f"tables/{table}", f"{MAPS}/{table}/keys"
            source = self._sources.get(rows)
            needed = None if source is None else f"{MAPS}/{_table_of(source)}/keys"
            if needed is not None and (needed in self._checkpoint.manifest.tensors) != (keys in tensors):
                here, there = ("here", "there") if keys in tensors else ("there", "here")
                raise ValueError(
                    f"ids of table {table!r} are unbounded {here} and not {there}: name what else is to be taken by "
                    "--init-only"
                )
            if keys in tensors and self._sources.get(keys) != needed:
                raise ValueError(
                    f"rows of unbounded ids mean nothing without their map: name {rows!r} and '{MAPS}/{table}/*' "
                    "together by --init-only"
                )

    def _found(self, piece: LivePiece) -> tuple[_Taken | None, list[LivePiece]]:
        """What the checkpoint has for a live tensor, and the parts of it by the place that they have there."""
        source = self._sources.get(piece.name)
        of_rows = _kind(piece.name).startswith("tables") and bool(piece.shape)
        if source is None:
            # A table that the other model did not have is a reason to take the others.
            if self._all and not of_rows and _kind(piece.name) != MAPS:
                raise ValueError(f"the checkpoint lacks {piece.name!r}: name what is to be taken by --init-only")
            return None, []
        stored = self._checkpoint.manifest.tensors[source]
        self._check_shape(piece, source, stored, of_rows)
        there = replace(piece, name=source, shape=stored.shape)
        if not of_rows:
            return _Taken(source, None), [there]
        rows = self._rows_of(_table_of(piece.name), _table_of(source), stored.shape[0])
        return _Taken(source, (int((rows >= 0).sum()), len(rows))), list(_by_rows(there, rows))

    def _mark_trained(self, piece: LivePiece) -> None:
        """If a table is taken without its optimizer, mark in the new optimizer's state which rows were trained.

        See `embeddings.rows.trained`; the first update swallows so small a number.
        """
        source = self._sources.get(f"tables/{_table_of(piece.name)}")
        if source is None or _kind(piece.name) != "tables_optimizer" or piece.name in self._sources or not piece.shape:
            return
        stored = self._checkpoint.manifest.tensors
        rows = self._rows_of(_table_of(piece.name), _table_of(source), stored[source].shape[0])
        prefix = f"tables_optimizer/{_table_of(source)}/"
        states = {name: each.shape[1:] for name, each in stored.items() if name.startswith(prefix) and each.shape}
        first, count = piece.region.offsets[0], piece.region.sizes[0]
        # Without any state, as of plain SGD, nobody knows better than that all rows are trained.
        trained = torch.from_numpy(rows[first : first + count] >= 0) & (not states)
        for name, columns in states.items():
            there = torch.zeros(count, *columns)
            region = Region((first, *(0 for _ in columns)), (count, *columns))
            whole = LivePiece(name, (len(rows), *columns), region, there)
            fill(self._catalogue.store, self._checkpoint, list(_by_rows(whole, rows)))
            trained |= (there.reshape(count, -1) != 0).any(1)
        piece.tensor[trained.to(piece.tensor.device)] = TRAINED_ELSEWHERE

    def _check_shape(self, piece: LivePiece, source: str, stored: StoredTensor, of_rows: bool) -> None:
        first, dtype = int(of_rows), dtype_name(piece.tensor.dtype)
        same = stored.shape[first:] == piece.shape[first:] and len(stored.shape) == len(piece.shape)
        if not same or stored.dtype != dtype:
            raise ValueError(
                f"{source!r} has the shape {stored.shape} and type {stored.dtype} there, {piece.name!r} {piece.shape} "
                f"and {dtype} here: make the models alike, or name what is to be taken by --init-only"
            )

    def _rows_of(self, table: str, source: str, num_rows: int) -> IntArray:
        """[rows here] the row there of each id, -1 where there is none."""
        if (table, source) not in self._rows:
            self._rows[table, source] = self._map_rows(table, source, num_rows)
        return self._rows[table, source]

    def _map_rows(self, table: str, source: str, num_rows: int) -> IntArray:
        space = self._info.spaces[table]
        known, digest = self._known.get(source), vocabularies(self._info).get(table)
        same = np.arange(space.rows)
        unkeyed = known is None and digest is None
        # Without keys, as of a hash, ids mean the same only where there are as many.
        if (num_rows == space.rows) if unkeyed else known in (digest, *earlier_digests(self._info, table)):
            logger.info("table %s: ids mean what they meant", table)
            return np.where(same < num_rows, same, -1)
        if known is None or digest is None:
            raise ValueError(
                f"ids of table {table!r} cannot be compared: one of the data sets has no keys for them, and the tables "
                f"have {num_rows} and {space.rows} rows; name what else is to be taken by --init-only"
            )
        return self._by_key(table, source, num_rows)

    def _by_key(self, table: str, source: str, num_rows: int) -> IntArray:
        """Rows by the keys of both data sets."""
        space, old_info = self._info.spaces[table], read_dataset_info(self._old_path)
        if vocabularies(old_info).get(source) != self._known[source]:
            raise ValueError(
                f"keys of table {source!r} were numbered anew, and {self._old_path} no longer holds those that "
                "the other run was trained with: name what else is to be taken by --init-only"
            )
        old, new = _keys(self._old_path, old_info.spaces[source]), _keys(self._path, space)
        if old[0].type != new[0].type:
            old, new = (old[0].cast(pa.string()), old[1]), (new[0].cast(pa.string()), new[1])
        place = pc.index_in(new[0], value_set=old[0]).fill_null(-1).to_numpy()
        rows = np.full(space.rows, -1, dtype=np.int64)
        rows[0] = 0
        rows[new[1]] = np.where(place >= 0, old[1][place], -1)
        rows[rows >= num_rows] = -1
        logger.info("table %s: %d of %d keys found by name", table, int((rows >= 0).sum()), space.used)
        return rows


def _kind(name: str) -> str:
    return name.split("/")[0]


def _table_of(name: str) -> str:
    return name.split("/")[1]


def _is_weight(name: str) -> bool:
    """Whether it is no optimizer's state."""
    return _kind(name) in ("tables", "dense")


def _examples(names: Collection[str]) -> list[str]:
    """One weight of each kind, for a message."""
    first = {_kind(name): name for name in sorted(names, reverse=True) if _is_weight(name)}
    return sorted(map(repr, first.values()))


def _table(names: Collection[str], taken: Mapping[str, _Taken]) -> Iterator[str]:
    """A line a weight of the model: what it begins with."""
    for name in filter(_is_weight, names):
        found = taken.get(name)
        if found is None:
            yield f"  {name:<50} begins anew"
            continue
        origin = "" if found.source == name else f" from {found.source}"
        rows = "" if found.rows is None else f", {found.rows[0]:,} of {found.rows[1]:,} rows"
        kind, _, rest = name.partition("/")
        of_optimizer = {slot in taken for slot in names if slot.startswith(f"{kind}_optimizer/{rest}/")}
        optimizer = "" if not of_optimizer else ", with its optimizer" if all(of_optimizer) else ", its optimizer anew"
        yield f"  {name:<50} taken{origin}{rows}{optimizer}"


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
        raise ValueError(
            f"{path} has no file of the keys of {space.name!r}: take none of its tables (--init-only 'dense/*')"
        )
    keys, ids = key_columns(path, space.keys, space.used)
    return keys.combine_chunks(), ids.to_numpy().astype(np.int64)
