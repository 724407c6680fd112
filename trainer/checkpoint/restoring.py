"""From the checkpoints that a start has found to the state that it resumes with.

all ranks see the same? -> can be written? -> clear up -> load, or the one before -> drop later lines
"""

import logging
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace

import torch.distributed as dist

from trainer.checkpoint.catalogue import Catalogue, Checkpoint, DamagedCheckpoint, Newest, step_folder
from trainer.checkpoint.loading import gather, load_checkpoint, refused_alike
from trainer.checkpoint.manifest import OtherFormat
from trainer.checkpoint.pieces import Tensors
from trainer.checkpoint.progress import Progress
from trainer.parallel.mesh import Mesh
from trainer.run.json_lines import JsonLines, forget_after, read_records
from trainer.run.run_dir import RunDir

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class Restart:
    """What a run begins with, or goes on with."""

    progress: Progress
    """How far the run had come."""
    saved: int | None
    """The step of its newest checkpoint; None where there is none."""
    evaluated: bool
    """Whether eval.jsonl has a line of that step; the same on every rank."""
    losses: dict[int, float]
    """On the first rank: what the steps that are taken again had as losses, as far as they were logged by as many
    ranks."""


class Restoring:
    """Restores a run.  All methods are called by every rank."""

    def __init__(
        self,
        run: RunDir,
        catalogue: Catalogue,
        mesh: Mesh,
        tensors: Callable[[], Tensors],
        group: dist.ProcessGroup,
        *,
        strict: bool,
        grown: Collection[str],
    ) -> None:
        """`tensors` returns the live state, `grown` names tables that may have more rows than a checkpoint; `strict`
        refuses to go on where the newest checkpoint is damaged."""
        self._run, self._catalogue, self._mesh = run, catalogue, mesh
        self._tensors, self._group = tensors, group
        self._strict, self._grown = strict, grown

    def restore(self, newest: Newest) -> Restart:
        """Load the newest checkpoint that is whole, put those that are not out of the way, and drop what the run wrote
        of later steps; the run is locked.

        Raises, on every rank alike:
            DamagedCheckpoint: none is left, with `checkpoint.strict` the newest is damaged, or the one that was asked
                for is.
            OSError: it cannot be read, no other could be written, or another job has just written one.
            ValueError: the checkpoint is of another model, or ranks see different files.
        """
        if self._strict:
            for damage in newest.damaged.values():
                raise damage
        found = newest.checkpoint
        # Every rank has read what is there before the first one changes anything.
        self._check_same_view(found.step if found else None)
        self._clear_up(newest)
        while found is not None:
            try:
                load_checkpoint(self._catalogue, found, self._tensors(), self._group, self._grown)
                break
            except DamagedCheckpoint as damage:
                if newest.exact:
                    raise
                found = self._one_before(found.step, damage)
        if self._mesh.is_first:
            for step in newest.abandoned:
                name = self._catalogue.set_aside(step, "abandoned")
                logger.warning("going back behind step %d: its checkpoint is called %s now", step, name)
        return self._restart(found)

    def _clear_up(self, newest: Newest) -> None:
        trial, sees = "", False
        with refused_alike(self._group):
            if self._mesh.is_first:
                self._check_nothing_came(newest)
                trial = self._catalogue.begin_trial()
        trial = gather(trial, self._group)[0]  # every rank
        with refused_alike(self._group):
            sees = self._catalogue.sees_trial(trial)
        see = gather(sees, self._group)  # every rank
        with refused_alike(self._group):
            if self._mesh.is_first:
                self._catalogue.end_trial(trial)
                if not all(see):
                    raise ValueError(
                        f"rank {see.index(False)} does not see what rank 0 writes to {self._catalogue.store.address}: "
                        "it must lie on a file system that all machines share"
                    )
                self._catalogue.clear_leftovers()
                self._set_aside(newest.damaged)

    def _check_nothing_came(self, newest: Newest) -> None:
        """The newest was looked for before the run was locked, while another job may have been at its end."""
        known = {newest.progress.step, *newest.damaged, *newest.abandoned}
        for step in self._catalogue.steps():
            if step > newest.progress.step and step not in known:
                raise OSError(
                    f"{self._catalogue.store.address}/{step_folder(step)} was written by another job while this one "
                    "began: start the same command again, which resumes from there"
                )

    def _restart(self, found: Checkpoint | None) -> Restart:
        progress = Progress() if found is None else replace(found.manifest.progress)
        evaluated, losses = False, {}
        if self._mesh.is_first:
            again = forget_after(self._run.metrics_file, progress.step)
            self._warn_of_lost_lines(progress.step)
            for file in self._run.evaluations():
                forget_after(file, progress.step)
            evaluated = progress.step in JsonLines(self._run.eval_file)
            losses = {line["step"]: line["loss"] for line in again if line["world_size"] == self._mesh.world_size}
        evaluated = gather(evaluated, self._group)[0]  # every rank
        return Restart(
            progress=progress, saved=None if found is None else found.step, evaluated=evaluated, losses=losses
        )

    def _warn_of_lost_lines(self, step: int) -> None:
        """A run directory that is older than its checkpoints, which lie in a store, lacks what was written since."""
        saved, lines = self._run.saved_config(), read_records(self._run.metrics_file)
        last = lines[-1]["step"] if lines else 0
        intervals = [1 if saved is None else saved["log_every"], *(len(line["imbalance_by_step"]) for line in lines)]
        if step - last >= max(intervals):
            logger.warning(
                "%s ends at step %d and the newest checkpoint is of step %d: the run directory is older than its "
                "checkpoints, perhaps a copy or a backup. The training goes on as it would have, but what was "
                "logged and evaluated in between is lost, and checkpoint.keep_best does not know of it",
                self._run.metrics_file,
                last,
                step,
            )

    def _check_same_view(self, step: int | None) -> None:
        views = gather(step, self._group)  # every rank
        if len(set(views)) > 1:
            raise ValueError(
                f"ranks see different newest checkpoints in {self._catalogue.store.address} (steps "
                f"{', '.join(map(str, views))}): it must lie on a file system that all machines share; one that shows "
                "files late, as NFS may for a minute, needs only the same command again"
            )

    def _one_before(self, step: int, damage: DamagedCheckpoint) -> Checkpoint:
        """The checkpoint before a damaged one, which the first rank puts out of the way; it is kept if none is left,
        for otherwise the next start would find an empty run."""
        found = None
        if self._mesh.is_first and not self._strict:
            try:
                older = self._catalogue.newest(below=step)
            except (DamagedCheckpoint, OtherFormat, OSError) as another:
                logger.error("%s", another)
            else:
                found = older.checkpoint
                if found is not None:
                    self._set_aside({step: damage} | older.damaged)
        found = gather(found, self._group)[0]  # every rank
        if found is None:
            raise damage if self._strict else self._catalogue.nothing_left(damage)
        return found

    def _set_aside(self, damaged: dict[int, DamagedCheckpoint]) -> None:
        for step, damage in damaged.items():
            name = self._catalogue.set_aside(step, "damaged")
            logger.error("%s; it is renamed to %s, and the run resumes from the one before it", damage, name)
