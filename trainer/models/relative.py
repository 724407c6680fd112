"""HSTU layers with relative biases: attention that knows how far a key lies back, in places and in time.

Shapes as in `layer.py`; M position biases, G time buckets.
"""

from dataclasses import replace

from torch import Tensor, nn

from attention_kernels import AttentionPlan, SemiLocalMask, make_plan
from attention_kernels.attention.plan import PairTimes
from attention_kernels.relative_bias import RelativeBiases, bucket_starts
from trainer.models.hstu import HstuLayer, build_layer_spec
from trainer.models.layer import LayerParameters, LayerSpec, cast_products
from trainer.models.layer_config import LayerConfig
from trainer.models.layout import EventTimes, SequenceLayout, longest_of
from trainer.models.precision import compute_dtype
from trainer.models.rows import learned_vectors


class RelativeLayer(HstuLayer):
    """`HstuLayer` with relative biases, a table of each a head."""

    def __init__(self, *, dim: int, spec: LayerSpec, num_time_buckets: int) -> None:
        super().__init__(dim=dim, spec=spec)
        self.position_bias = learned_vectors(spec.num_heads, spec.max_len)
        self.time_bias = learned_vectors(spec.num_heads, num_time_buckets)

    def parameter_set(self) -> LayerParameters:
        """The layer's parameters under their names."""
        return replace(super().parameter_set(), biases=RelativeBiases(self.position_bias, self.time_bias))


class RelativeTower(nn.Module):
    """Layers over one packed batch of events that all see their whole past."""

    def __init__(self, *, dim: int, layer: LayerConfig, num_layers: int, max_len: int) -> None:
        super().__init__()
        assert layer.relative_bias is not None
        num_time_buckets = layer.relative_bias.num_time_buckets
        self.spec = build_layer_spec(layer, max_len=max_len)
        self.layers = nn.ModuleList(
            RelativeLayer(dim=dim, spec=self.spec, num_time_buckets=num_time_buckets) for _ in range(num_layers)
        )
        self.register_buffer("bucket_starts", bucket_starts(num_time_buckets), persistent=False)

    def at_events(self, x_TD: Tensor, layout: SequenceLayout, times: EventTimes) -> Tensor:
        """The last layer's output at every event."""
        layers = [layer for layer in self.layers if isinstance(layer, RelativeLayer)]
        plan = self._plan(layout, times)
        weights = cast_products([layer.parameter_set() for layer in layers], compute_dtype(x_TD))
        for layer, of_layer in zip(layers, weights, strict=True):
            x_TD = layer(x_TD, plan, of_layer)
        return x_TD

    def _plan(self, layout: SequenceLayout, times: EventTimes) -> AttentionPlan:
        assert isinstance(self.bucket_starts, Tensor)
        # Attention leaves out the padding of a padded layout, its last sequence.
        sequences = layout.num_users - layout.padded
        return make_plan(
            layout.offsets[: sequences + 1],
            SemiLocalMask(),
            scale=self.spec.scale,
            max_len=self.spec.max_len,
            padded=layout.padded,
            times=PairTimes(
                happened=times.happened,
                asked=times.asked,
                bucket_starts=self.bucket_starts,
                longest=longest_of(layout),
            ),
        )
