"""How steps are computed is no matter of what they learn: launched or replayed, in batches of several sizes or all of
one, with all rows of the last layer or those of candidates alone."""

import itertools
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from attention_kernels import AttentionPlan
from pipelines.batches import padding as padding_of_batches
from tests.trainer.steps.test_recording import DEVICE, ranker, sized_of
from trainer.models.hstu import HstuLayer
from trainer.models.layer import ProductWeights
from trainer.models.layout import take_rows
from trainer.steps.graphs import Graphs
from trainer.steps.recording import RecordedObjective

STEPS = 200 if DEVICE.type == "cuda" else 30


def losses(name: str, *, recorded: bool, nudge: float = 0.0) -> tuple[list[float], int]:
    """Of a ranker's steps, and the number of sizes that its batches were padded to; `nudge` is how far its initial
    values are from the usual ones, in parts of them."""
    model, padding, batches = ranker(name)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters() if nudge else ():
            parameter.mul_(1 + nudge * torch.randn(parameter.shape, generator=generator))
    model.to(DEVICE).train()
    batches = [batch.to(DEVICE) for batch in batches]
    if recorded:
        model.objective = RecordedObjective(model.objective, padding, Graphs() if DEVICE.type == "cuda" else None)
    # A large eps: gradients that are nothing but rounding move nothing.
    adam = torch.optim.Adam(model.parameters(), lr=3e-3, eps=1e-3)
    found = []
    for step in range(STEPS):
        model.zero_grad()
        loss = model(batches[step % len(batches)])
        loss.backward()
        adam.step()
        found.append(float(loss.detach()))
    return found, len(sized_of(model)) if recorded else 0


def all_rows(
    layer: HstuLayer, x_TD: Tensor, rows_R: Tensor, plan: AttentionPlan, weights: ProductWeights | None = None
) -> Tensor:
    """`HstuLayer.at_rows` by its definition."""
    return take_rows(layer(x_TD, replace(plan, rows=None), weights), rows_R)


def furthest(found: list[float], expected: list[float]) -> list[float]:
    """How far apart, in parts, losses have been up to each step."""
    return list(itertools.accumulate((abs(a / b - 1) for a, b in zip(found, expected, strict=True)), max))


@pytest.mark.parametrize("name", ["paper", "production"])
def test_losses_of_many_steps_are_the_same_in_all_ways(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """But for rounding, which training magnifies: as far as a few roundings of the initial values lead."""
    launched, _ = losses(name, recorded=False)
    assert min(launched[-5:]) < 0.9 * min(launched[:5])
    replayed, several = losses(name, recorded=True)
    with monkeypatch.context() as patch:
        patch.setattr(padding_of_batches, "rounded", lambda _: 64)
        padded, one = losses(name, recorded=True)
    monkeypatch.setattr(HstuLayer, "at_rows", all_rows)
    whole, _ = losses(name, recorded=False)
    assert several > one == 1
    nudged, _ = losses(name, recorded=False, nudge=1e-6)
    for found in (replayed, padded, whole):
        pairs = zip(furthest(found, launched), furthest(nudged, launched), strict=True)
        assert all(apart <= 1e-5 + 10 * by_rounding for apart, by_rounding in pairs)
