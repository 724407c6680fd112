"""The one object that keeps a run's state safe: the loop says `save` and nothing else.

    save: wait for the save before -> finite? -> copy -> [own thread: write -> all ranks agree -> commit -> retention]

The thread of every rank talks to the others by a gloo group of its own, so nothing of it touches the training.
"""

import logging
import time
from collections.abc import Callable, Collection
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext, suppress
from dataclasses import dataclass, replace
from datetime import timedelta

import torch.distributed as dist

from trainer.checkpoint.catalogue import (
    MANIFEST,
    Catalogue,
    Newest,
    step_folder,
)
from trainer.checkpoint.chunks import FileRecord, write_chunks
from trainer.checkpoint.deltas import Contents, Deltas
from trainer.checkpoint.layout import dtype_name, lay_out
from trainer.checkpoint.loading import gather, refused_alike
from trainer.checkpoint.manifest import (
    COMPLETE,
    Manifest,
    StoredPiece,
    StoredRows,
    StoredTensor,
    digest,
    writing_versions,
)
from trainer.checkpoint.pieces import Tensors, Touched, not_finite, written_pieces
from trainer.checkpoint.progress import Progress
from trainer.checkpoint.restoring import Restart, Restoring
from trainer.checkpoint.retention import best_step, superfluous
from trainer.checkpoint.staging import Staging, check_memory
from trainer.config import CheckpointConfig
from trainer.health.watchdog import Phase
from trainer.parallel.mesh import Mesh
from trainer.run.run_dir import RunDir
from trainer.run.writing import MEND, write_json

logger = logging.getLogger(__name__)

PATIENCE = timedelta(days=1)
"""How long a rank waits for the slowest one's file; ranks that die are noticed at once."""


@dataclass(frozen=True, slots=True)
class _Part:
    """What a rank says of its file, or why there is none."""

    record: FileRecord
    tensors: dict[str, StoredTensor]
    problem: str | None = None


