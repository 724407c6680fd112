"""Quality over all ranks: for ranking normalised entropy (NE), AUC with its 95% interval, and AUC averaged over users
(GAUC), one a task; for retrieval hit rate, NDCG and mean reciprocal rank.

Candidates are collected on every rank and joined when the result is asked for.  NE's and AUC's formulas are TorchRec's
and torchmetrics'; GAUC is ours, because TorchRec's orders equal scores by chance.
"""

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.functional.classification import binary_auroc
from torchmetrics.utilities.data import dim_zero_cat
from torchrec.metrics.ne import compute_cross_entropy, compute_ne

CUTOFFS = (10, 50)
"""K of retrieval's metrics."""
ETA = 1e-12
"""Keeps logarithms finite, as in TorchRec's NE."""


class RankingMetrics(Metric):
    """NE, AUC, half the width of its 95% interval, GAUC, and the number of positives of several binary tasks.

    NE is the mean cross entropy divided by the entropy of the task's base rate (He et al., 2014); 1 is what always
    predicting the base rate scores.  GAUC is the AUC within each user, averaged over users whose labels differ;
    in both, a positive and a negative with equal scores count half.
    A metric that the labels leave undefined (one class only) is reported as NaN, and so is all of a task whose scores
    hold a NaN.
    """

    full_state_update = False
    scores: list[Tensor]
    labels: list[Tensor]
    user_ids: list[Tensor]

    def __init__(self, tasks: tuple[str, ...], device: torch.device) -> None:
        super().__init__()
        self.tasks = tasks
        for name in ("scores", "labels", "user_ids"):
            self.add_state(name, default=[], dist_reduce_fx="cat")
        self.to(device)

    def update(self, scores: Tensor, labels: Tensor, user_ids: Tensor) -> None:
        """Add candidates: `scores` [C, tasks] probabilities, `labels` [C, tasks] in {0, 1}, `user_ids` [C]."""
        self.scores.append(scores.double())
        self.labels.append(labels.double())
        self.user_ids.append(user_ids)

    def compute(self) -> dict[str, float]:
        """The metrics of `score` over everything added on all ranks."""
        return score(dim_zero_cat(self.scores), dim_zero_cat(self.labels), dim_zero_cat(self.user_ids), self.tasks)


def score(scores: Tensor, labels: Tensor, user_ids: Tensor, tasks: tuple[str, ...]) -> dict[str, float]:
    """`ne/TASK`, `auc/TASK`, `auc_95/TASK`, `gauc/TASK`, `positives/TASK`; arguments as `RankingMetrics.update`'s."""
    result = {}
    for task, s, y in zip(tasks, scores.T, labels.T, strict=True):
        defined = bool(0 < y.mean() < 1) and not bool(s.isnan().any())
        result[f"ne/{task}"] = _ne(s, y) if defined else float("nan")
        result[f"auc/{task}"] = binary_auroc(s, y.long()).item() if defined else float("nan")
        result[f"auc_95/{task}"] = _auc_95(s, y, user_ids) if defined else float("nan")
        result[f"gauc/{task}"] = _gauc(s, y, user_ids) if defined else float("nan")
        result[f"positives/{task}"] = float(y.sum())
    return result


def _ne(scores: Tensor, labels: Tensor) -> float:
    weights = torch.ones_like(labels)
    positives = labels.sum()
    cross_entropy = compute_cross_entropy(labels, scores, weights, ETA).sum()
    return float(compute_ne(cross_entropy, weights.sum(), positives, weights.sum() - positives, ETA))


def _auc_95(scores: Tensor, labels: Tensor, user_ids: Tensor) -> float:
    """Half the width of the 95% interval of the AUC of one task, all [C]; a user's candidates may depend on each other.

    Each candidate's part in the AUC is its share of pairs won, less the AUC; the variance is the sum over users of the
    square of their candidates' parts (Obuchowski, Biometrics 1997; DeLong's where every user has one candidate).
    """
    positive = labels > 0
    wins = torch.empty_like(scores)
    for of, other, sign in ((positive, ~positive, 1), (~positive, positive, -1)):
        values, sorted_others = scores[of], scores[other].sort().values
        below = torch.searchsorted(sorted_others, values) + torch.searchsorted(sorted_others, values, right=True)
        share = below.double() / (2 * len(sorted_others))
        wins[of] = share if sign > 0 else 1 - share
    auc = wins[positive].mean()
    part = (wins - auc) / torch.where(positive, positive.sum(), (~positive).sum())
    user = torch.unique(user_ids, return_inverse=True)[1]
    return 1.96 * float(torch.bincount(user, weights=part).square().sum().sqrt())


def _gauc(scores: Tensor, labels: Tensor, user_ids: Tensor) -> float:
    """Mean AUC of the users of one task, all [C]; NaN where no user's labels differ.

    A user's AUC is (R - p (p + 1) / 2) / (p n) for p positives, n negatives and R the sum of the positives' ranks,
    where equal scores share their mean rank (Mann and Whitney, 1947).
    """
    user = torch.unique(user_ids, return_inverse=True)[1]
    order = torch.argsort(scores, stable=True)
    order = order[torch.argsort(user[order], stable=True)]
    user, scores, labels = user[order], scores[order], labels[order]
    # Runs of one user's equal scores, in the order of users and scores.
    changes = (user[1:] != user[:-1]) | (scores[1:] != scores[:-1])
    run = torch.cat([changes.new_zeros(1), changes]).long().cumsum(0)
    run_ends = torch.bincount(run).cumsum(0)
    mean_place = (run_ends - 0.5 * (torch.bincount(run) - 1)).double()[run]
    count = torch.bincount(user)
    rank = mean_place - (count.cumsum(0) - count)[user]
    positives = torch.bincount(user, weights=labels.double())
    negatives = count - positives
    rank_sum = torch.bincount(user, weights=rank * labels)
    auc = (rank_sum - positives * (positives + 1) / 2) / (positives * negatives)
    return float(auc[(positives > 0) & (negatives > 0)].mean())


def retrieval_scores(ranks: Tensor) -> Tensor:
    """Sums over predictions, float64: hits in the best K and NDCG@K for each K of `CUTOFFS`, 1 / rank, their number.

    `ranks` [P] count from 1.  With one true item a prediction, NDCG@K is 1 / log2(1 + rank) where rank <= K.
    """
    wide = ranks.double()
    hits = [(wide <= k).double() for k in CUTOFFS]
    gains = [hit / torch.log2(1 + wide) for hit in hits]
    return torch.stack([values.sum() for values in (*hits, *gains, 1 / wide, torch.ones_like(wide))])
