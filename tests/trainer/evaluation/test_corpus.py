"""Ranks among all items, beside a plain count over all scores."""

import pytest
import torch
from torch import Tensor

from trainer.evaluation import corpus
from trainer.evaluation.corpus import MISSED, Corpus, join_seen
from trainer.evaluation.metrics import rank_means, rank_sums
from trainer.models.heads.dot_product import DotProduct
from trainer.models.heads.mixture_of_logits import MixtureOfLogits
from trainer.models.heads.similarity import Similarity

WIDTH = 33


def _similarities() -> dict[str, Similarity]:
    torch.manual_seed(0)
    mixture = MixtureOfLogits(embedding_dim=WIDTH, query_vectors=3, item_vectors=2, dim=5, hidden=7)
    return {"dot product": DotProduct(normalise=False), "mixture of logits": mixture}


def _corpus(similarity: Similarity, rows: Tensor, counts: Tensor, chunk: int) -> Corpus:
    def items(first: int, last: int) -> Tensor:
        # A copy, as a lookup gives: rounding may depend on where in memory rows begin.
        return similarity.items(rows[first:last].clone())

    return Corpus(similarity=similarity, items=items, counts=counts, chunk=chunk)


@torch.no_grad()
@pytest.mark.parametrize("name", _similarities())
@pytest.mark.parametrize("chunk", [1, 16, 49, 50, 64])
def test_equal_items_tie_and_count_against_the_true_one_however_they_are_cut(name: str, chunk: int) -> None:
    """50 items with one vector: a product of another width may round it differently."""
    similarity = _similarities()[name]
    rows = torch.randn(1, WIDTH).expand(51, WIDTH).contiguous()
    queries, targets = similarity.queries(torch.randn(200, WIDTH)), torch.arange(200) % 50 + 1
    ranks, popular = _corpus(similarity, rows, torch.ones(51), chunk).ranks(queries, targets, join_seen([NONE], [200]))
    assert ranks.unique().tolist() == [50]
    assert popular.unique().tolist() == [50]


NONE = torch.empty(2, 0, dtype=torch.long)


@torch.no_grad()
@pytest.mark.parametrize("name", _similarities())
@pytest.mark.parametrize("chunk", [1, 7, 50, 64])
@pytest.mark.parametrize("pairs_at_a_time", [1, 300, 10**6])
def test_ranks_leave_out_what_was_seen(
    name: str, chunk: int, pairs_at_a_time: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(corpus, "PAIRS", pairs_at_a_time)
    similarity = _similarities()[name]
    rows, targets = torch.randn(50, WIDTH), torch.arange(30) % 15
    queries, counts = similarity.queries(torch.randn(30, WIDTH)), torch.randint(5, (50,)).float()
    pairs = torch.stack([torch.arange(30).repeat_interleave(9), torch.randint(50, (270,))])
    ranks, popular = _corpus(similarity, rows, counts, chunk).ranks(queries, targets, join_seen([pairs.clone()], [30]))
    scores = similarity(queries, similarity.items(rows))
    own = scores.gather(1, targets[:, None])
    wanted = own - similarity.rounding * (1 + own.abs())
    for i, target in enumerate(targets.tolist()):
        others = set(range(1, 50)) - {target} - set(pairs[1, pairs[0] == i].tolist())
        # The unknown item is none: as the true one it is missed.
        assert ranks[i] == (1 + sum(bool(scores[i, item] >= wanted[i]) for item in others) if target else MISSED)
        assert popular[i] == (1 + sum(bool(counts[item] >= counts[target]) for item in others) if target else MISSED)
    assert 0 in targets


@torch.no_grad()
@pytest.mark.parametrize("num_items", [0, 1, 5])
def test_an_unknown_item_is_missed_among_few_items_too(num_items: int) -> None:
    """A log of few items, or of none that comes often enough for an id, would find it among the best 10."""
    similarity, rows = DotProduct(normalise=False), torch.randn(1 + num_items, WIDTH)
    queries, targets = torch.rand(3, WIDTH), torch.tensor([0, num_items + 1, 0])
    corpus = _corpus(similarity, rows, torch.ones(1 + num_items), chunk=8)
    for ranks in corpus.ranks(queries, targets, join_seen([NONE], [3])):
        assert list(rank_means(rank_sums(ranks)).values()) == pytest.approx([0.0] * 5, abs=1e-17)


@torch.no_grad()
@pytest.mark.parametrize("chunk", [1, 7, 50, 64])
def test_the_best_are_items_though_the_unknown_ones_row_is_better(chunk: int) -> None:
    similarity, queries = DotProduct(normalise=False), torch.rand(30, WIDTH)
    rows = torch.randn(50, WIDTH)
    rows[0] = 100
    scores, items = _corpus(similarity, rows, torch.ones(50), chunk).best(queries, join_seen([NONE], [30]), 49)
    assert items.sort(1).values.equal(torch.arange(1, 50).expand(30, -1))
    assert scores.equal(scores.sort(1, descending=True).values)
