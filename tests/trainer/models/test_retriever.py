"""The retrieval head: loss and ranks against plain formulas, chunking, metrics."""

import pytest
import torch
from torch import Tensor

from trainer.models.config import LayerConfig, StageConfig
from trainer.models.hstu import build_tower
from trainer.models.retriever import Retriever, retrieval_metrics

NUM_ITEMS, DIM = 40, 16
LENS = torch.tensor([4, 1, 0, 6])


def small(*, share: bool = True, normalise: bool = True, num_negatives: int = 30) -> Retriever:
    torch.manual_seed(0)
    layer = LayerConfig(num_heads=2, qk_dim=8, value_dim=8)
    tower = build_tower(dim=DIM, layer=layer, stages=[StageConfig(num_layers=2)], num_context=0, max_len=8)
    return Retriever(
        num_items=NUM_ITEMS,
        dim=DIM,
        tower=tower,
        num_positions=8,
        num_negatives=num_negatives,
        share_negatives=share,
        normalise=normalise,
        temperature=0.1,
    )


def items(count: int) -> Tensor:
    return torch.randint(NUM_ITEMS, (count,), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("normalise", [True, False])
@pytest.mark.parametrize("share", [True, False])
def test_loss_is_the_sampled_softmax_of_each_next_item(share: bool, normalise: bool) -> None:
    model = small(share=share, normalise=normalise)
    ids = items(int(LENS.sum()))
    torch.manual_seed(7)
    loss = model(ids, LENS, LENS)
    torch.manual_seed(7)
    negatives = torch.randint(NUM_ITEMS, (30,) if share else (8, 30)).expand(8, 30)
    outputs, layout = model.encode(ids, LENS, LENS)
    vectors = model.items.weight
    vectors = torch.nn.functional.normalize(vectors, dim=1) if normalise else vectors
    losses = []
    for start, end in zip(layout.offsets[:-1].tolist(), layout.offsets[1:].tolist(), strict=True):
        for row in range(start, end - 1):
            target = int(ids[row + 1])
            drawn = [n for n in negatives[len(losses)].tolist() if n != target]
            scores = vectors[[target, *drawn]] @ outputs[row] / 0.1
            losses.append(-torch.log_softmax(scores, 0)[0])
    torch.testing.assert_close(loss, torch.stack(losses).mean())
    loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_ranks_equal_a_full_sort_whatever_the_chunk() -> None:
    model = small().eval()
    lens = torch.tensor([3, 5, 2])
    ids, targets = items(10), torch.tensor([3, 17, 39])
    outputs, layout = model.encode(ids, lens, lens)
    scores = outputs[layout.offsets[1:] - 1] @ torch.nn.functional.normalize(model.items.weight, dim=1).T
    expected = (scores.argsort(dim=1, descending=True) == targets[:, None]).int().argmax(1) + 1
    for chunk in (1, 7, NUM_ITEMS, 1000):
        assert model.ranks(ids, lens, lens, targets, chunk_items=chunk).tolist() == expected.tolist()


def test_a_history_without_a_next_item_gives_zero_loss() -> None:
    lens = torch.tensor([1, 0, 1])
    loss = small()(items(2), lens, lens)
    loss.backward()
    assert loss.item() == 0


def test_a_users_later_events_do_not_change_earlier_outputs() -> None:
    model, ids = small().eval(), items(6)
    long, _ = model.encode(ids, torch.tensor([6]), torch.tensor([6]))
    short, _ = model.encode(ids[:4], torch.tensor([4]), torch.tensor([4]))
    torch.testing.assert_close(long[:4], short)


def test_metrics_follow_from_ranks() -> None:
    metrics = retrieval_metrics(torch.tensor([1, 3, 11, 100]))
    assert metrics.hit_rates == {10: 0.5, 50: 0.75}
    assert metrics.ndcg[10] == pytest.approx((1 + 0.5) / 4)
    assert metrics.mrr == pytest.approx((1 + 1 / 3 + 1 / 11 + 1 / 100) / 4)


def test_users_without_events_are_refused() -> None:
    with pytest.raises(ValueError, match="a user without events"):
        small().ranks(items(1), torch.tensor([1, 0]), torch.tensor([1, 0]), torch.tensor([1, 2]))
