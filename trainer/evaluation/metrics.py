"""Quality of predictions.

    binary labels   normalised entropy (NE), AUC and its 95% interval, AUC averaged over users (GAUC), calibration
    numbers         MAE, RMSE, calibration
    classes         log loss, NE, accuracy
    next items      hit rate, NDCG, mean reciprocal rank

Formulas are TorchRec's and torchmetrics' where they have them; GAUC is ours, because TorchRec's orders equal scores by
chance.  Both are imported where they are called: torchmetrics brings in whatever metrics of pictures and texts find
installed, which takes seconds, and a run's first step needs none.  Shapes: C candidates.
"""

import torch
from torch import Tensor

CUTOFFS = (10, 50)
"""K of retrieval's metrics."""
ETA = 1e-12
"""Keeps logarithms finite, as in TorchRec's NE."""


def binary_metrics(scores: Tensor, labels: Tensor, user_ids: Tensor, weights: Tensor) -> dict[str, float]:
    """`ne`, `auc`, `auc_95` (half its 95% interval), `gauc`, `calibration` and `positives` of one binary label.

    NE is the mean cross entropy divided by the entropy of the base rate (He et al., 2014); 1 is what always predicting
    the base rate scores.  GAUC is the AUC within each user, averaged over users whose labels differ; in both, a
    positive and a negative with equal scores count half.  Calibration is the sum of probabilities over that of labels.
    `weights` enter NE and calibration; AUC and GAUC count every candidate alike (weights that follow from the label
    would not change them).  A metric that the labels leave undefined (one class only) is NaN, and so is all but
    `positives` of scores that hold a NaN.

    All arguments are [C]: `scores` probabilities, `labels` in {0, 1}, both float64.
    """
    from torchmetrics.functional.classification import binary_auroc
    from torchrec.metrics.calibration import compute_calibration

    names = ("ne", "auc", "auc_95", "gauc", "calibration")
    result = dict.fromkeys(names, float("nan"))
    if 0 < labels.mean() < 1 and not scores.isnan().any():
        calibration = compute_calibration((weights * scores).sum(), (weights * labels).sum())
        values = (
            _ne(scores, labels, weights),
            binary_auroc(scores, labels.long()).item(),
            _auc_95(scores, labels, user_ids),
            _gauc(scores, labels, user_ids),
            float(calibration),
        )
        result = dict(zip(names, values, strict=True))
    return result | {"positives": float(labels.sum())}


def score(scores: Tensor, labels: Tensor, user_ids: Tensor, names: tuple[str, ...]) -> dict[str, float]:
    """`METRIC/NAME` of each of several binary labels, all [C, names], unweighted; see `binary_metrics`."""
    weights = torch.ones_like(labels[:, :1].sum(1))
    return {
        f"{metric}/{name}": value
        for name, s, y in zip(names, scores.T, labels.T, strict=True)
        for metric, value in binary_metrics(s, y, user_ids, weights).items()
    }


def value_metrics(predicted: Tensor, true: Tensor, weights: Tensor) -> dict[str, float]:
    """`mae`, `rmse` and `calibration`, the sum of predictions over that of values, of one number; all [C] float64."""
    from torchrec.metrics.mae import compute_error_sum, compute_mae
    from torchrec.metrics.mse import compute_error_sum as compute_squared_error_sum
    from torchrec.metrics.mse import compute_rmse

    total = weights.sum()
    return {
        "mae": float(compute_mae(compute_error_sum(true, predicted, weights), total)),
        "rmse": float(compute_rmse(compute_squared_error_sum(true, predicted, weights), total)),
        "calibration": _ratio((weights * predicted).sum(), (weights * true).sum()),
    }


def class_metrics(log_probabilities: Tensor, hits: Tensor, classes: Tensor, weights: Tensor) -> dict[str, float]:
    """`log_loss`, `ne` and `accuracy` of one label with several classes.

    NE is the log loss divided by the entropy of the classes' rates, NaN where there is one class only.  Arguments, all
    [C]: the logarithm of the true class's probability, whether it was the likeliest (0 or 1), the class, the weight.
    """
    total = weights.sum()
    log_loss = -(weights * log_probabilities).sum() / total
    rates = _sums(classes, weights) / total
    return {
        "log_loss": float(log_loss),
        "ne": _ratio(log_loss, torch.special.entr(rates).sum()),
        "accuracy": float((weights * hits).sum() / total),
    }


def _sums(index: Tensor, values: Tensor) -> Tensor:
    """[largest index + 1] the sum of the values of each index, added up in one order on a GPU, too."""
    # On a GPU torch adds them up as threads come, which a deterministic run refuses.
    return torch.bincount(index.cpu(), weights=values.cpu()).to(values.device)


def _ratio(part: Tensor, whole: Tensor) -> float:
    return float(part / whole) if whole != 0 else float("nan")


def _ne(scores: Tensor, labels: Tensor, weights: Tensor) -> float:
    from torchrec.metrics.ne import compute_cross_entropy, compute_ne

    positives = (weights * labels).sum()
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
    return 1.96 * float(_sums(user, part).square().sum().sqrt())


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


def retrieval_scores(ranks: Tensor) -> Tensor:
    """Sums over predictions, float64: hits in the best K and NDCG@K for each K of `CUTOFFS`, 1 / rank, their number.

    `ranks` [P] count from 1.  With one true item a prediction, NDCG@K is 1 / log2(1 + rank) where rank <= K.
    """
    wide = ranks.double()
    hits = [(wide <= k).double() for k in CUTOFFS]
    gains = [hit / torch.log2(1 + wide) for hit in hits]
    return torch.stack([values.sum() for values in (*hits, *gains, 1 / wide, torch.ones_like(wide))])
