"""Rates as inputs: what the log knew of a candidate before it came, as log-odds for its token and for its logits.

Ids learn an item's and a user's rate only from many labels; here the rates are counted (`pipelines.counts`), and the
model learns what to add.  It starts at the baseline: an action's log-odds are those of its rate overall, plus how far
the item's and the user's own log-odds lie from them.

Shapes: C candidates, G groups of counts, A actions, P priors, F features, M tasks, D model width.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from pipelines.counts import ITEM, USER, Counts

PRIORS = (1.0, 10.0, 100.0)
"""Imagined observations at the overall rate with which each count is smoothed: how much a count is worth differs from
log to log, and the model chooses by mixing them."""
START_PRIOR = PRIORS.index(10.0)
"""The prior of the rates that the untrained model predicts."""
RATE_EPS = 1e-6
"""Actions count as taken at least, and at most but for, this often."""


class Rates(nn.Module):
    """Log-odds of counted groups, and what they add to candidates' tokens and logits.

    Args:
        counts: the groups' columns.
        action_rates: how often each action is taken overall, [A].
        task_bits: the action of each task, [M].
        dim: D.
    """

    action_log_odds: Tensor
    action_rates: Tensor

    def __init__(
        self, counts: Sequence[Counts], *, action_rates: Sequence[float], task_bits: Sequence[int], dim: int
    ) -> None:
        super().__init__()
        self.counts = tuple(counts)
        rates = torch.tensor(action_rates, dtype=torch.float32).clamp(RATE_EPS, 1 - RATE_EPS)
        self.register_buffer("action_rates", rates, persistent=False)
        self.register_buffer("action_log_odds", torch.logit(rates), persistent=False)
        features = len(counts) * (1 + len(PRIORS) * len(action_rates))
        self.to_token = nn.Linear(features, dim)
        self.to_logit = nn.Linear(features, len(task_bits), bias=False)
        self._start_at_rates(task_bits)

    @torch.no_grad()
    def _start_at_rates(self, task_bits: Sequence[int]) -> None:
        """Let each task's logit add its action's log-odds of item and user, and nothing else."""
        self.to_logit.weight.zero_()
        num_actions = len(self.action_rates)
        for group, counts in enumerate(self.counts):
            if counts.group in (ITEM, USER):
                first = group * (1 + len(PRIORS) * num_actions) + 1 + START_PRIOR * num_actions
                for task, bit in enumerate(task_bits):
                    self.to_logit.weight[task, first + bit] = 1.0

    def features(self, numbers: Mapping[str, Tensor]) -> Tensor:
        """The inputs of both maps, [C, F] float32, from columns of counts, [C] each; a missing count is none.

        Of each group: log(1 + events) / 4, then, for each prior, how far each action's log-odds lie from those overall.
        """
        parts = []
        for each in self.counts:
            seen_C = numbers[each.seen].float().nan_to_num(0.0)
            taken_CA = torch.stack([numbers[name].float().nan_to_num(0.0) for name in each.taken], dim=1)
            left_CA = (seen_C[:, None] - taken_CA).clamp(min=0)
            parts.append(torch.log1p(seen_C)[:, None] / 4)
            for prior in PRIORS:
                # Without a quotient, which float32 would round to 1 for an action that is nearly always taken.
                odds_CA = torch.log(taken_CA + prior * self.action_rates) - torch.log(
                    left_CA + prior * (1 - self.action_rates)
                )
                parts.append(odds_CA - self.action_log_odds)
        return torch.cat(parts, dim=1)

    def tokens(self, features_CF: Tensor) -> Tensor:
        """What candidates' tokens get, [C, D]."""
        result: Tensor = self.to_token(features_CF)
        return result

    def logits(self, features_CF: Tensor) -> Tensor:
        """What candidates' logits get, [C, M] float32."""
        with torch.autocast(features_CF.device.type, enabled=False):
            result: Tensor = self.to_logit(features_CF)
        return result
