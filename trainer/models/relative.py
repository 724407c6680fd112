"""HSTU layers whose attention knows how far a key lies back, in places and in time: for sequences of hundreds.

Shapes as in `layer.py`; M position biases, G time buckets.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from attention_kernels.relative_bias import RelativePlaces, make_places, relative_attention
from trainer.models.config import LayerConfig
from trainer.models.hstu import HstuLayer, build_layer_spec
from trainer.models.layer import LayerSpec
from trainer.models.layout import EventTimes, SequenceLayout, rectangle_of
from trainer.models.precision import compute_dtype
from trainer.models.rows import learned_vectors


class RelativeLayer(HstuLayer):
    """The paper's layer (`HstuLayer`) with relative biases, a table of each a head; differentiated by autograd."""

    def __init__(self, *, dim: int, spec: LayerSpec, num_time_buckets: int) -> None:
        super().__init__(dim=dim, spec=spec)
        self.position_bias = learned_vectors(spec.num_heads, spec.max_len)
        self.time_bias = learned_vectors(spec.num_heads, num_time_buckets)

    def at_places(self, x_TD: Tensor, places: RelativePlaces) -> Tensor:
        """The layer's output [T, D], residual included."""
        spec, dtype = self.spec, compute_dtype(x_TD)
        normed_TD = F.layer_norm(x_TD, x_TD.shape[1:], self.input_norm_weight, self.input_norm_bias, spec.norm_eps)
        uvqk = F.silu(torch.addmm(self.uvqk_bias.to(dtype), normed_TD.to(dtype), self.uvqk_weight.to(dtype)))
        u, vqk = uvqk[:, : spec.gate_width], uvqk[:, spec.gate_width :]
        attention_THV = relative_attention(
            *spec.split_heads(vqk),
            places,
            position_HM=self.position_bias,
            time_HG=self.time_bias,
            scale=spec.qk_dim**-0.5 if spec.scale is None else spec.scale,
            max_len=spec.max_len,
        )
        normed = F.layer_norm(
            attention_THV.flatten(1).float(),
            (spec.gate_width,),
            self.output_norm_weight,
            self.output_norm_bias,
            spec.norm_eps,
        )
        gated = F.dropout(normed * u, spec.dropout, self.training)
        return x_TD + gated.to(dtype) @ self.output_weight.to(dtype)


class RelativeTower(nn.Module):
    """Layers over one packed batch of events that all see their whole past."""

    def __init__(self, *, dim: int, layer: LayerConfig, num_layers: int, max_len: int) -> None:
        super().__init__()
        assert layer.relative_bias is not None
        self.num_time_buckets = layer.relative_bias.num_time_buckets
        spec = build_layer_spec(layer, max_len=max_len)
        self.layers = nn.ModuleList(
            RelativeLayer(dim=dim, spec=spec, num_time_buckets=self.num_time_buckets) for _ in range(num_layers)
        )

    def at_events(self, x_TD: Tensor, layout: SequenceLayout, times: EventTimes) -> Tensor:
        """The last layer's output at every event."""
        places = make_places(rectangle_of(layout), times.happened, times.asked, num_buckets=self.num_time_buckets)
        for layer in self.layers:
            assert isinstance(layer, RelativeLayer)
            x_TD = layer.at_places(x_TD, places)
        return x_TD
