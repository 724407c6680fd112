"""The HSTU layer, and the tower: layers with a mask each over one packed batch of sequences.

Shapes: T packed tokens, D model width.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from attention_kernels import SemiLocalMask
from trainer.models.config import LayerConfig, StageConfig
from trainer.models.layer import LayerBatch, LayerParameters, LayerSpec
from trainer.models.layer_function import fused_layer
from trainer.models.layout import SequenceLayout, keep_newest, take_rows
from trainer.models.precision import compute_dtype


class HstuLayer(nn.Module):
    """One layer: pre-norm, fused U, V, Q, K product, point-wise attention, gated norm, output product, residual.

    Two variants.  "paper" (ULTRA-HSTU, equations 1 to 5)::

        U, V, Q, K = silu(norm(x) W1 + b1);  y = x + (norm(attention(Q, K, V)) * U) W2

    "production" (Meta's open code)::

        U, V, Q, K = norm(x) W1 + b1;  U = silu(U);  y = x + [U, x, norm(attention(Q, K, V)) * U] W2
    """

    def __init__(self, *, dim: int, spec: LayerSpec) -> None:
        super().__init__()
        if spec.fp8 and (dim % 16 or spec.gate_width % 16 or spec.uvqk_width % 16):
            raise ValueError(
                f"layer.fp8=true needs widths that are multiples of 16: dim is {dim}, heads x value_dim "
                f"{spec.gate_width}, heads x (qk_dim + value_dim) x 2 {spec.uvqk_width}"
            )
        self.spec = spec
        self.input_norm_weight = nn.Parameter(torch.ones(dim))
        self.input_norm_bias = nn.Parameter(torch.zeros(dim))
        self.uvqk_weight = nn.Parameter(torch.empty(dim, spec.uvqk_width))
        self.uvqk_bias = nn.Parameter(torch.zeros(spec.uvqk_width))
        self.output_norm_weight = nn.Parameter(torch.ones(spec.gate_width))
        self.output_norm_bias = nn.Parameter(torch.zeros(spec.gate_width))
        self.output_weight = nn.Parameter(torch.empty(spec.output_inputs(dim), dim))
        nn.init.xavier_uniform_(self.uvqk_weight)
        nn.init.xavier_uniform_(self.output_weight)

    def forward(self, x_TD: Tensor, layout: SequenceLayout, mask: SemiLocalMask) -> Tensor:
        """Returns the layer's output [T, D], residual included, in the type of computation."""
        dropout = self.spec.dropout if self.training else 0.0
        batch = LayerBatch(
            offsets=layout.offsets,
            num_candidates=layout.num_candidates,
            mask=mask,
            dropout=dropout,
            # Drawn on the host, from the generator that each step seeds: no wait for the device.
            seed=int(torch.randint(2**31, ())) if dropout > 0 else 0,
        )
        out: Tensor = fused_layer(x_TD.to(compute_dtype(x_TD)), self.parameter_set(), self.spec, batch)
        return out

    def parameter_set(self) -> LayerParameters:
        """The layer's parameters under their names."""
        return LayerParameters(
            input_norm_weight=self.input_norm_weight,
            input_norm_bias=self.input_norm_bias,
            uvqk_weight=self.uvqk_weight,
            uvqk_bias=self.uvqk_bias,
            output_norm_weight=self.output_norm_weight,
            output_norm_bias=self.output_norm_bias,
            output_weight=self.output_weight,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Stage:
    """What the layers of a stage share."""

    num_layers: int
    mask: SemiLocalMask
    keep_newest: int | None = None


class HstuTower(nn.Module):
    """Layers over one packed batch, stage by stage; a stage may first drop all but the newest events.

    `stochastic_depth` is the probability that a user skips the last layer while training; it grows linearly from 0
    before the first layer.
    """

    def __init__(self, layers: Sequence[HstuLayer], stages: Sequence[Stage], *, stochastic_depth: float = 0.0) -> None:
        super().__init__()
        if len(layers) != sum(stage.num_layers for stage in stages):
            raise ValueError(f"the stages have {[stage.num_layers for stage in stages]} layers, got {len(layers)}")
        self.layers = nn.ModuleList(layers)
        self.stages = tuple(stages)
        self.stochastic_depth = stochastic_depth

    def forward(self, x_TD: Tensor, layout: SequenceLayout) -> tuple[Tensor, SequenceLayout]:
        """Returns the tokens of the last stage and their layout: all context and candidates, and the events left."""
        depth = 0
        for stage in self.stages:
            if stage.keep_newest is not None:
                layout, rows = keep_newest(layout, stage.keep_newest)
                x_TD = take_rows(x_TD, rows)
            for _ in range(stage.num_layers):
                layer = self.layers[depth]
                depth += 1
                skip = self.stochastic_depth * depth / len(self.layers)
                output_TD = layer(x_TD, layout, stage.mask)
                x_TD = _skip_users(x_TD, output_TD, layout, skip) if self.training and skip > 0 else output_TD
        return x_TD, layout


def _skip_users(x_TD: Tensor, output_TD: Tensor, layout: SequenceLayout, probability: float) -> Tensor:
    """Let each user skip the layer with this probability, and scale the others' change so that its mean stays."""
    kept_B = torch.rand(layout.num_users, device=x_TD.device) >= probability
    # In float32: rounded to bfloat16, the factor itself would shift the mean.
    factor_T1 = (kept_B / (1 - probability))[layout.user_T][:, None]
    return torch.lerp(x_TD.float(), output_TD.float(), factor_T1).to(x_TD.dtype)


def build_tower(
    *, dim: int, layer: LayerConfig, stages: Sequence[StageConfig], num_context: int, max_len: int
) -> HstuTower:
    """The tower that these configs describe."""
    built = [
        Stage(
            num_layers=stage.num_layers,
            mask=SemiLocalMask(
                local=stage.local,
                global_rows=stage.global_rows,
                global_columns=stage.global_columns,
                num_context=num_context,
            ),
            keep_newest=stage.keep_newest,
        )
        for stage in stages
    ]
    layers = [
        HstuLayer(dim=dim, spec=build_layer_spec(layer, max_len=max_len))
        for stage in built
        for _ in range(stage.num_layers)
    ]
    return HstuTower(layers, built, stochastic_depth=layer.stochastic_depth)


def build_layer_spec(layer: LayerConfig, *, max_len: int) -> LayerSpec:
    """The layer that the config describes."""
    return LayerSpec(
        num_heads=layer.num_heads,
        qk_dim=layer.qk_dim,
        value_dim=layer.value_dim,
        max_len=max_len,
        scale=layer.scale,
        production=layer.variant == "production",
        group_norm=layer.norm == "group",
        norm_eps=layer.norm_eps,
        dropout=layer.dropout,
        recompute_normed=layer.recompute_normed,
        recompute_uvqk=layer.recompute_uvqk,
        recompute_gated=layer.recompute_gated,
        fp8=layer.fp8,
    )
