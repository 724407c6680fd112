"""One of several classes: a logit a class, and the cross entropy.

Shapes: C candidates, K classes.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from pipelines.batches.batch import Labels
from pipelines.features import UNKNOWN_ID, DatasetInfo
from trainer.evaluation.metrics import class_metrics
from trainer.labels.column import label_column
from trainer.labels.config import LabelConfig
from trainer.labels.kind import LabelKind


class Classes(LabelKind):
    """K logits, of the ids from 1 on; the unknown id is a target that is not known.

    Args:
        name: the column.
        num_classes: K.
    """

    metrics = ("log_loss", "ne", "accuracy")

    def __init__(self, name: str, *, num_classes: int) -> None:
        super().__init__()
        self.name, self.num_outputs = name, num_classes

    def targets(self, labels: Labels) -> Tensor:
        """[C] float64, ids less 1."""
        ids_C = labels.values[self.name]
        return torch.where(ids_C == UNKNOWN_ID, torch.nan, ids_C.double() - 1)

    def start(self) -> Tensor:
        """[K] zeros: all classes are as likely."""
        return torch.zeros(self.num_outputs)

    def start_at(self, counts: Tensor) -> Tensor:
        """[K] outputs of the rates that counts of the ids [K + 1] tell; each class is counted once more."""
        return torch.log(counts[1:] + 1).float()

    def loss(self, outputs_CK: Tensor, targets_C: Tensor) -> Tensor:
        """[C] cross entropy of each candidate."""
        losses_C = F.cross_entropy(outputs_CK, targets_C.nan_to_num().long(), reduction="none")
        return losses_C * ~targets_C.isnan()

    def predict(self, outputs_CK: Tensor) -> Tensor:
        """[C, K] probability of each class."""
        return torch.softmax(outputs_CK.double(), dim=1)

    def evidence(self, outputs_CK: Tensor, targets_C: Tensor) -> Tensor:
        """[C, 3] logarithm of the true class's probability, whether it was the likeliest, the class."""
        place_C = targets_C.nan_to_num().long()
        log_C = torch.log_softmax(outputs_CK.double(), dim=1).gather(1, place_C[:, None])[:, 0]
        # A class that ties with another counts as missed.
        own_C1 = outputs_CK.gather(1, place_C[:, None])
        hit_C = (outputs_CK >= own_C1).sum(1) == 1
        return torch.stack([log_C, hit_C.double(), targets_C], dim=1)

    def measure(self, evidence: Tensor, weights_C: Tensor, user_ids_C: Tensor) -> dict[str, float]:
        """See `trainer.evaluation.metrics.class_metrics`."""
        return class_metrics(evidence[:, 0], evidence[:, 1], evidence[:, 2].long(), weights_C)


def build(config: LabelConfig, info: DatasetInfo) -> Classes:
    """A label column of ids; its space's rows are the classes."""
    column = label_column(config, info, "id")
    assert column.space is not None
    return Classes(config.name, num_classes=max(1, info.spaces[column.space].rows - 1))
