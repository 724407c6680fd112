"""The learning-rate schedule as a function of the step, and the dense optimizer's state."""

from contextlib import nullcontext
from typing import Literal

import pytest
import torch
from torch import nn
from torchrec.optim.keyed import KeyedOptimizer

from trainer.config import DenseOptimizerConfig, ScheduleConfig
from trainer.steps.optim import Optimizers, learning_rate_factor, settle_schedule


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        (ScheduleConfig(), {1: 1.0, 1000: 1.0}),
        (ScheduleConfig(warmup_steps=4), {1: 0.25, 4: 1.0, 5: 1.0}),
        (ScheduleConfig(kind="linear", decay_steps=10), {5: 0.5, 10: 0.0, 99: 0.0}),
        (ScheduleConfig(kind="linear", warmup_steps=2, decay_steps=6, final_factor=0.5), {2: 1.0, 4: 0.75, 9: 0.5}),
        (ScheduleConfig(kind="cosine", decay_steps=8, final_factor=0.2), {4: 0.6, 8: 0.2}),
    ],
)
def test_schedule_is_a_function_of_the_step(schedule: ScheduleConfig, expected: dict[int, float]) -> None:
    for step, factor in expected.items():
        assert learning_rate_factor(step, schedule) == pytest.approx(factor)


@pytest.mark.parametrize("kind", ["linear", "cosine"])
def test_a_decay_without_a_last_step_ends_with_the_run(kind: Literal["linear", "cosine"]) -> None:
    schedule = settle_schedule(ScheduleConfig(kind=kind, warmup_steps=5), last_step=20, done=0)
    factors = [learning_rate_factor(step, schedule) for step in range(1, 22)]
    assert factors[:5] == [0.2, 0.4, 0.6, 0.8, 1.0]
    assert sorted(factors[4:], reverse=True) == factors[4:]
    assert 0 < factors[19] < 0.1
    assert factors[20] == pytest.approx(0)


def test_a_run_that_ends_in_its_warm_up_is_all_warm_up() -> None:
    schedule = settle_schedule(ScheduleConfig(kind="cosine", warmup_steps=5), last_step=3, done=0)
    assert [learning_rate_factor(step, schedule) for step in (1, 2, 3)] == [0.2, 0.4, 0.6]


def test_a_run_with_more_passes_decays_over_all_of_them() -> None:
    stated = ScheduleConfig(kind="linear")
    ended = settle_schedule(stated, last_step=10, done=0)
    resumed = settle_schedule(stated, last_step=30, done=10)
    assert learning_rate_factor(11, ended) == 0
    assert learning_rate_factor(11, resumed) > 0.6


@pytest.mark.parametrize(
    ("last_step", "done", "refused"),
    [
        (100, 0, False),
        (101, 0, True),
        (500, 200, True),
        # Nothing is left to train.
        (500, 500, False),
        (50, 0, False),
        # The end is not known.
        (None, 99, False),
        (None, 100, True),
    ],
)
def test_steps_that_would_learn_nothing_are_refused(last_step: int | None, done: int, refused: bool) -> None:
    schedule = ScheduleConfig(kind="cosine", decay_steps=100)
    with pytest.raises(ValueError, match="would learn nothing: raise") if refused else nullcontext():
        assert settle_schedule(schedule, last_step=last_step, done=done) == schedule
    kept = ScheduleConfig(kind="cosine", decay_steps=100, final_factor=0.1)
    assert settle_schedule(kept, last_step=last_step, done=done) == kept


def test_a_decay_to_an_end_that_nobody_knows_is_refused() -> None:
    with pytest.raises(ValueError, match=r"not known with data.global_batch_tokens: set schedule.decay_steps"):
        settle_schedule(ScheduleConfig(kind="linear"), last_step=None, done=0)


class _NoTables(KeyedOptimizer):
    """A tables' optimizer without tables that notes the learning rate it was given last."""

    def __init__(self) -> None:
        parameter = nn.Parameter(torch.zeros(1))
        super().__init__({"table": parameter}, {}, [{"params": [parameter], "lr": 0.5}])

    def step(self, closure: object = None) -> None:
        del closure


def _optimizers(module: nn.Module, **schedule: int) -> tuple[Optimizers, _NoTables]:
    tables = _NoTables()
    config = DenseOptimizerConfig(learning_rate=0.1, max_gradient_norm=1.0)
    return Optimizers(module, tables, config, ScheduleConfig(**schedule)), tables


def test_both_learning_rates_follow_the_schedule() -> None:
    optimizers, tables = _optimizers(nn.Linear(2, 1), warmup_steps=10)
    assert optimizers.set_step(5) == 0.5
    assert tables.param_groups[0]["lr"] == 0.25
    optimizers.set_step(10)
    assert tables.param_groups[0]["lr"] == 0.5


def test_dense_gradients_are_clipped_to_the_norm() -> None:
    module = nn.Linear(2, 1)
    optimizers, _ = _optimizers(module)
    for parameter in module.parameters():
        parameter.grad = torch.full_like(parameter, 100.0)
    optimizers.step()
    gradients = [parameter.grad for parameter in module.parameters() if parameter.grad is not None]
    assert torch.cat([gradient.flatten() for gradient in gradients]).norm() == pytest.approx(1.0, rel=1e-4)


def test_norms_tell_which_gradients_are_not_finite_and_are_those_of_their_step() -> None:
    """The last first; a parameter without a gradient counts as 0, in the total too."""
    module = nn.Sequential(nn.Linear(2, 1), nn.Linear(1, 3), nn.Linear(3, 1))
    optimizers, _ = _optimizers(module)
    names = [f"dense/{name}" for name, _ in module.named_parameters()]
    found = []
    for spoilt in ({}, {names[0]: torch.inf, names[3]: torch.nan}):
        for place, (name, parameter) in enumerate(zip(names, module.parameters(), strict=True)):
            parameter.grad = None if place == 5 else torch.full_like(parameter, float(place))
            if name in spoilt and parameter.grad is not None:
                parameter.grad.view(-1)[-1] = spoilt[name]
        optimizers.step()
        found.append(optimizers.gradient_norms)
    squares = [place**2 * parameter.numel() for place, parameter in enumerate(module.parameters())][:5]
    assert found[0].values.tolist() == pytest.approx([x**0.5 for x in (sum(squares), *squares, 0.0)])
    assert found[0].not_finite() == [] and found[1].not_finite() == [names[3], names[0]]
    assert found[1].total.isnan()


def test_state_restored_in_place_continues_the_same_way() -> None:
    torch.manual_seed(0)
    first, second = nn.Linear(3, 2), nn.Linear(3, 2)
    (a, _), (b, _) = _optimizers(first), _optimizers(second)
    inputs = torch.randn(4, 5, 3)

    def steps(module: nn.Module, optimizers: Optimizers, batches: torch.Tensor) -> None:
        for batch in batches:
            optimizers.zero_grad()
            module(batch).square().sum().backward()
            optimizers.step()

    steps(first, a, inputs[:2])
    second.load_state_dict(first.state_dict())
    live = b.dense_state()
    for name, value in a.dense_state().items():
        live[name].copy_(value)
    steps(first, a, inputs[2:])
    steps(second, b, inputs[2:])
    for expected, actual in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(expected, actual)
