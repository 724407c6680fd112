"""NE, AUC, GAUC and retrieval's metrics against definitions written out here; the former joined over two processes."""

import math
import random

import pytest
import torch

from tests.support.distributed import run_ranks
from trainer.evaluation.metrics import rank_means, rank_sums, score
from trainer.labels.binary import Binary
from trainer.labels.measure import LabelMetrics

TASKS = ("click", "follow")


def _candidates(seed: int, count: int = 60) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logits of which many are equal."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randint(-4, 5, (count, len(TASKS)), generator=generator) / 2
    labels = (torch.rand(count, len(TASKS), generator=generator) < 0.4).float()
    return scores, labels, torch.randint(0, 7, (count,), generator=generator)


def _metrics(names: tuple[str, ...]) -> LabelMetrics:
    return LabelMetrics([Binary(name, bit=None, rate=None) for name in names], torch.device("cpu"))


def _add(metrics: LabelMetrics, scores: torch.Tensor, labels: torch.Tensor, users: torch.Tensor) -> None:
    evidence = torch.stack([scores, labels], dim=2).double().unbind(1)
    metrics.update(evidence, torch.ones_like(labels), users)


def _probability(score: float) -> float:
    return 1 / (1 + math.exp(-score))


def _auc(pairs: list[tuple[float, float]]) -> float:
    """The share of (positive, negative) pairs in the right order, ties counting half."""
    wins = [(p > n) + 0.5 * (p == n) for p, a in pairs if a == 1 for n, b in pairs if b == 0]
    return sum(wins) / len(wins)


def _auc_95(rows: list[tuple[float, float, int]]) -> float:
    """1.96 times the standard error: users' sums of their candidates' parts in the AUC, squared and added up."""
    auc, parts = _auc([row[:2] for row in rows]), {user: 0.0 for _, _, user in rows}
    for mine, label, user in rows:
        others = [other for other, that, _ in rows if that != label]
        won = [((mine > other) if label else (mine < other)) + 0.5 * (mine == other) for other in others]
        parts[user] += (sum(won) / len(won) - auc) / (len(rows) - len(others))
    return 1.96 * math.sqrt(sum(part**2 for part in parts.values()))


def _expected(scores: torch.Tensor, labels: torch.Tensor, users: torch.Tensor) -> dict[str, float]:
    result = {}
    for index, task in enumerate(TASKS):
        rows = list(zip(scores[:, index].tolist(), labels[:, index].tolist(), users.tolist(), strict=True))
        rate = sum(label for _, label, _ in rows) / len(rows)
        entropy = -(rate * math.log(rate) + (1 - rate) * math.log(1 - rate))
        cross = sum(math.log(1 + math.exp(-score if label else score)) for score, label, _ in rows) / len(rows)
        by_user = [[(score, label) for score, label, user in rows if user == u] for u in {user for *_, user in rows}]
        per_user = [_auc(pairs) for pairs in by_user if len({label for _, label in pairs}) == 2]
        result[f"ne/{task}"] = cross / entropy
        result[f"auc/{task}"] = _auc([(score, label) for score, label, _ in rows])
        result[f"gauc/{task}"] = sum(per_user) / len(per_user)
        result[f"auc_95/{task}"] = _auc_95(rows)
        result[f"calibration/{task}"] = sum(_probability(score) for score, _, _ in rows) / sum(
            label for _, label, _ in rows
        )
        result[f"positives/{task}"] = sum(label for _, label, _ in rows)
    return result


def test_metrics_equal_their_definitions() -> None:
    candidates = _candidates(0)
    metrics = _metrics(TASKS)
    _add(metrics, *(x[:20] for x in candidates))
    _add(metrics, *(x[20:] for x in candidates))
    assert metrics.compute() == pytest.approx(_expected(*candidates), rel=1e-6)


def test_a_constant_prediction_of_the_base_rate_has_ne_one() -> None:
    _, labels, users = _candidates(1)
    metrics = _metrics(TASKS)
    _add(metrics, labels.mean(0).logit().expand_as(labels), labels, users)
    result = metrics.compute()
    assert result["ne/click"] == pytest.approx(1.0)
    assert (result["auc/click"], result["gauc/click"], result["auc_95/click"]) == (0.5, 0.5, 0.0)


def test_equal_scores_of_other_places_in_a_batch_are_equal() -> None:
    """Probabilities of equal logits are not: a processor rounds those at a batch's end otherwise."""
    _, labels, users = _candidates(8, 1001)
    scores = torch.randn(40, generator=torch.Generator().manual_seed(0)).repeat(26)[:1001][:, None].expand(-1, 2)
    metrics = _metrics(TASKS)
    _add(metrics, scores, labels, users)
    assert metrics.compute() == pytest.approx(_expected(scores, labels, users))


def test_certain_mistakes_cost_what_they_cost() -> None:
    metrics = _metrics(("click",))
    _add(metrics, torch.tensor([[-50.0], [0.0]]), torch.tensor([[1.0], [0.0]]), torch.tensor([0, 1]))
    assert metrics.compute()["ne/click"] == pytest.approx((50 + math.log(2)) / 2 / math.log(2))


