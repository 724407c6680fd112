"""A Transformer's layers over packed tokens, with softmax attention: what HSTU is compared with.

    y = norm(x);  z = y + attention(y, x) Wo;  z = norm(z);  out = z + dropout(relu(z W1)) W2

(Kang and McAuley, "Self-Attentive Sequential Recommendation", ICDM 2018, as generative-recommenders trains it.)
Sequences are padded to the longest of the batch: made for sequences of hundreds.

Shapes: T packed tokens, B users, N places of the longest sequence, D model width, H heads, K width of a head.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from attention_kernels.rectangle import Rectangle
from trainer.models.layer_config import LayerConfig
from trainer.models.layout import EventTimes, SequenceLayout, candidate_rows, rectangle_of, take_rows
from trainer.models.precision import compute_dtype


class SoftmaxLayer(nn.Module):
    """The layer above; the hidden layer behind attention is as wide as the model."""

    def __init__(self, *, dim: int, layer: LayerConfig) -> None:
        super().__init__()
        self.num_heads, self.scale, self.dropout = layer.num_heads, layer.scale, layer.dropout
        self.key_width = layer.key_width
        self.attention_norm = nn.LayerNorm(dim, eps=layer.norm_eps)
        self.query = nn.Linear(dim, self.key_width)
        self.key_value = nn.Linear(dim, self.key_width + layer.gate_width)
        self.attention_output = nn.Linear(layer.gate_width, dim)
        self.hidden_norm = nn.LayerNorm(dim, eps=layer.norm_eps)
        self.hidden, self.output = nn.Linear(dim, dim), nn.Linear(dim, dim)

    def forward(self, x_TD: Tensor, rectangle: Rectangle, mask_B1NN: Tensor | None = None) -> Tensor:
        """[T, D]; `rectangle` says where each token lies, the mask who sees whom; without one, all that came before."""
        y_TD = self.attention_norm(x_TD)
        key_value = self.key_value(x_TD)
        q, k, v = self.query(y_TD), key_value[:, : self.key_width], key_value[:, self.key_width :]
        q_BHNK, k_BHNK, v_BHNV = (self._by_head(rectangle.pad(each)) for each in (q, k, v))
        # Padding lies behind a sequence, where no event looks.
        attention_BHNV = F.scaled_dot_product_attention(
            q_BHNK,
            k_BHNK,
            v_BHNV,
            attn_mask=mask_B1NN,
            dropout_p=self.dropout if self.training else 0.0,
            is_causal=mask_B1NN is None,
            scale=self.scale,
        )
        attended_TW = rectangle.take(attention_BHNV.transpose(1, 2).flatten(2))
        z_TD = self.hidden_norm(y_TD + self.attention_output(attended_TW))
        hidden_TD = F.dropout(F.relu(self.hidden(z_TD)), self.dropout, self.training)
        out_TD: Tensor = z_TD + F.dropout(self.output(hidden_TD), self.dropout, self.training)
        return out_TD

    def _by_head(self, x_BNW: Tensor) -> Tensor:
        """The columns split by heads, [B, H, N, W / H]."""
        return x_BNW.view(*x_BNW.shape[:2], self.num_heads, x_BNW.shape[2] // self.num_heads).transpose(1, 2)


class SoftmaxTower(nn.Module):
    """Layers over one packed batch of sequences whose events all see their whole past."""

    def __init__(self, *, dim: int, layer: LayerConfig, num_layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(SoftmaxLayer(dim=dim, layer=layer) for _ in range(num_layers))
        linears = [module for module in self.modules() if isinstance(module, nn.Linear)]
        for linear in linears:
            nn.init.xavier_uniform_(linear.weight)
            nn.init.zeros_(linear.bias)

    def at_events(self, x_TD: Tensor, layout: SequenceLayout, times: EventTimes) -> Tensor:
        """The last layer's output at every event.  Attention here knows no `times`."""
        return self._outputs(x_TD, rectangle_of(layout), None)

    def at_candidates(self, x_TD: Tensor, layout: SequenceLayout) -> Tensor:
        """The last layer's output at every candidate, [C, D], which sees all events and context, no other candidate."""
        return take_rows(self.everywhere(x_TD, layout), candidate_rows(layout))

    def everywhere(self, x_TD: Tensor, layout: SequenceLayout, *, whole: SequenceLayout | None = None) -> Tensor:
        """The last layer's output at every token, [T, D]; `whole` as in `rectangle_of`."""
        rectangle = rectangle_of(layout, whole=whole)
        return self._outputs(x_TD, rectangle, ranker_mask(layout, rectangle))

    def _outputs(self, x_TD: Tensor, rectangle: Rectangle, mask_B1NN: Tensor | None) -> Tensor:
        for layer in self.layers:
            x_TD = layer(x_TD, rectangle, mask_B1NN)
        return x_TD.to(compute_dtype(x_TD))


def ranker_mask(layout: SequenceLayout, rectangle: Rectangle) -> Tensor:
    """Who sees whom, [B, 1, N, N] bool: all see the context, which sees all events; an event its past, a candidate all
    events and itself.  Padding sees itself: a row of nothing would be NaN."""
    index = torch.arange(rectangle.longest, device=rectangle.place_T.device)
    query_N1, key_1N, context = index[:, None], index[None, :], layout.num_context
    known_B11 = context + layout.history_lens[: rectangle.num_users, None, None]
    past_NN = (key_1N <= query_N1) | (query_N1 < context) | (key_1N < context)
    return (past_NN & (key_1N < known_B11) | (key_1N == query_N1))[:, None]
