"""Metrics of the training candidates: what an evaluation says of the same candidates, whatever the batches."""

import math

import pytest
import torch

from trainer.evaluation.metrics import binary_metrics
from trainer.labels.running import BIN_WIDTH, RunningMetrics, running_metrics


def candidates(count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logits in the middle of bins, which a bin therefore tells apart as well as the logits; targets; weights."""
    generator = torch.Generator().manual_seed(seed)
    logits = (torch.randn(count, 2, generator=generator) / BIN_WIDTH).floor() * BIN_WIDTH + BIN_WIDTH / 2
    targets = (torch.rand(count, 2, generator=generator) < torch.sigmoid(logits - 1)).float()
    weights = torch.rand(count, 1, generator=generator).expand(-1, 2) + 0.5
    return logits, targets, weights


def test_they_are_those_of_an_evaluation_of_the_same_candidates() -> None:
    running, parts = RunningMetrics(["click", "buy"]), [candidates(count, count) for count in (700, 1, 0, 300)]
    for part in parts:
        running.add(*part)
    logits, targets, weights = (torch.cat(each) for each in zip(*parts, strict=True))
    found = running.metrics(running.state())
    for place, name in enumerate(running.names):
        expected = binary_metrics(
            logits[:, place].double(),
            targets[:, place].double(),
            torch.zeros(len(logits), dtype=torch.long),
            weights[:, place].double(),
        )
        for metric in ("ne", "calibration", "auc"):
            assert found[f"{metric}/{name}"] == pytest.approx(expected[metric], abs=1e-6), metric


def test_a_window_is_a_difference_and_ranks_are_a_sum() -> None:
    first, second = candidates(400, 1), candidates(250, 2)
    running, alone = RunningMetrics(["a", "b"]), RunningMetrics(["a", "b"])
    running.add(*first)
    before = running.state()
    running.add(*second)
    alone.add(*second)
    of_window, expected = running.metrics(running.state() - before), alone.metrics(alone.state())
    assert of_window == pytest.approx(expected, abs=1e-9)
    other = RunningMetrics(["a", "b"])
    other.add(*first)
    assert running.metrics(other.state() + alone.state()) == pytest.approx(running.metrics(running.state()), abs=1e-9)


def test_what_does_not_count_and_what_is_no_number_spoils_no_index() -> None:
    running, (logits, targets, weights) = RunningMetrics(["a", "b"]), candidates(50, 3)
    running.add(logits, targets, weights)
    known = running.state()
    running.add(torch.full((3, 2), 1e30), torch.ones(3, 2), torch.zeros(3, 2))
    assert running.state().equal(known)
    running.add(torch.tensor([[float("nan"), 0.0]]), torch.zeros(1, 2), torch.ones(1, 2))
    found = running.metrics(running.state())
    assert math.isnan(found["ne/a"]) and not math.isnan(found["ne/b"])
    running.reset()
    assert not running.state().any()
    assert all(math.isnan(value) for value in running.metrics(running.state()).values()), "of nothing, nothing is known"


def test_a_loss_without_binary_labels_has_none_to_show() -> None:
    assert running_metrics(torch.nn.Linear(1, 1)) is None
