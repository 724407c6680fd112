"""Rates as inputs: what the log knew of a candidate before it came, as log-odds for its token and for its logits.

Ids learn an item's and a user's rate only from many labels; here the rates are counted (`pipelines.counts`), and the
model learns what to add.  It starts at the baseline: an action's log-odds are those of its rate overall, plus how far
the item's and the user's own log-odds lie from them.

Shapes: C candidates, A actions, F features, K outputs, D model width.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from pipelines.counts import ITEM, USER, Counts
from trainer.models.rate_config import START_PRIOR, rate_priors, rate_width

RATE_EPS = 1e-6
"""Actions count as taken at least, and at most but for, this often."""


class Rates(nn.Module):
    """Log-odds of counted groups, and what they add to candidates' tokens and logits.

    Args:
        counts: the groups' columns.
        action_rates: how often each action is taken overall, [A].
        output_bits: the action that each output of the head is the logit of, None of what is no action, [K].
        dim: D.
    """

    action_rates: Tensor

    def __init__(
        self, counts: Sequence[Counts], *, action_rates: Sequence[float], output_bits: Sequence[int | None], dim: int
    ) -> None:
        super().__init__()
        self.counts = tuple(counts)
        # Saved with the model: counts of another day are read by the same measure.
        self.register_buffer("action_rates", torch.tensor(action_rates, dtype=torch.float32))
        features = rate_width([each.group for each in counts], len(action_rates))
        self.to_token = nn.Linear(features, dim)
        self.to_logit = nn.Linear(features, len(output_bits), bias=False)
        self._start_at_rates(output_bits)

    @torch.no_grad()
    def _start_at_rates(self, output_bits: Sequence[int | None]) -> None:
        """Let each action's logit add its log-odds of item and user, and nothing else."""
        self.to_logit.weight.zero_()
        num_actions = len(self.action_rates)
        groups = [each.group for each in self.counts]
        for place, group in enumerate(groups):
            if group in (ITEM, USER):
                prior = rate_priors(group).index(START_PRIOR)
                first = rate_width(groups[:place], num_actions) + 1 + prior * num_actions
                for output, bit in enumerate(output_bits):
                    if bit is not None:
                        self.to_logit.weight[output, first + bit] = 1.0

    def forward(self, numbers: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """([C, D] for candidates' tokens, [C, K] float32 for their logits), from columns of counts, [C] each."""
        features_CF = self.features(numbers)
        with torch.autocast(features_CF.device.type, enabled=False):
            logits_CK: Tensor = self.to_logit(features_CF)
        return self.to_token(features_CF), logits_CK

    def features(self, numbers: Mapping[str, Tensor]) -> Tensor:
        """The inputs of both maps, [C, F] float32; a missing count is none.

        Of each group: log(1 + events) / 4, then, for each prior, how far each action's log-odds lie from those overall;
        0 for an action that is always or never taken, of which a count says nothing.
        """
        rates_A = self.action_rates.clamp(RATE_EPS, 1 - RATE_EPS)
        varies_A = (self.action_rates > 0) & (self.action_rates < 1)
        parts = []
        for each in self.counts:
            seen_C = numbers[each.seen].float().nan_to_num(0.0)
            taken_CA = torch.stack([numbers[name].float().nan_to_num(0.0) for name in each.taken], dim=1)
            left_CA = (seen_C[:, None] - taken_CA).clamp(min=0)
            parts.append(torch.log1p(seen_C)[:, None] / 4)
            for prior in rate_priors(each.group):
                # Without a quotient, which float32 would round to 1 for an action that is nearly always taken.
                odds_CA = torch.log(taken_CA + prior * rates_A) - torch.log(left_CA + prior * (1 - rates_A))
                parts.append(torch.where(varies_A, odds_CA - torch.logit(rates_A), 0))
        return torch.cat(parts, dim=1)
