"""A number, predicted by one output with the Huber loss.

The output is the number in units of the training split's spread, after a transform that tames long tails:

    value = inverse(centre + scale * output)

Shapes: C candidates.
"""

from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from pipelines.batches.batch import Labels
from pipelines.features import DatasetInfo
from pipelines.known_numbers import NumberStatistics
from trainer.evaluation.metrics import value_metrics
from trainer.labels.column import label_column
from trainer.labels.config import LabelConfig
from trainer.labels.kind import LabelKind

Transform = Literal["none", "log"]


class Regression(LabelKind):
    """One output.

    Args:
        name: the column.
        transform: log is sign(x) log(1 + |x|).
        centre, scale: of the transformed numbers.
        huber: deviation, in units of `scale`, from which on the loss grows linearly.
    """

    num_outputs = 1
    metrics = ("mae", "rmse", "calibration")

    def __init__(self, name: str, *, transform: Transform, centre: float, scale: float, huber: float) -> None:
        super().__init__()
        self.name, self.transform, self.centre, self.scale, self.huber = name, transform, centre, scale, huber

    def targets(self, labels: Labels) -> Tensor:
        """[C] the value of the label column."""
        return labels.values[self.name]

    def start(self) -> Tensor:
        """[1] zero, which stands for the centre of the training split's values."""
        return torch.zeros(1)

    def loss(self, outputs_CK: Tensor, targets_C: Tensor) -> Tensor:
        """[C] Huber losses in units of the scale."""
        known_C = ~targets_C.isnan()
        wanted_C = (_transformed(targets_C.nan_to_num(), self.transform) - self.centre) / self.scale
        losses_C = F.huber_loss(outputs_CK[:, 0], wanted_C.float(), reduction="none", delta=self.huber)
        return losses_C * known_C

    def predict(self, outputs_CK: Tensor) -> Tensor:
        """[C] predicted value."""
        values_C = self.centre + self.scale * outputs_CK[:, 0].double()
        return values_C if self.transform == "none" else values_C.sign() * torch.expm1(values_C.abs())

    def evidence(self, outputs_CK: Tensor, targets_C: Tensor) -> Tensor:
        """[C, 2] predicted and true value."""
        return torch.stack([self.predict(outputs_CK), targets_C.double()], dim=1)

    def measure(self, evidence: Tensor, weights_C: Tensor, user_ids_C: Tensor) -> dict[str, float]:
        """See `trainer.evaluation.metrics.value_metrics`."""
        return value_metrics(evidence[:, 0], evidence[:, 1], weights_C)


def build(config: LabelConfig, info: DatasetInfo) -> Regression:
    """A label column of numbers."""
    transform = config.transform or "none"
    centre, scale = _spread(label_column(config, info, "number").statistics, transform)
    huber = 1.0 if config.huber is None else config.huber
    return Regression(config.name, transform=transform, centre=centre, scale=scale, huber=huber)


def _transformed(values: Tensor, transform: Transform) -> Tensor:
    return values if transform == "none" else values.sign() * torch.log1p(values.abs())


def _spread(known: NumberStatistics | None, transform: Transform) -> tuple[float, float]:
    """Mean and deviation of the transformed numbers; (0, 1) where nothing is known of them or all are equal."""
    if known is None or not known.count:
        return 0.0, 1.0
    if transform == "none":
        return known.mean, known.std or 1.0
    # Quantiles stand at equal steps of probability: their mean is about the numbers' own.
    values = _transformed(torch.tensor(known.quantiles, dtype=torch.float64), transform).numpy()
    return float(np.mean(values)), float(np.std(values)) or 1.0
