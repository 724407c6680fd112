"""Optimizers of a run: dense Adam, the tables' fused optimizer, gradient clipping, and the learning rate by step.

The tables' optimizer runs inside the backward pass (FBGEMM), so table gradients are never seen whole: clipping covers
the dense parameters only.  The learning rate is a pure function of the step; a resumed run needs no schedule state.
"""

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from embeddings.optimizers import TableOptimizers
from trainer.config import DenseOptimizerConfig, ScheduleConfig


def learning_rate_factor(step: int, schedule: ScheduleConfig) -> float:
    """The factor on every base learning rate at optimizer step `step` (the first is 1)."""
    if step <= schedule.warmup_steps:
        return step / schedule.warmup_steps
    if schedule.kind == "constant":
        return 1.0
    assert schedule.decay_steps is not None
    progress = min(1.0, (step - schedule.warmup_steps) / max(1, schedule.decay_steps - schedule.warmup_steps))
    shape = 1.0 - progress if schedule.kind == "linear" else 0.5 * (1.0 + math.cos(math.pi * progress))
    return schedule.final_factor + (1.0 - schedule.final_factor) * shape


def settle_schedule(schedule: ScheduleConfig, *, last_step: int | None, done: int) -> ScheduleConfig:
    """The schedule of a run with its end filled in.

    Args:
        schedule: as stated.
        last_step: of the run; None if nobody knows.
        done: steps that the run has behind it.

    Raises:
        ValueError: the decay is to end with a run whose end is not known, or steps are left that would learn nothing.
    """
    if schedule.kind == "constant":
        return schedule
    if schedule.decay_steps is None:
        if last_step is None:
            raise ValueError(
                f"schedule.kind={schedule.kind} ends with the run, whose number of steps is not known with "
                "data.global_batch_tokens: set schedule.decay_steps or max_steps"
            )
        return dataclasses.replace(schedule, decay_steps=max(last_step, schedule.warmup_steps) + 1)
    idle = done >= schedule.decay_steps if last_step is None else last_step > max(done, schedule.decay_steps)
    if schedule.final_factor == 0 and idle:
        raise ValueError(
            f"schedule: the learning rate is 0 after step {schedule.decay_steps}, and the run has "
            f"{'further steps' if last_step is None else f'{last_step} steps'}, which would learn nothing: raise "
            "schedule.decay_steps (null for the run's end) or schedule.final_factor, or lower max_steps"
        )
    return schedule


@dataclass(frozen=True, slots=True)
class GradientNorms:
    """Norms of a step's dense gradients before clipping, on the device."""

    names: tuple[str, ...]
    """The P parameters as checkpoints name them, in the model's order."""
    values: Tensor
    """[1 + P]: of all gradients, then of each; 0 where a parameter had none."""

    @property
    def total(self) -> Tensor:
        """[] of all of them."""
        return self.values[0]

    def not_finite(self) -> list[str]:
        """The parameters whose gradients are not finite, the model's last first: from there it spreads to those that a
        backward pass reaches later.  Waits for the device."""
        finite = self.values[1:].isfinite().tolist()
        return [name for name, is_finite in zip(self.names, finite, strict=True) if not is_finite][::-1]


class Optimizers:
    """What the pipeline steps: clips and updates the dense parameters, and sets the tables' learning rate."""

    def __init__(
        self, dense_module: nn.Module, tables: TableOptimizers, config: DenseOptimizerConfig, schedule: ScheduleConfig
    ) -> None:
        self._names = {parameter: name for name, parameter in dense_module.named_parameters()}
        self._state_names = tuple(f"dense/{name}" for name in self._names.values())
        device = next(iter(self._names)).device
        # Steps that are recorded read the rate on the device, and others the same one: so they have the same bits.
        on_gpu = device.type == "cuda"
        rate = torch.tensor(config.learning_rate, dtype=torch.float32, device=device) if on_gpu else None
        self._dense = torch.optim.Adam(
            self._names,
            lr=config.learning_rate if rate is None else rate,
            betas=config.betas,
            eps=config.eps,
            weight_decay=config.weight_decay,
            # One kernel for all parameters.
            fused=True,
            capturable=on_gpu,
        )
        self.update: Callable[[], None] = self.clip_and_update
        """Clips and applies the dense gradients; `trainer.steps.recording` puts a recording in its place."""
        self.average: Callable[[], None] | None = None
        """Averages gradients over ranks; None where there is one, or nothing to average."""
        self.tables = tables
        self._max_norm = math.inf if config.max_gradient_norm is None else config.max_gradient_norm
        self._norms = torch.zeros(1 + len(self._names), device=device)
        self._without_gradient = torch.zeros((), device=device)
        self.gradient_norms = self._copy_norms()
        """The norms of the newest step's gradients."""
        self._schedule = schedule
        self._base_rates = [float(group["lr"]) for group in self._groups()]

    def _groups(self) -> list[dict[str, Any]]:
        return [*self._dense.param_groups, *self.tables.param_groups]

    def set_step(self, step: int) -> float:
        """Set every learning rate for optimizer step `step`, before its forward pass; returns the factor."""
        factor = learning_rate_factor(step, self._schedule)
        for group, rate in zip(self._groups(), self._base_rates, strict=True):
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(rate * factor)
            else:
                group["lr"] = rate * factor
        return factor

    def zero_grad(self) -> None:
        """Forget dense gradients; hands the tables' learning rate to FBGEMM, whose update runs in the backward pass."""
        self._dense.zero_grad()
        self.tables.zero_grad()

    def step(self) -> None:
        """Clip and apply the dense gradients, the same on every rank once they are averaged."""
        if self.average is not None:
            self.average()
        self.update()
        self.gradient_norms = self._copy_norms()
        self.tables.step()

    def clip_and_update(self) -> None:
        """The dense part of a step."""
        norms = dict.fromkeys(self._names, self._without_gradient)
        gradients = {parameter: parameter.grad for parameter in self._names if parameter.grad is not None}
        if gradients:
            norms |= dict(zip(gradients, torch._foreach_norm(list(gradients.values())), strict=True))
        torch.stack(list(norms.values()), out=self._norms[1:])
        torch.linalg.vector_norm(self._norms[1:], out=self._norms[0])
        if math.isfinite(self._max_norm):
            torch.nn.utils.clip_grads_with_norm_(list(self._names), self._max_norm, self._norms[0])
        self._dense.step()

    def _copy_norms(self) -> GradientNorms:
        """A copy of the present norms, which the next step overwrites."""
        return GradientNorms(self._state_names, self._norms.clone())

    def dense_state(self) -> dict[str, Tensor]:
        """Adam's state, one live tensor a key `parameter/state`; zeros before a first step."""
        state = {}
        for parameter, name in self._names.items():
            slots = self._dense.state[parameter]
            if not slots:
                slots["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
                slots["exp_avg"] = torch.zeros_like(parameter)
                slots["exp_avg_sq"] = torch.zeros_like(parameter)
            state.update({f"{name}/{slot}": value for slot, value in slots.items()})
        return state
