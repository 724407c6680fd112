"""Quality over all ranks: for ranking normalised entropy (NE), AUC, and AUC averaged over users (GAUC), one a task; for
retrieval hit rate, NDCG and mean reciprocal rank.

Candidates are collected on every rank and joined when the result is asked for; the formulas are torchmetrics' and
TorchRec's own.
"""

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torchmetrics import Metric
from torchmetrics.functional.classification import binary_auroc
from torchmetrics.utilities.data import dim_zero_cat
from torchrec.metrics.gauc import compute_gauc_3d
from torchrec.metrics.ne import compute_cross_entropy, compute_ne

CUTOFFS = (10, 50)
"""K of retrieval's metrics."""
ETA = 1e-12
"""Keeps logarithms finite, as in TorchRec's NE."""


class RankingMetrics(Metric):
    """NE, AUC and GAUC of several binary tasks.

    NE is the mean cross entropy divided by the entropy of the task's base rate (He et al., 2014); 1 is what always
    predicting the base rate scores.  GAUC is the AUC within each user, averaged over users whose labels differ.
    A metric that the labels leave undefined (one class only) is reported as NaN.
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
        """`ne/TASK`, `auc/TASK` and `gauc/TASK` over everything added on all ranks."""
        return score(dim_zero_cat(self.scores), dim_zero_cat(self.labels), dim_zero_cat(self.user_ids), self.tasks)


def score(scores: Tensor, labels: Tensor, user_ids: Tensor, tasks: tuple[str, ...]) -> dict[str, float]:
    """`ne/TASK`, `auc/TASK` and `gauc/TASK` of these candidates; arguments as `RankingMetrics.update`'s."""
    gauc = _gauc(scores.T, labels.T, user_ids)
    result = {}
    for task, s, y, user_auc in zip(tasks, scores.T, labels.T, gauc, strict=True):
        both_classes = bool(0 < y.mean() < 1)
        result[f"ne/{task}"] = _ne(s, y) if both_classes else float("nan")
        result[f"auc/{task}"] = binary_auroc(s, y.long()).item() if both_classes else float("nan")
        result[f"gauc/{task}"] = user_auc
    return result


def _ne(scores: Tensor, labels: Tensor) -> float:
    weights = torch.ones_like(labels)
    positives = labels.sum()
    cross_entropy = compute_cross_entropy(labels, scores, weights, ETA).sum()
    return float(compute_ne(cross_entropy, weights.sum(), positives, weights.sum() - positives, ETA))


def _gauc(scores: Tensor, labels: Tensor, user_ids: Tensor) -> list[float]:
    """Group candidates by user; `scores` and `labels` are [tasks, C]."""
    order = torch.argsort(user_ids, stable=True)
    group_sizes = torch.unique_consecutive(user_ids[order], return_counts=True)[1].tolist()

    def by_user(values: Tensor) -> Tensor:
        """[tasks, users, longest], padded with zeros."""
        return pad_sequence(list(torch.split(values.T[order], group_sizes)), batch_first=True).permute(2, 0, 1)

    sums = compute_gauc_3d(by_user(scores), by_user(labels), by_user(torch.ones_like(labels)))
    totals, counts = sums["auc_sum"].tolist(), sums["num_samples"].tolist()
    return [total / count if count else float("nan") for total, count in zip(totals, counts, strict=True)]


def retrieval_scores(ranks: Tensor) -> Tensor:
    """Sums over predictions, float64: hits in the best K and NDCG@K for each K of `CUTOFFS`, 1 / rank, their number.

    `ranks` [P] count from 1.  With one true item a prediction, NDCG@K is 1 / log2(1 + rank) where rank <= K.
    """
    wide = ranks.double()
    hits = [(wide <= k).double() for k in CUTOFFS]
    gains = [hit / torch.log2(1 + wide) for hit in hits]
    return torch.stack([values.sum() for values in (*hits, *gains, 1 / wide, torch.ones_like(wide))])
