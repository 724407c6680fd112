"""Similarities against their formulas, pair by pair."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from trainer.models.heads.dot_product import DotProduct
from trainer.models.heads.mixture_of_logits import MixtureOfLogits
from trainer.models.heads.similarity import Similarity

WIDTH = 12


def _mixture(*, normalise: bool = True) -> MixtureOfLogits:
    torch.manual_seed(0)
    return MixtureOfLogits(embedding_dim=WIDTH, query_vectors=3, item_vectors=2, dim=5, hidden=7, normalise=normalise)


SIMILARITIES = {
    "dot product": DotProduct(normalise=False),
    "cosine": DotProduct(),
    "mixture of logits": _mixture(),
    "mixture of logits, not normalised": _mixture(normalise=False),
}


@pytest.mark.parametrize("name", SIMILARITIES)
def test_items_for_all_and_each_predictions_own_items_score_alike(name: str) -> None:
    """A pair's score depends on nothing but the pair."""
    similarity = SIMILARITIES[name]
    outputs, rows = torch.randn(6, WIDTH), torch.randn(9, WIDTH)
    shared = similarity(similarity.queries(outputs), similarity.items(rows))
    own = similarity(similarity.queries(outputs), similarity.items(rows.expand(6, 9, WIDTH)))
    single = similarity(similarity.queries(outputs[2:3]), similarity.items(rows[4:5]))
    assert shared.shape == (6, 9)
    torch.testing.assert_close(own, shared, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(single[0, 0], shared[2, 4], rtol=1e-5, atol=1e-6)


def test_cosines_and_dot_products_are_those_of_the_rows() -> None:
    outputs, rows = torch.randn(6, WIDTH), torch.randn(9, WIDTH)
    for similarity, expected in (
        (SIMILARITIES["dot product"], outputs @ rows.t()),
        (SIMILARITIES["cosine"], F.cosine_similarity(outputs[:, None], rows[None], dim=2)),
    ):
        torch.testing.assert_close(similarity(similarity.queries(outputs), similarity.items(rows)), expected)


def _network(layers: torch.nn.Sequential, x: Tensor) -> Tensor:
    hidden = layers[0].weight @ x + layers[0].bias
    result: Tensor = layers[2].weight @ (hidden * torch.sigmoid(hidden)) + layers[2].bias
    return result


def test_mixture_of_logits_follows_its_formula() -> None:
    mixture = _mixture()
    outputs, rows = torch.randn(4, WIDTH), torch.randn(5, WIDTH)
    scores = mixture(mixture.queries(outputs), mixture.items(rows))
    for p in range(4):
        for n in range(5):
            f = mixture.query_projection(outputs[p]).view(3, 5)
            g = mixture.item_projection(rows[n]).view(2, 5)
            products = torch.stack([F.cosine_similarity(f[i], g[j], dim=0) for i in range(3) for j in range(2)])
            gate = _network(mixture.query_gate, outputs[p]) * _network(mixture.item_gate, rows[n])
            gate = gate + _network(mixture.pair_gate, products)
            weights = torch.exp(gate * torch.sigmoid(gate))
            expected = (weights / weights.sum() * products).sum()
            torch.testing.assert_close(scores[p, n], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", SIMILARITIES)
def test_gradients_reach_outputs_rows_and_parameters(name: str) -> None:
    similarity: Similarity = SIMILARITIES[name]
    outputs, rows = torch.randn(6, WIDTH, requires_grad=True), torch.randn(9, WIDTH, requires_grad=True)
    scores = similarity(similarity.queries(outputs), similarity.items(rows))
    (scores * torch.randn_like(scores)).sum().backward()
    for tensor in (outputs, rows, *similarity.parameters()):
        assert tensor.grad is not None and tensor.grad.any()


def test_a_mixture_orders_items_as_no_dot_product_of_its_width_can() -> None:
    """Its matrix of scores has more than full rank of the vectors' width: not one dot product in disguise."""
    mixture = _mixture()
    scores = mixture(mixture.queries(torch.randn(64, WIDTH)), mixture.items(torch.randn(64, WIDTH)))
    assert torch.linalg.matrix_rank(scores.double()) > WIDTH
