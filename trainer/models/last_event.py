"""SASRec: a Transformer over events alone; the last event's output, one for all candidates, is multiplied by each.

(Kang and McAuley, "Self-Attentive Sequential Recommendation", ICDM 2018: their score is the sum of that product's
elements, which a head of several labels weighs instead.)

Shapes: T packed tokens, B users, C candidates, D model width.
"""

import torch
from torch import Tensor, nn

from trainer.models.layer_config import LayerConfig
from trainer.models.layout import SequenceLayout, candidate_rows, make_layout, take_rows
from trainer.models.softmax import SoftmaxTower


class LastEventTower(nn.Module):
    """Softmax layers that see no candidate."""

    def __init__(self, *, dim: int, layer: LayerConfig, num_layers: int) -> None:
        super().__init__()
        self.tower = SoftmaxTower(dim=dim, layer=layer, num_layers=num_layers)

    def at_candidates(self, x_TD: Tensor, layout: SequenceLayout) -> Tensor:
        """The user's vector times each candidate's token, [C, D]; 0 of a user without context and events."""
        none, none_host = torch.zeros_like(layout.num_candidates), torch.zeros_like(layout.num_candidates_host)
        events = make_layout(
            layout.history_lens,
            none,
            layout.history_lens_host,
            none_host,
            num_context=layout.num_context,
            padded=layout.padded,
        )
        rows_T = layout.offsets[events.user_T] + events.index_T
        outputs_TD = self.tower.everywhere(take_rows(x_TD, rows_T), events, whole=layout)
        lens_B = events.offsets.diff()
        last_B = torch.where(lens_B > 0, events.offsets[1:] - 1, -1)
        rows_C = candidate_rows(layout)
        user_CD = take_rows(outputs_TD, last_B).index_select(0, layout.user_T[rows_C])
        return user_CD * take_rows(x_TD, rows_C).to(user_CD.dtype)
