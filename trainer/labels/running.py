"""Metrics of the training candidates as they are trained on: sums on the device that only grow, read where a step is
logged.

Each candidate is judged before its step has changed anything, so these are, in data that is ordered in time, metrics of
what comes next.  NE and calibration are exact; the AUC is that of logits in bins of 0.05, where equal bins count half.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

BINS = 512
BIN_WIDTH = 0.05
"""Logits lie in [-12.8, 12.8), or at its ends."""


class RunningMetrics(nn.Module):
    """Sums over the candidates of this process: [L, SUMS] float64, and [L, 2, BINS] counts of negatives and positives.

    Args:
        names: of the L binary labels.
    """

    sums: Tensor
    counts: Tensor

    def __init__(self, names: Sequence[str]) -> None:
        super().__init__()
        self.names = tuple(names)
        self.register_buffer("sums", torch.zeros(len(names), 4, dtype=torch.float64), persistent=False)
        self.register_buffer("counts", torch.zeros(len(names) * 2 * BINS, dtype=torch.int64), persistent=False)

    @torch.no_grad()
    def add(self, logits_CL: Tensor, targets_CL: Tensor, weights_CL: Tensor) -> None:
        """Count some candidates: targets are 0 or 1, weights 0 for what counts not.  Does not wait for the device."""
        logits_CL, weights_CL = logits_CL.float(), weights_CL.float()
        losses_CL = nn.functional.binary_cross_entropy_with_logits(logits_CL, targets_CL, reduction="none")
        of_candidate = torch.stack(
            [torch.ones_like(targets_CL), targets_CL, torch.sigmoid(logits_CL), losses_CL], dim=2
        )
        self.sums += (weights_CL[:, :, None] * of_candidate).sum(0)
        # What is not a number spoils the sums, which the run notices, but is no index.
        bin_CL = ((logits_CL.nan_to_num() / BIN_WIDTH).floor() + BINS // 2).clamp(0, BINS - 1).long()
        row_L = 2 * torch.arange(len(self.names), device=bin_CL.device)
        place_CL = (row_L + targets_CL.long()) * BINS + bin_CL
        self.counts.index_add_(0, place_CL.flatten(), (weights_CL > 0).long().flatten())

    def reset(self) -> None:
        """Begin anew, in the same memory: recorded steps go on adding to it."""
        self.sums.zero_()
        self.counts.zero_()

    def state(self) -> Tensor:
        """[all numbers] float64, to be added up over ranks."""
        return torch.cat([self.sums.flatten(), self.counts.double()])

    def metrics(self, state: Tensor) -> dict[str, float]:
        """`ne/NAME`, `auc/NAME` and `calibration/NAME` of such numbers, or of the difference of two, on the host; NaN
        where the candidates leave one undefined."""
        labels = len(self.names)
        sums, counts = state[: 4 * labels].view(labels, 4), state[4 * labels :].view(labels, 2, BINS)
        found: dict[str, float] = {}
        for name, (weight, positives, predicted, loss), (negative_B, positive_B) in zip(
            self.names, sums, counts, strict=True
        ):
            rate = positives / weight
            entropy = -(torch.xlogy(rate, rate) + torch.xlogy(1 - rate, 1 - rate))
            # Of a positive's bin, the negatives below and half of those in it.
            below_B = negative_B.cumsum(0) - negative_B / 2
            pairs = positive_B.sum() * negative_B.sum()
            found |= {
                f"ne/{name}": float(loss / weight / entropy) if entropy > 0 else float("nan"),
                f"auc/{name}": float((positive_B * below_B).sum() / pairs) if pairs > 0 else float("nan"),
                f"calibration/{name}": float(predicted / positives) if positives > 0 else float("nan"),
            }
        return found


def running_metrics(loss: nn.Module) -> RunningMetrics | None:
    """The running metrics of a model's loss; None where it has no binary label."""
    return next((each for each in loss.modules() if isinstance(each, RunningMetrics)), None)
