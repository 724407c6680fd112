"""Ranks among all items, on a model that is nothing but its item vectors."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from trainer.tasks import retrieval


@pytest.mark.parametrize("chunk", [1, 16, 49, 50, 64])
def test_equal_items_tie_and_count_against_the_true_one_however_they_are_cut(
    chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """50 items with one vector: a product of another width may round it differently."""
    vectors = torch.randn(1, 33).expand(50, 33).contiguous()

    def item_vectors(model: Any, first: int, last: int, device: torch.device) -> Tensor:
        return vectors[first:last]

    monkeypatch.setattr(retrieval, "_item_vectors", item_vectors)
    outputs, targets = torch.randn(200, 33), torch.arange(200) % 50
    seen = torch.empty(2, 0, dtype=torch.long)
    model: Any = SimpleNamespace()
    ranks, popular = retrieval._count_better(model, outputs, targets, seen, torch.ones(50), chunk)
    assert ranks.unique().tolist() == [50]
    assert popular.unique().tolist() == [50]


@pytest.mark.parametrize("chunk", [1, 7, 50, 64])
def test_ranks_leave_out_what_was_seen(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    vectors, outputs, targets = torch.randn(50, 8), torch.randn(30, 8), torch.randint(50, (30,))
    monkeypatch.setattr(retrieval, "_item_vectors", lambda model, first, last, device: vectors[first:last])
    pairs = torch.stack([torch.arange(30).repeat_interleave(9), torch.randint(50, (270,))])
    seen = retrieval._join_seen([pairs], [30])
    counts = torch.randint(5, (50,)).float()
    model: Any = SimpleNamespace()
    ranks, popular = retrieval._count_better(model, outputs, targets, seen, counts, chunk)
    scores = outputs @ vectors.t()
    for i, target in enumerate(targets.tolist()):
        others = set(range(50)) - {target} - set(pairs[1, pairs[0] == i].tolist())
        assert ranks[i] == 1 + sum(bool(scores[i, item] >= scores[i, target]) for item in others)
        assert popular[i] == 1 + sum(bool(counts[item] >= counts[target]) for item in others)
