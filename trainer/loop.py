"""The training loop.

    next global batch -> learning rates, random numbers -> one step of the pipeline -> count -> log -> save -> evaluate

The pipeline (TorchRec's) pulls batches ahead of the step that trains on them, so what a step consumed is recorded when
a batch is pulled and taken from the record when its step is done: that position, not the reader's, is checkpointed.
"""

import logging
from collections.abc import Callable, Iterator

import torch
import torch.distributed as dist

from pipelines.overlap import StepPipeline
from trainer.checkpoint.checkpointer import Checkpointer
from trainer.checkpoint.progress import Progress
from trainer.config import TrainConfig
from trainer.evaluator import Evaluator
from trainer.feed import Feed
from trainer.health.stop_signal import STOP, StoppedEarly
from trainer.health.watchdog import Watchdog
from trainer.parallel.mesh import Mesh
from trainer.parallelize import ParallelModel
from trainer.recorder import Consumed, Outcome, Recorder

logger = logging.getLogger(__name__)


def agree_to_stop(mesh: Mesh) -> bool:
    """Whether any rank was asked to stop.  Called by every rank."""
    asked = torch.tensor(float(STOP.requested), device=mesh.device)
    dist.all_reduce(asked)  # every rank
    return bool(asked)


def stopped_after(step: int) -> StoppedEarly:
    """What is said when the run stops in good order."""
    return StoppedEarly(f"stopped after step {step}, which is saved: start the same command to go on")


def seed_step(seed: int, step: int, rank: int) -> None:
    """Seed dropout as a function of seed, step and part of the batch: a resumed run draws what an uninterrupted one
    would."""
    torch.manual_seed(hash((seed, step, rank)) & (2**63 - 1))


def run_steps(
    model: ParallelModel,
    feed: Feed,
    progress: Progress,
    *,
    pipeline: StepPipeline,
    config: TrainConfig,
    mesh: Mesh,
    recorder: Recorder,
    checkpointer: Checkpointer,
    watchdog: Watchdog,
    evaluator: Evaluator,
    evaluated: bool,
) -> None:
    """Train until the feed ends or `evaluation.target` is reached; save and evaluate when it is due, and at the end.

    Called by every rank.  An evaluation that was due where the run goes on, and not made (`evaluated`), comes first.

    Raises:
        StoppedEarly: SIGTERM, SIGUSR1 or Ctrl-C came; the state of the last step is saved.
        NotFinite: the loss or the gradients of a step are not, found where it is logged or saved.
        OSError, FloatingPointError: the state cannot be written, or is not finite.
    """

    def save() -> None:
        with recorder.paused():
            checkpointer.save(progress)

    def between_steps(look: Callable[[], None]) -> None:
        with recorder.paused(), watchdog.phase("evaluation"):
            pipeline.outside(look)

    model.module.train()
    factor, logs = None, False
    with watchdog.phase("evaluation"):
        evaluates = evaluator.begin(progress, evaluated=evaluated)
    for factor in _steps(model, feed, progress, pipeline, evaluator, seed=config.seed, mesh=mesh, count=recorder.count):
        watchdog.stepped(progress.step)
        saves = _due(progress.step, config.checkpoint.every_steps)
        evaluates = evaluator.due(progress.step)
        logs = _due(progress.step, config.log_every)
        if logs:
            recorder.log(progress, factor)
        elif saves or evaluates:
            recorder.check_finite(progress)  # A step that spoils the model is named before what it spoils.
        stops = (logs or saves or evaluates) and agree_to_stop(mesh)
        if saves or stops:
            save()
        if stops:
            checkpointer.wait()
            raise stopped_after(progress.step)
        if evaluates or evaluator.meets_part(progress):
            between_steps(lambda: evaluator.look(progress))
    if factor is not None and not logs:
        # A run's last step is logged whatever its number: a short run has a metric too.
        recorder.log(progress, factor)
    save()
    if not evaluates:
        between_steps(lambda: evaluator.evaluate(progress.step))
    checkpointer.wait()


def _steps(
    model: ParallelModel,
    feed: Feed,
    progress: Progress,
    pipeline: StepPipeline,
    evaluator: Evaluator,
    *,
    seed: int,
    mesh: Mesh,
    count: Callable[[Consumed, Outcome | None], None],
) -> Iterator[float]:
    """Take one step after another until the feed ends or the target is reached: the factor of each one's rates."""
    while not evaluator.reached:
        factor = model.optimizers.set_step(progress.step + 1)
        seed_step(seed, progress.step + 1, mesh.data_rank)
        outcome = None
        try:
            if not feed.leaves_out(progress.step + 1):
                outcome = pipeline.step(feed), model.optimizers.gradient_norms
        except StopIteration:
            return
        consumed = feed.done()
        progress.advance(consumed.samples, consumed.position)
        count(consumed, outcome)
        STOP.heeded = True
        yield factor


def _due(step: int, every: int | None) -> bool:
    return every is not None and step % every == 0
