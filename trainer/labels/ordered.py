"""A number as ordered bits: one logit for each threshold, which says whether the number reaches it.

No assumption on the number's distribution enters, and no outlier outweighs the rest.  The prediction is the mean of the
buckets' values under the bits' probabilities: v_0 + sum over k of (v_k - v_k-1) p_k.

Shapes: C candidates, K thresholds.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from pipelines.batches.batch import Labels
from pipelines.features import DatasetInfo
from trainer.evaluation.metrics import value_metrics
from trainer.labels.binary import SMALLEST_RATE
from trainer.labels.column import label_column
from trainer.labels.config import LabelConfig
from trainer.labels.kind import LabelKind


class Ordered(LabelKind):
    """K logits, and the mean of their cross entropies.

    Args:
        name: the column.
        thresholds: K, rising.
        values: K + 1, of the numbers below the first threshold, between thresholds, from the last on.
        rates: K, the part of the training split that reaches each threshold.
    """

    metrics = ("mae", "rmse", "calibration")
    thresholds: Tensor
    values: Tensor

    def __init__(
        self, name: str, *, thresholds: Sequence[float], values: Sequence[float], rates: Sequence[float]
    ) -> None:
        super().__init__()
        self.name, self.num_outputs, self.rates = name, len(thresholds), tuple(rates)
        self.register_buffer("thresholds", torch.tensor(thresholds, dtype=torch.float64), persistent=False)
        self.register_buffer("values", torch.tensor(values, dtype=torch.float64), persistent=False)

    def targets(self, labels: Labels) -> Tensor:
        """[C] the value of the label column."""
        return labels.values[self.name]

    def start(self) -> Tensor:
        """[K] log-odds that the value lies above each border."""
        return torch.logit(torch.tensor(self.rates), eps=SMALLEST_RATE)

    def loss(self, outputs_CK: Tensor, targets_C: Tensor) -> Tensor:
        """[C] mean cross entropies of the bits."""
        bits_CK = (targets_C[:, None] >= self.thresholds).float()
        losses_CK = F.binary_cross_entropy_with_logits(outputs_CK, bits_CK, reduction="none")
        return losses_CK.mean(1) * ~targets_C.isnan()

    def predict(self, outputs_CK: Tensor) -> Tensor:
        """[C] expected value."""
        return self.values[0] + torch.sigmoid(outputs_CK.double()) @ self.values.diff()

    def evidence(self, outputs_CK: Tensor, targets_C: Tensor) -> Tensor:
        """[C, 2] predicted and true value."""
        return torch.stack([self.predict(outputs_CK), targets_C.double()], dim=1)

    def measure(self, evidence: Tensor, weights_C: Tensor, user_ids_C: Tensor) -> dict[str, float]:
        """See `trainer.evaluation.metrics.value_metrics`."""
        return value_metrics(evidence[:, 0], evidence[:, 1], weights_C)


def build(config: LabelConfig, info: DatasetInfo) -> Ordered:
    """A label column of numbers, cut where the config says or, by the training split's quantiles, into equal parts.

    Raises:
        ValueError: the data set does not describe the column's numbers, or all of them are equal.
    """
    known = label_column(config, info, "number").statistics
    if known is None or not known.count or len(known.quantiles) < 2:
        raise ValueError(
            f"model.labels: kind=ordered of {config.name!r} needs the quantiles of the training split, which "
            f"{info.name} does not give: prepare the data anew, or use kind=regression"
        )
    quantiles = np.array(known.quantiles)
    probability = np.linspace(0, 1, len(quantiles))
    thresholds = np.array(config.thresholds)
    if not config.thresholds:
        thresholds = np.unique(np.interp(np.linspace(0, 1, (config.buckets or 16) + 1)[1:-1], probability, quantiles))
        thresholds = thresholds[thresholds > quantiles[0]]
    if not len(thresholds):
        raise ValueError(f"model.labels: {config.name!r} has one value in the training split, nothing is left to learn")
    # Finer than the quantiles, so that each bucket holds some; the training split reaches a threshold that often.
    fine = np.interp((np.arange(4096) + 0.5) / 4096, probability, quantiles)
    bucket = np.searchsorted(thresholds, fine, side="right")
    borders = np.concatenate([[min(quantiles[0], thresholds[0])], thresholds, [max(quantiles[-1], thresholds[-1])]])
    values = [
        float(fine[bucket == index].mean()) if (bucket == index).any() else float(borders[index : index + 2].mean())
        for index in range(len(thresholds) + 1)
    ]
    rates = [float((fine >= threshold).mean()) for threshold in thresholds]
    return Ordered(config.name, thresholds=thresholds.tolist(), values=values, rates=rates)