class Checkpointer:
    """Saves and restores a run.  All methods are called by every rank."""

    def __init__(
        self,
        run: RunDir,
        catalogue: Catalogue,
        mesh: Mesh,
        tensors: Callable[[], Tensors],
        config: CheckpointConfig,
        *,
        phase: Phase = nullcontext,
        grown: Collection[str] = (),
        touched: Touched | None = None,
        check_ours: Callable[[], None] = lambda: None,
    ) -> None:
        """`tensors` returns the live state, `phase` tells a watchdog what goes on; needs the job's process group.
        `check_ours`, called by the first rank before it writes, raises ValueError where the run is another job's now.

        `grown` names tables that may have more rows than a checkpoint: keys have come in since.  `touched` knows the
        rows that deltas hold; without it every checkpoint is full.
        """
        self._phase = phase
        self._run, self._catalogue, self._mesh = run, catalogue, mesh
        self._tensors, self._config = tensors, config
        self._check_ours = check_ours
        self._group = dist.new_group(backend="gloo", timeout=PATIENCE)  # every rank
        self._restoring = Restoring(run, catalogue, mesh, tensors, self._group, strict=config.strict, grown=grown)
        self._deltas = Deltas(config, touched, self._group)
        self._staging: Staging | None = None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: Future[None] | None = None
        self._newest_step: int | None = None
        self._full_digest: str | None = None
        """On the first rank: of the newest full checkpoint of this start."""
        self._started = 0.0

    def restore(self, newest: Newest) -> Restart:
        """As `Restoring.restore`.  The next save is a full one."""
        restart = self._restoring.restore(newest)
        self._deltas.restart()
        self._newest_step = restart.saved
        return restart

    def reserve(self) -> None:
        """Take the memory for copies beside the training, which the first save needs, unless it is taken: before the
        first step, so that what is missing is told before work is lost, and no save takes longer than others.

        Raises, on every rank alike:
            ValueError: a machine has less free memory than its ranks need, or less that can be page-locked.
        """
        if not self._config.asynchronous or self._staging is not None:
            return
        tensors, mesh = self._tensors(), self._mesh
        pieces = written_pieces(tensors, mesh.rank, mesh.world_size)
        state, room = lay_out(pieces).num_bytes, self._deltas.room(pieces, tensors)
        # Every rank looks before the first one takes.
        with refused_alike(self._group):
            check_memory(state + room, mesh.local_world_size)
        with refused_alike(self._group):
            self._staging = Staging(state, room, mesh.device)

    def save(self, progress: Progress) -> None:
        """Save the state of `progress.step`; returns when the live tensors may change, while writing goes on.

        A step that is saved already is not saved again.

        Raises, on every rank alike:
            FloatingPointError: a tensor holds a number that is not finite; nothing is written or deleted.
            OSError: the save before this one could not be written.
        """
        self.wait()
        if progress.step != self._newest_step:
            with self._phase("save"):
                self._copy(progress)
        if not self._config.asynchronous:
            self.wait()

    def _copy(self, progress: Progress) -> None:
        """Check and copy the state, and let the thread begin."""
        self._started = time.monotonic()
        tensors = self._tensors()
        self._check_finite(tensors, progress.step)
        pieces = written_pieces(tensors, self._mesh.rank, self._mesh.world_size)
        self.reserve()
        contents = self._deltas.contents(pieces, tensors, None if self._staging is None else self._staging.state)
        if self._staging is not None:
            self._staging.fill(contents.copied, as_delta=contents.rows is not None)
        self._pending = self._thread.submit(self._write, contents, replace(progress))

    def wait(self) -> None:
        """Return when what was saved is complete.

        Raises, on every rank alike:
            OSError: it cannot be written.
            ValueError: another job has taken the run over.
        """
        pending, self._pending = self._pending, None
        if pending is not None:
            with self._phase("writing"):
                pending.result()

    def close(self) -> None:
        """Let a save that is under way come to its end; says what went wrong with it, but does not raise."""
        self._thread.shutdown(wait=True)
        if self._staging is not None:
            self._staging.close()

    def _check_finite(self, tensors: Tensors, step: int) -> None:
        mine = not_finite(written_pieces(tensors, self._mesh.rank, self._mesh.world_size))
        broken = [name for names in gather(mine, self._group) for name in names]
        if broken:
            saved = self._newest_step
            newest = "there is no checkpoint yet" if saved is None else f"the newest checkpoint is of step {saved}"
            raise FloatingPointError(
                f"{broken[0]} is not finite after step {step}, which is not saved; {newest}: "
                "start again in another --run-dir with lower learning rates or a longer schedule.warmup_steps"
            )

    def _write(self, contents: Contents, progress: Progress) -> None:
        """Runs in the thread: write this rank's file; the first rank commits when every file is there."""
        with refused_alike(self._group):
            if self._mesh.is_first:
                # Before anything is written or cleared away, which may be the other job's.
                self._check_ours()
                self._catalogue.check_claim()
        parts = gather(self._write_part(contents, step_folder(progress.step)), self._group)
        problem = next((f"{part.problem}; {MEND}" for part in parts if part.problem is not None), None)
        if problem is None and self._mesh.is_first:
            try:
                self._commit(parts, progress, contents.base)
            except ValueError as error:
                problem = str(error)
            except OSError as error:
                problem = str(error) if MEND in str(error) else f"{error}; {MEND}"
        problem = gather(problem, self._group)[0]
        if problem is None:
            self._newest_step = progress.step
            self._deltas.completed(contents, progress.step)
            return
        if self._mesh.is_first:
            self._give_up(progress.step)
        raise OSError(f"the checkpoint of step {progress.step} cannot be written: {problem}")

    def _write_part(self, contents: Contents, folder: str) -> _Part:
        layout, name = contents.file, f"rank-{self._mesh.rank:05d}.bin"
        tensors: dict[str, StoredTensor] = {}
        for place in layout.places:
            piece = place.piece
            known = tensors.setdefault(piece.name, StoredTensor(dtype_name(piece.tensor.dtype), piece.shape, ()))
            rows = None if piece.rows is None else StoredRows(place.rows_start, len(piece.rows))
            pieces = (*known.pieces, StoredPiece(name, place.start, piece.region, rows))
            tensors[piece.name] = replace(known, pieces=pieces)
        try:
            if self._staging is not None:
                if contents.copied is not layout:
                    self._staging.fold(contents.copied, layout)
                path, as_delta = f"{folder}/{name}", layout is contents.rows
                record = self._staging.write(self._catalogue.store, path, layout.num_bytes, as_delta=as_delta)
            else:
                with self._catalogue.store.writing(f"{folder}/{name}") as file:
                    record = write_chunks(file, layout.blocks())
        except OSError as error:
            # What was written of it makes room; where even that fails, the error itself is what the others wait for.
            with suppress(OSError):
                self._catalogue.store.remove_file(f"{folder}/{name}")
            return _Part(FileRecord(0, ()), {}, str(error))
        return _Part(record, tensors)

    def _commit(self, parts: list[_Part], progress: Progress, base: int | None) -> None:
        """Every file has reached the disk: let the checkpoint count, then delete what it makes superfluous."""
        store, folder = self._catalogue.store, step_folder(progress.step)
        tensors: dict[str, StoredTensor] = {}
        for part in parts:
            for name, tensor in part.tensors.items():
                known = tensors.setdefault(name, replace(tensor, pieces=()))
                tensors[name] = replace(known, pieces=known.pieces + tensor.pieces)
        files = {f"rank-{rank:05d}.bin": part.record for rank, part in enumerate(parts)}
        self._catalogue.check_all_there(folder, files)
        if base is not None:
            self._catalogue.check_is(base, self._full_digest)
        content = Manifest(
            progress=progress,
            world_size=self._mesh.world_size,
            base=base,
            base_digest=None if base is None else self._full_digest,
            versions=writing_versions(),
            files=files,
            tensors=tensors,
        ).encode()
        with store.writing(f"{folder}/{MANIFEST}") as file:
            file.write(content)
        # What the run wrote up to this step belongs to the state of this step.
        self._run.flush()
        store.settle(folder)
        with store.writing(f"{folder}/{COMPLETE}") as file:
            file.write(digest(content).encode())
        store.settle(folder)
        if base is None:
            self._full_digest = digest(content)
        # How long before an allocation's end a launcher must warn the run; and from now on it must not begin anew.
        write_json(self._run.saving_file, {"step": progress.step, "seconds": time.monotonic() - self._started})
        logger.info("checkpoint of step %d is complete: %s/%s", progress.step, store.address, folder)
        try:
            self._remove_superfluous()
        except (OSError, ValueError) as error:
            logger.error("older checkpoints are kept, because it is not known which of them are needed: %s", error)

    def _remove_superfluous(self) -> None:
        steps = self._catalogue.steps()
        best = best_step(self._run.eval_file, self._config.keep_best, steps)
        pinned = filter(self._catalogue.is_pinned, steps)
        needed = set[int | None]()
        # Newest first: where a delta cannot be removed, what it needs stays with it.
        for step in superfluous(steps, self._config, (best, *pinned), self._catalogue.base):
            base = self._catalogue.base(step)
            if step not in needed and not self._catalogue.remove(step):
                needed.add(base)

    def _give_up(self, step: int) -> None:
        """Free what an unfinished checkpoint takes; where even that fails, the next start does it."""
        try:
            self._catalogue.clear_leftovers()
        except OSError as error:
            logger.error("what was written of step %d cannot be removed: %s", step, error)
