"""Settings of a tower's layers.  Standard library only."""

from dataclasses import dataclass, fields
from typing import Literal

from trainer.models.relative_config import RelativeBiasConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerConfig:
    """One HSTU layer, the same for all layers of a tower."""

    variant: Literal["paper", "production", "softmax", "last_event", "target_attention"] = "paper"
    """paper: SiLU on U, V, Q and K, and only the gated norm enters the output product.  production (Meta's open code):
    SiLU on U alone, and U, the layer's input and the gated norm are concatenated before the output product.

    What HSTU is compared with, in modules of these names, on sequences of hundreds: softmax, a Transformer's layer; for
    rankers alone last_event, the same without candidates in it, and target_attention, candidates on events."""
    num_heads: int = 4
    """Attention heads."""
    qk_dim: int = 128
    """Width of a query and of a key, a head."""
    value_dim: int = 128
    """Width of a value and of the gate, a head."""
    scale: float | None = None
    """Factor of a query's product with a key, inside SiLU; null for 1 / sqrt(qk_dim)."""
    norm: Literal["layer", "group"] = "layer"
    """Norm of the attention output: over all heads together, or over each head by itself."""
    norm_eps: float = 1e-6
    """Added to the variance in both norms."""
    initial_std: float | None = None
    """Standard deviation of the initial values of the product that makes U, V, Q and K; null for Xavier's."""
    dropout: float = 0.0
    """Probability of zeroing an input of the output product while training."""
    stochastic_depth: float = 0.0
    """Probability that a user skips the last layer while training; earlier layers are skipped proportionally less."""
    recompute_normed: bool = True
    """Rebuild the normed input in the backward pass from the layer's input instead of keeping it."""
    recompute_uvqk: bool = True
    """Rebuild V, Q and K (and the slopes of their SiLU) in the backward pass by one product instead of keeping them.
    What is kept is used up by the backward: a second one through the same forward is refused."""
    recompute_gated: bool = True
    """Rebuild norm(attention) * silu(U) in the backward pass instead of keeping it."""
    relative_bias: RelativeBiasConfig | None = None
    """For retrievers on sequences of hundreds: a byte is kept for every pair of a query and a key, and while a layer is
    differentiated the scores' gradients (`attention_kernels.relative_bias`)."""
    fp8: bool = False
    """Forward products in FP8 (E4M3, one scale a row), but for layers at the rows that are read; the backward
    stays in the input's type.  Widths must be multiples of 16.  Made for GPUs with FP8 tensor cores (Hopper and later),
    emulated on a CPU.  The gated norm quantises as it writes only for variant=paper with norm=layer and without
    dropout; else in a pass of its own.  What the backward rebuilds is not quantised."""

    def __post_init__(self) -> None:
        for name in ("num_heads", "qk_dim", "value_dim"):
            if getattr(self, name) < 1:
                raise ValueError(f"layer.{name} must be at least 1, got {getattr(self, name)}")
        for name in ("dropout", "stochastic_depth"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"layer.{name} must lie in [0, 1), got {getattr(self, name)}")
        if not self.is_hstu:
            self._check_other()
        if self.fp8 and not (self.recompute_normed and self.recompute_gated):
            raise ValueError(
                "layer.fp8=true keeps no 16-bit inputs of its products: layer.recompute_normed and "
                "layer.recompute_gated must be true"
            )
        if self.relative_bias is not None and (self.variant, self.norm, self.fp8) != ("paper", "layer", False):
            raise ValueError(
                f"layer.relative_bias has the paper's layer only, got variant={self.variant}, norm={self.norm}, "
                f"fp8={str(self.fp8).lower()}: take variant=paper, norm=layer, fp8=false"
            )
        if self.relative_bias is not None and self.stochastic_depth:
            raise ValueError("layer.stochastic_depth has no effect with layer.relative_bias: set it to 0")
        for name in ("scale", "norm_eps", "initial_std"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ValueError(f"layer.{name} must be above 0, got {value}")

    @property
    def is_hstu(self) -> bool:
        """Whether it is HSTU's layer, of either variant."""
        return self.variant in ("paper", "production")

    @property
    def sees_candidates(self) -> bool:
        """Whether candidates are tokens of its sequences."""
        return self.variant != "last_event"

    @property
    def computes_rows_alone(self) -> bool:
        """Whether the last layer computes candidates alone, where nothing else is read."""
        return self.variant not in ("softmax", "last_event")

    @property
    def gate_width(self) -> int:
        """Columns of the values of all heads, and of HSTU's gate."""
        return self.num_heads * self.value_dim

    @property
    def key_width(self) -> int:
        """Columns of the queries, or of the keys, of all heads."""
        return self.num_heads * self.qk_dim

    @property
    def uvqk_width(self) -> int:
        """Columns of the product that makes U, V, Q and K of all heads."""
        return 2 * (self.gate_width + self.key_width)

    def output_inputs(self, dim: int) -> int:
        """Inner width of what follows the attention of an HSTU layer, its output product, on tokens of width `dim`."""
        return 2 * self.gate_width + dim if self.variant == "production" else self.gate_width

    def _check_other(self) -> None:
        """What only HSTU's layers have would have no effect."""
        softmax = self.variant != "target_attention"
        read = ("variant", "num_heads", "qk_dim", "dropout", *(("value_dim", "scale", "norm_eps") if softmax else ()))
        for each in fields(self):
            if each.name not in read and getattr(self, each.name) != each.default:
                raise ValueError(f"layer.{each.name} has no effect with layer.variant={self.variant}: leave it out")
