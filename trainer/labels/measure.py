"""Metrics of all labels over all ranks.

Candidates' evidence is collected on every rank and joined when the result is asked for.

Shapes: C candidates, L labels.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities.data import dim_zero_cat

from trainer.labels.kind import LabelKind


class LabelMetrics(Metric):
    """What each label's kind measures, over the candidates whose target is known and that count."""

    full_state_update = False
    user_ids: list[Tensor]
    weights: list[Tensor]

    def __init__(self, labels: Sequence[LabelKind], device: torch.device) -> None:
        super().__init__()
        self._labels = tuple(labels)
        for name in ("user_ids", "weights", *self._states()):
            self.add_state(name, default=[], dist_reduce_fx="cat")
        self.to(device)

    def update(self, evidence: Sequence[Tensor], weights_CL: Tensor, user_ids_C: Tensor) -> None:
        """Add candidates: each label's `LabelKind.evidence`, what a candidate counts in each label, and its user."""
        self.user_ids.append(user_ids_C)
        self.weights.append(weights_CL.double())
        for state, values in zip(self._states(), evidence, strict=True):
            getattr(self, state).append(values)

    def compute(self) -> dict[str, float]:
        """`METRIC/LABEL` over everything added on all ranks; NaN where no candidate with a known target counts."""
        user_ids_C, weights_CL = dim_zero_cat(self.user_ids), dim_zero_cat(self.weights)
        result: dict[str, float] = {}
        for label, state, weights_C in zip(self._labels, self._states(), weights_CL.T, strict=True):
            evidence = dim_zero_cat(getattr(self, state))
            # A prediction that is not a number stays, for it must not look like a missing target.
            known_C = ~evidence[:, -1].isnan() & (weights_C != 0)
            found = dict.fromkeys(label.metrics, float("nan"))
            if known_C.any():
                found = label.measure(evidence[known_C], weights_C[known_C], user_ids_C[known_C])
            result |= {f"{metric}/{label.name}": found[metric] for metric in label.metrics}
        return result

    def _states(self) -> list[str]:
        """Names of the states that hold each label's evidence."""
        return [f"evidence_{place}" for place in range(len(self._labels))]
