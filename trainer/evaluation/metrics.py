"""Quality of predictions.

    binary labels   normalised entropy (NE), AUC and its 95% interval, AUC averaged over users (GAUC), calibration
    numbers         MAE, RMSE, calibration
    classes         log loss, NE, accuracy
    next items      hit rate, NDCG, mean reciprocal rank

Equal scores are equal here: logits are compared, not probabilities, which a processor rounds by where in a batch they
stand.  All sums are in float64.  Shapes: C candidates.
"""

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F


def binary_metrics(logits: Tensor, labels: Tensor, user_ids: Tensor, weights: Tensor) -> dict[str, float]:
    """`ne`, `auc`, `auc_95` (half its 95% interval), `gauc`, `calibration` and `positives` of one binary label.

    NE is the mean cross entropy divided by the entropy of the base rate (He et al., 2014); 1 is what always predicting
    the base rate scores.  GAUC is the AUC within each user, averaged over users whose labels differ; in both, a
    positive and a negative with equal scores count half.  Calibration is the sum of probabilities over that of labels.
    `weights`, above 0, enter NE and calibration; AUC and GAUC count every candidate alike (weights that follow from the
    label would not change them).  A metric that the labels leave undefined (one class only) is NaN, and so is all but
    `positives` of logits that hold a NaN.

    All arguments are [C]: `logits` and `labels`, in {0, 1}, both float64.
    """
    names = ("ne", "auc", "auc_95", "gauc", "calibration")
    result = dict.fromkeys(names, float("nan"))
    if 0 < labels.mean() < 1 and not logits.isnan().any():
        losses = F.binary_cross_entropy_with_logits(logits, labels, reduction="none")
        predicted = (weights * torch.sigmoid(logits)).sum()
        values = (
            _normalised((weights * losses).sum(), _sums(labels.long(), weights)),
            *_auc(logits, labels, user_ids),
            _gauc(logits, labels, user_ids),
            _ratio(predicted, (weights * labels).sum()),
        )
        result = dict(zip(names, values, strict=True))
    return result | {"positives": float(labels.sum())}


def score(logits: Tensor, labels: Tensor, user_ids: Tensor, names: tuple[str, ...]) -> dict[str, float]:
    """`METRIC/NAME` of each of several binary labels, all [C, names], unweighted; see `binary_metrics`."""
    weights = torch.ones_like(labels[:, :1].sum(1))
    return {
        f"{metric}/{name}": value
        for name, x, y in zip(names, logits.T, labels.T, strict=True)
        for metric, value in binary_metrics(x, y, user_ids, weights).items()
    }


def value_metrics(predicted: Tensor, true: Tensor, weights: Tensor) -> dict[str, float]:
    """`mae`, `rmse` and `calibration`, the sum of predictions over that of values, of one number; all [C] float64."""
    total = weights.sum()
    return {
        "mae": float((weights * (predicted - true).abs()).sum() / total),
        "rmse": float(((weights * (predicted - true).square()).sum() / total).sqrt()),
        "calibration": _ratio((weights * predicted).sum(), (weights * true).sum()),
    }


def class_metrics(log_probabilities: Tensor, hits: Tensor, classes: Tensor, weights: Tensor) -> dict[str, float]:
    """`log_loss`, `ne` and `accuracy` of one label with several classes.

    NE is the log loss divided by the entropy of the classes' rates, NaN where there is one class only.  Arguments, all
    [C]: the logarithm of the true class's probability, whether it was the likeliest (0 or 1), the class, the weight.
    """
    total, loss = weights.sum(), -(weights * log_probabilities).sum()
    return {
        "log_loss": float(loss / total),
        "ne": _normalised(loss, _sums(classes, weights)),
        "accuracy": float((weights * hits).sum() / total),
    }


def _sums(index: Tensor, values: Tensor) -> Tensor:
    """[largest index + 1] the sum of the values of each index, added up in one order on a GPU, too."""
    # On a GPU torch adds them up as threads come, which a deterministic run refuses.
    return torch.bincount(index.cpu(), weights=values.cpu()).to(values.device)


def _ratio(part: Tensor, whole: Tensor) -> float:
    return float(part / whole) if whole != 0 else float("nan")


def _normalised(loss: Tensor, weight_of_class: Tensor) -> float:
    """A sum of weighted losses over what always predicting the classes' rates would have lost."""
    rates = weight_of_class / weight_of_class.sum()
    return _ratio(loss / weight_of_class.sum(), torch.special.entr(rates).sum())


def _auc(scores: Tensor, labels: Tensor, user_ids: Tensor) -> tuple[float, float]:
    """The AUC of one task, all [C], and half its 95% interval; a user's candidates may depend on each other.

    The AUC is the mean share of pairs that a positive wins.  Each candidate's part in it is its own share less the AUC,
    and the variance is the sum over users of the square of their candidates' parts (Obuchowski, Biometrics 1997;
    DeLong's where every user has one candidate).
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
    return float(auc), 1.96 * float(_sums(user, part).square().sum().sqrt())


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
    positives = _sums(user, labels.double())
    negatives = count - positives
    rank_sum = _sums(user, rank * labels)
    auc = (rank_sum - positives * (positives + 1) / 2) / (positives * negatives)
    return float(auc[(positives > 0) & (negatives > 0)].mean())


def _hit(rank_P: Tensor, k: int) -> Tensor:
    """Whether the item that came next is among the first k."""
    return (rank_P <= k).double()


def _gain(rank_P: Tensor, k: int) -> Tensor:
    """NDCG@k of one true item a prediction."""
    return _hit(rank_P, k) / torch.log2(1 + rank_P)


RANK_METRICS: dict[str, Callable[[Tensor], Tensor]] = {
    **{f"hr@{k}": partial(_hit, k=k) for k in (10, 50)},
    **{f"ndcg@{k}": partial(_gain, k=k) for k in (10, 50)},
    "mrr": torch.reciprocal,
}
"""What a next item's rank [P] among all items is worth, by name; ranks are float64 and count from 1."""


def rank_sums(ranks: Tensor) -> Tensor:
    """[metrics + 1] float64: the sum over predictions [P] of each of `RANK_METRICS`, and the number of predictions."""
    wide = ranks.double()
    values = [*(metric(wide) for metric in RANK_METRICS.values()), torch.ones_like(wide)]
    return torch.stack([value.sum() for value in values])


def rank_means(sums: Tensor) -> dict[str, float]:
    """`RANK_METRICS` from `rank_sums`; NaN, which files write as null, where there are no predictions."""
    *of_metrics, count = sums.tolist()
    return {name: value / count if count else math.nan for name, value in zip(RANK_METRICS, of_metrics, strict=True)}