@pytest.mark.parametrize("unit", [1, 1e-3])
def test_ne_and_calibration_are_weighted_as_copies_of_candidates_are(unit: float) -> None:
    """A weight of 3 is three candidates, whatever the unit of weights."""
    scores, labels, users = _candidates(5)
    weights = torch.randint(1, 4, labels.shape, generator=torch.Generator().manual_seed(6))
    metrics = _metrics(("click",))
    evidence = torch.stack([scores[:, 0], labels[:, 0]], dim=1).double()
    metrics.update([evidence], unit * weights[:, :1], users)
    found = metrics.compute()
    copies = weights[:, 0]
    expected = _expected(*(x.repeat_interleave(copies, dim=0) for x in (scores, labels, users)))
    for name in ("ne", "calibration"):
        assert found[f"{name}/click"] == pytest.approx(expected[f"{name}/click"], rel=1e-6)
    alike = _expected(scores, labels, users)
    assert all(found[f"{name}/click"] == pytest.approx(alike[f"{name}/click"]) for name in ("auc", "gauc", "auc_95"))


def test_candidates_of_weight_zero_are_as_if_they_were_not_there() -> None:
    """Though they are scored worst of all; where only one class is left, nothing is defined."""
    scores, labels, users = _candidates(7)
    kept = torch.arange(60) % 3 > 0
    scores[~kept] = 9 - 18 * labels[~kept]
    metrics, one_class = _metrics(TASKS), _metrics(("click",))
    metrics.update(torch.stack([scores, labels], dim=2).double().unbind(1), kept[:, None].expand(-1, 2), users)
    assert metrics.compute() == pytest.approx(_expected(scores[kept], labels[kept], users[kept]))
    one_class.update([torch.stack([scores[:, 0], labels[:, 0]], dim=1).double()], labels[:, :1], users)
    found = one_class.compute()
    assert all(math.isnan(found[f"{name}/click"]) for name in ("ne", "auc", "gauc", "calibration"))


def test_one_class_is_reported_as_undefined() -> None:
    scores, labels, users = _candidates(2)
    metrics = _metrics(TASKS)
    _add(metrics, scores, torch.zeros_like(labels), users)
    result = metrics.compute()
    assert all(math.isnan(result[f"{name}/click"]) for name in ("ne", "auc", "auc_95", "gauc"))
    assert result["positives/click"] == 0


def test_scores_that_are_no_numbers_leave_their_task_undefined() -> None:
    scores, labels, users = _candidates(2)
    scores[5, 0] = torch.nan
    metrics = _metrics(TASKS)
    _add(metrics, scores, labels, users)
    result, expected = metrics.compute(), _expected(*_candidates(2))
    assert all(math.isnan(result[f"{name}/click"]) for name in ("ne", "auc", "gauc"))
    assert all(result[f"{name}/follow"] == pytest.approx(expected[f"{name}/follow"]) for name in ("ne", "auc", "gauc"))


def test_users_whose_scores_are_all_equal_count_half() -> None:
    labels, users = torch.tensor([[1.0], [0.0], [1.0], [0.0]]), torch.tensor([3, 3, 8, 8])
    scores = torch.tensor([[0.5], [0.5], [0.9], [0.1]])
    metrics = _metrics(("click",))
    _add(metrics, scores, labels, users)
    assert metrics.compute()["gauc/click"] == 0.75


def _metrics_of_a_rank(sizes: list[int]) -> dict[str, float]:
    """Each rank adds its slice of the same candidates; a rank may have none."""
    rank = torch.distributed.get_rank()
    start = sum(sizes[:rank])
    metrics = _metrics(TASKS)
    _add(metrics, *(x[start : start + sizes[rank]] for x in _candidates(3)))
    return metrics.compute()


@pytest.mark.parametrize("sizes", [[25, 35], [60, 0]])
def test_ranks_together_score_all_candidates(sizes: list[int]) -> None:
    expected = _expected(*_candidates(3))
    for result in run_ranks(2, _metrics_of_a_rank, sizes):
        assert result == pytest.approx(expected, rel=1e-6)


def test_order_of_candidates_does_not_matter() -> None:
    candidates = _candidates(4)
    order = list(range(60))
    random.Random(0).shuffle(order)
    metrics = _metrics(TASKS)
    _add(metrics, *(x[order] for x in candidates))
    assert metrics.compute() == pytest.approx(_expected(*candidates), rel=1e-6)


@pytest.mark.parametrize("per_user", [1, 6])
def test_the_interval_is_that_of_leaving_users_out(per_user: int) -> None:
    """Beside the jackknife over users, which needs no theory, where a user's candidates go up and down together."""
    generator = torch.Generator().manual_seed(per_user)
    mood = torch.randn(100, generator=generator).repeat_interleave(per_user)
    users = torch.arange(100).repeat_interleave(per_user)
    labels = (torch.randn(len(users), generator=generator) + mood > 0.3).double()
    scores = (labels + mood + torch.randn(len(users), generator=generator)).double()
    rows = list(zip(scores.tolist(), labels.tolist(), users.tolist(), strict=True))
    left_out = [_auc([row[:2] for row in rows if row[2] != user]) for user in range(100)]
    mean = sum(left_out) / 100
    jackknife = math.sqrt(99 / 100 * sum((auc - mean) ** 2 for auc in left_out))
    found = score(scores[:, None], labels[:, None], users, ("click",))
    assert found["auc_95/click"] == pytest.approx(1.96 * jackknife, rel=0.05)


def test_retrieval_metrics_follow_from_ranks() -> None:
    found = rank_means(rank_sums(torch.tensor([1, 3, 11, 100])))
    gains = {"ndcg@10": 1.5 / 4, "ndcg@50": (1.5 + 1 / math.log2(12)) / 4}
    mrr = (1 + 1 / 3 + 1 / 11 + 1 / 100) / 4
    assert found == pytest.approx({"hr@10": 2 / 4, "hr@50": 3 / 4, **gains, "mrr": mrr})
    none = rank_means(rank_sums(torch.zeros(0, dtype=torch.long)))
    assert none.keys() == found.keys() and all(math.isnan(value) for value in none.values())
