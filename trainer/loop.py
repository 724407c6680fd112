"""The training loop.

    next global batch -> learning rates, random numbers -> one step of the pipeline -> count -> log -> save -> evaluate

The pipeline (TorchRec's) pulls batches ahead of the step that trains on them, so what a step consumed is recorded when
a batch is pulled and taken from the record when its step is done: that position, not the reader's, is checkpointed.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist

from pipelines.overlap import StepPipeline
from trainer.checkpoint.checkpointer import Checkpointer
from trainer.checkpoint.progress import Progress
from trainer.config import TrainConfig
from trainer.evaluator import Evaluator
from trainer.health.stop_signal import STOP, StoppedEarly
from trainer.health.watchdog import Watchdog
from trainer.parallel.mesh import Mesh
from trainer.parallelize import ParallelModel
from trainer.steps.feed import Feed
from trainer.steps.step_log import StepLog


def agree_to_stop(mesh: Mesh) -> bool:
    """Whether any rank was asked to stop.  Called by every rank."""
    asked = torch.tensor(float(STOP.requested), device=mesh.device)
    dist.all_reduce(asked)  # every rank
    return bool(asked)


def stopped_after(step: int) -> StoppedEarly:
    """What is said when the run stops in good order."""
    return StoppedEarly(f"stopped after step {step}, which is saved: start the same command again to resume")


def seed_step(seed: int, step: int, rank: int) -> None:
    """Seed dropout as a function of seed, step and part of the batch: a resumed run draws what an uninterrupted one
    would."""
    torch.manual_seed(hash((seed, step, rank)) & (2**63 - 1))


@dataclass(frozen=True, kw_only=True, slots=True)
class Loop:
    """The parts that work together in every step, and the order in which they do."""

    model: ParallelModel
    feed: Feed
    progress: Progress
    """How far the run has come; each step moves it on."""
    pipeline: StepPipeline
    config: TrainConfig
    mesh: Mesh
    step_log: StepLog
    checkpointer: Checkpointer
    watchdog: Watchdog
    evaluator: Evaluator

    def run(self, *, evaluated: bool) -> None:
        """Train until the feed ends or `evaluation.target` is reached; save and evaluate when due, and at the end.

        Called by every rank.  An evaluation that was due where the run goes on and not made (`evaluated`) comes first.

        Raises:
            StoppedEarly: SIGTERM, SIGUSR1 or Ctrl-C came; the state of the last step is saved.
            NotFinite: the loss or the gradients of a step are not, found where it is logged or saved.
            OSError, FloatingPointError: the state cannot be written, or is not finite.
        """
        progress, step_log, evaluator = self.progress, self.step_log, self.evaluator
        self.model.module.train()
        factor, logs = None, False
        with self.watchdog.phase("evaluation"):
            evaluates = evaluator.begin(progress, evaluated=evaluated)
        for factor in self._steps():
            self.watchdog.stepped(progress.step)
            saves = _due(progress.step, self.config.checkpoint.every_steps)
            evaluates = evaluator.due(progress.step)
            logs = _due(progress.step, self.config.log_every)
            if logs:
                step_log.log(progress, factor)
            elif saves or evaluates:
                step_log.check_finite(progress)  # A step that spoils the model is named before what it spoils.
            stops = (logs or saves or evaluates) and agree_to_stop(self.mesh)
            if saves or stops:
                self._save()
            if stops:
                self.checkpointer.wait()
                raise stopped_after(progress.step)
            if evaluates or evaluator.meets_part(progress):
                self._between_steps(lambda: evaluator.look(progress))
        if factor is not None and not logs:
            # A run's last step is logged whatever its number: a short run has a metric too.
            step_log.log(progress, factor)
        self._save()
        if not evaluates:
            self._between_steps(lambda: evaluator.evaluate(progress.step))
        self.checkpointer.wait()

    def _steps(self) -> Iterator[float]:
        """Take one step after another until the feed ends or the target is reached: the factor of each one's rates."""
        optimizers, progress = self.model.optimizers, self.progress
        while not self.evaluator.reached:
            factor = optimizers.set_step(progress.step + 1)
            seed_step(self.config.seed, progress.step + 1, self.mesh.data_rank)
            outcome = None
            try:
                if not self.feed.leaves_out(progress.step + 1):
                    outcome = self.pipeline.step(self.feed), optimizers.gradient_norms
            except StopIteration:
                return
            consumed = self.feed.done()
            progress.advance(consumed.samples, consumed.position)
            self.step_log.count(consumed, outcome)
            STOP.heeded = True
            yield factor

    def _save(self) -> None:
        with self.step_log.paused():
            self.checkpointer.save(self.progress)

    def _between_steps(self, look: Callable[[], None]) -> None:
        with self.step_log.paused(), self.watchdog.phase("evaluation"):
            self.pipeline.outside(look)


def _due(step: int, every: int | None) -> bool:
    return every is not None and step % every == 0
