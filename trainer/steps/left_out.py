"""Batches whose loss or gradients are not finite, and how a run gets past them.

    stop       the run ends with an error that names the batch
    skip       back to the newest checkpoint, and on without that batch
    roll_back  back to the newest checkpoint, and on with what comes after that batch

A step whose batch is left out keeps its number and changes nothing.  The steps stand in RUN_DIR/left_out.jsonl, so a
run that is started again leaves out the same.
"""

import logging
import math
from collections.abc import Sequence

from trainer.config import NonFiniteConfig
from trainer.parallel.mesh import Mesh
from trainer.run.json_lines import JsonLines, read_records
from trainer.run.run_dir import RunDir
from trainer.steps.optim import GradientNorms

logger = logging.getLogger(__name__)

NAMED = 3
"""Parameters that an error names, of those whose gradients are not finite."""


class NotFinite(FloatingPointError):
    """A step that spoils the model.  Raised by every rank alike."""

    def __init__(self, step: int, samples: tuple[int, int], what: str) -> None:
        """`samples`: first and last of its batch, in the run's order."""
        super().__init__(
            f"{what} of step {step}; its batch is the samples {samples[0]} to {samples[1]} of the run's order"
        )
        self.step, self.samples, self.what = step, samples, what


def check_finite(
    losses: Sequence[float],
    norms: Sequence[float],
    steps: Sequence[tuple[int, int, int]],
    gradients: Sequence[GradientNorms],
) -> None:
    """Raises `NotFinite` for the first step whose loss or norm of gradients is not finite.

    `steps`: (step, first sample, last sample) of each loss and norm; `gradients`: what this rank knows of each norm.
    """
    for loss, norm, (step, first, last), of_step in zip(losses, norms, steps, gradients, strict=True):
        if not math.isfinite(loss):
            raise NotFinite(step, (first, last), f"{loss} is the loss")
        if not math.isfinite(norm):
            raise NotFinite(step, (first, last), f"{norm} is the norm of the gradients{_where(of_step)}")


def _where(gradients: GradientNorms) -> str:
    """Which parameters' are not finite; nothing where only the sum of their squares is too large."""
    spoilt = gradients.not_finite()
    if not spoilt:
        return ""
    more = ", ..." if len(spoilt) > NAMED else ""
    return f" ({len(spoilt)} of {len(gradients.names)} parameters have such: {', '.join(spoilt[:NAMED])}{more})"


class LeftOut:
    """The steps whose batches a run leaves out.  Every rank holds the same."""

    def __init__(self, run: RunDir, config: NonFiniteConfig, mesh: Mesh) -> None:
        self._file, self._config, self._mesh = run.left_out_file, config, mesh
        events = read_records(self._file)
        self._steps = {step for event in events for step in range(event["first_step"], event["step"] + 1)}
        self._events = len(events)

    @property
    def steps(self) -> list[int]:
        """All of them."""
        return sorted(self._steps)

    def __contains__(self, step: object) -> bool:
        return step in self._steps

    def add(self, found: NotFinite, saved: int) -> None:
        """Leave out the batch of `found`, or all since the checkpoint of step `saved`, from now on.

        Raises:
            FloatingPointError: the policy is to stop, or the run has left out as much as it may.
        """
        policy, limit = self._config.policy, self._config.limit
        if policy == "stop":
            raise FloatingPointError(
                f"{found}; what is saved is from before: look at these samples, go on past them with --set "
                "nonfinite.policy=skip or roll_back, or start again in another --run-dir with lower rates or a "
                "longer schedule.warmup_steps"
            ) from found
        if self._events >= limit:
            raise FloatingPointError(
                f"{found}; the run has gone on past such a batch nonfinite.limit={limit} times: the cause is not in "
                "single batches; start again in another --run-dir with lower learning rates or a longer "
                "schedule.warmup_steps"
            ) from found
        first = found.step if policy == "skip" else saved + 1
        self._events += 1
        self._steps |= set(range(first, found.step + 1))
        logger.error(
            "%s; going back to step %d, and on without the batches of steps %d to %d", found, saved, first, found.step
        )
        if self._mesh.is_first:
            JsonLines(self._file).append(
                {
                    "step": found.step,
                    "first_step": first,
                    "samples": found.samples,
                    "what": found.what,
                    "back_to": saved,
                }
            )
