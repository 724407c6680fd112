"""A binary label: an action that was taken or not, or a column of numbers 0 and 1.

Shapes: C candidates.
"""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from pipelines.batches.batch import Labels
from pipelines.features import DatasetInfo
from trainer.evaluation.metrics import binary_metrics
from trainer.labels.column import label_column
from trainer.labels.config import LabelConfig
from trainer.labels.kind import LabelKind

SMALLEST_RATE = 1e-6


class Binary(LabelKind):
    """One logit and its cross entropy.

    Args:
        name: the action or column.
        bit: the action's bit; None for a column.
        rate: of positives in the training split, where it is known.
    """

    num_outputs = 1
    metrics = ("ne", "auc", "auc_95", "gauc", "calibration", "positives")

    def __init__(self, name: str, *, bit: int | None, rate: float | None) -> None:
        super().__init__()
        self.name, self.bit, self.rate = name, bit, rate

    def targets(self, labels: Labels) -> Tensor:
        """[C] 1 where the candidate has the label, else 0."""
        if self.bit is None:
            return labels.values[self.name].float()
        return (labels.action >> self.bit & 1).float()

    def start(self) -> Tensor:
        """The logit of the rate; 0 where it is not known."""
        if self.rate is None:
            return torch.zeros(1)
        rate = min(max(self.rate, SMALLEST_RATE), 1 - SMALLEST_RATE)
        return torch.tensor([math.log(rate / (1 - rate))])

    def loss(self, outputs_CK: Tensor, targets_C: Tensor) -> Tensor:
        """[C] cross entropy of each candidate."""
        if self.bit is not None:
            # Bits are always known, and many labels of a step are actions: a launch each, no more.
            return F.binary_cross_entropy_with_logits(outputs_CK[:, 0], targets_C, reduction="none")
        known_C = ~targets_C.isnan()
        losses_C = F.binary_cross_entropy_with_logits(outputs_CK[:, 0], targets_C.nan_to_num(), reduction="none")
        return losses_C * known_C

    def predict(self, outputs_CK: Tensor) -> Tensor:
        """[C] probability that the candidate has the label."""
        return torch.sigmoid(outputs_CK[:, 0].double())

    def evidence(self, outputs_CK: Tensor, targets_C: Tensor) -> Tensor:
        """[C, 2] logit and target."""
        return torch.stack([outputs_CK[:, 0].double(), targets_C.double()], dim=1)

    def measure(self, evidence: Tensor, weights_C: Tensor, user_ids_C: Tensor) -> dict[str, float]:
        """See `trainer.evaluation.metrics.binary_metrics`."""
        return binary_metrics(evidence[:, 0], evidence[:, 1], user_ids_C, weights_C)


def build(config: LabelConfig, info: DatasetInfo) -> Binary:
    """An action of the data set, or one of its label columns of numbers.

    Raises:
        ValueError: the column holds other numbers than 0 and 1.
    """
    if config.name in info.actions:
        return Binary(config.name, bit=info.action_bit(config.name), rate=action_rates(info).get(config.name))
    known = label_column(config, info, "number").statistics
    if known is not None and known.quantiles and not 0 <= known.quantiles[0] <= known.quantiles[-1] <= 1:
        raise ValueError(
            f"model.labels: {config.name!r} is of kind binary, but holds numbers from {known.quantiles[0]:g} to "
            f"{known.quantiles[-1]:g}: use kind=regression or kind=ordered"
        )
    return Binary(config.name, bit=None, rate=None if known is None else known.mean)


def action_rates(info: DatasetInfo) -> dict[str, float]:
    """How often each action was taken of the training split's candidates, as far as the data's description says.

    Where the data has several parts, it is the first whose candidates are counted.
    """
    described = info.details.get("statistics", {}).get("splits", {}).get("train", {})
    candidates = info.splits["train"].candidates if "train" in info.splits else 0
    if len(info.parts) > 1:
        candidates = described.get("candidates", 0)
    positives: dict[str, int] = described.get("positives", {})
    return {name: count / candidates for name, count in positives.items()} if candidates else {}
