"""Target attention: a candidate weighs a user's events one by one, and no event knows of another.

    weight(e, c) = w2 relu(W1 [e, c, e * c] + b1);  y = relu(W3 [sum over events e of weight(e, c) e / max_len, c] + b3)

(Zhou et al., "Deep Interest Network for Click-Through Rate Prediction", KDD 2018, with ReLU for their Dice and a
divisor that is a constant of the model, as HSTU's is.)  Events are padded to the longest of the batch: for sequences of
hundreds.

Shapes: T packed tokens, C candidates, N places of the longest sequence, D model width, G hidden width.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from trainer.models.layer_config import LayerConfig
from trainer.models.layout import SequenceLayout, candidate_mask, candidate_rows, rectangle_of, take_rows
from trainer.models.precision import compute_dtype


class TargetAttentionTower(nn.Module):
    """The formula above, with `num_heads * qk_dim` hidden units; context tokens count as events."""

    def __init__(self, *, dim: int, layer: LayerConfig, max_len: int) -> None:
        super().__init__()
        hidden = layer.key_width
        self.max_len, self.dropout = max_len, layer.dropout
        self.event, self.candidate = nn.Linear(dim, hidden), nn.Linear(dim, hidden, bias=False)
        self.product, self.weight = nn.Linear(dim, hidden, bias=False), nn.Linear(hidden, 1)
        self.output = nn.Linear(2 * dim, dim)

    def at_candidates(self, x_TD: Tensor, layout: SequenceLayout) -> Tensor:
        """The output at every candidate, [C, D]."""
        rows_C, rectangle = candidate_rows(layout), rectangle_of(layout)
        x_CD, user_C = take_rows(x_TD, rows_C), layout.user_T[rows_C]
        # Padding is no user; what becomes of its candidates counts for nothing.
        user_C = user_C.clamp(max=rectangle.num_users - 1)
        is_event_BN = rectangle.pad((~candidate_mask(layout)).to(x_TD.dtype))
        events_CND = rectangle.pad(x_TD).index_select(0, user_C)
        # (e * c) W is e (c W), which needs no product of every pair.
        hidden_CNG = torch.bmm(events_CND, x_CD[:, :, None] * self.product.weight.t().to(x_CD.dtype))
        hidden_CNG = hidden_CNG + rectangle.pad(self.event(x_TD)).index_select(0, user_C)
        hidden_CNG = F.relu(hidden_CNG + self.candidate(x_CD)[:, None])
        weight_CN1 = torch.bmm(hidden_CNG, self.weight.weight.t().to(hidden_CNG.dtype).expand(len(x_CD), -1, 1))
        weight_C1N = (weight_CN1 + self.weight.bias).transpose(1, 2) * is_event_BN.index_select(0, user_C)[:, None]
        pooled_CD = torch.bmm(weight_C1N.to(events_CND.dtype), events_CND)[:, 0] / self.max_len
        both = F.dropout(torch.cat([pooled_CD, x_CD], dim=1), self.dropout, self.training)
        out_CD: Tensor = F.relu(self.output(both))
        return out_CD.to(compute_dtype(x_TD))
