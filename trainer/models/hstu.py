"""The HSTU layer, and the tower: layers with a mask each over one packed batch of sequences.

Shapes: T packed tokens, D model width, H heads, K query-key size, V value size.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from attention_kernels import SemiLocalMask, hstu_attention
from trainer.models.config import LayerConfig, StageConfig
from trainer.models.layout import SequenceLayout, keep_newest, take_rows
from trainer.models.precision import compute_dtype


class HstuLayer(nn.Module):
    """One layer: pre-norm, fused U, V, Q, K product, point-wise attention, gated norm, output product, residual.

    Two variants.  "paper" (ULTRA-HSTU, equations 1 to 5)::

        U, V, Q, K = silu(norm(x) W1 + b1);  y = x + (norm(attention(Q, K, V)) * U) W2

    "production" (Meta's open code)::

        U, V, Q, K = norm(x) W1 + b1;  U = silu(U);  y = x + [U, x, norm(attention(Q, K, V)) * U] W2
    """

    def __init__(
        self,
        *,
        dim: int,
        num_heads: int,
        qk_dim: int,
        value_dim: int,
        max_len: int,
        production: bool = False,
        group_norm: bool = False,
        norm_eps: float = 1e-6,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.num_heads, self.qk_dim, self.value_dim, self.max_len = num_heads, qk_dim, value_dim, max_len
        self.production, self.group_norm, self.norm_eps, self.dropout = production, group_norm, norm_eps, dropout
        gate_width = num_heads * value_dim
        output_inputs = 2 * gate_width + dim if production else gate_width
        self.input_norm_weight = nn.Parameter(torch.ones(dim))
        self.input_norm_bias = nn.Parameter(torch.zeros(dim))
        self.uvqk_weight = nn.Parameter(torch.empty(dim, 2 * num_heads * (value_dim + qk_dim)))
        self.uvqk_bias = nn.Parameter(torch.zeros(2 * num_heads * (value_dim + qk_dim)))
        self.output_norm_weight = nn.Parameter(torch.ones(gate_width))
        self.output_norm_bias = nn.Parameter(torch.zeros(gate_width))
        self.output_weight = nn.Parameter(torch.empty(output_inputs, dim))
        nn.init.xavier_uniform_(self.uvqk_weight)
        nn.init.xavier_uniform_(self.output_weight)

    def forward(self, x_TD: Tensor, layout: SequenceLayout, mask: SemiLocalMask) -> Tensor:
        """Returns the layer's output [T, D], residual included, in the type of `x_TD`."""
        T, dtype = x_TD.shape[0], compute_dtype(x_TD)
        widths = [self.num_heads * size for size in (self.value_dim, self.value_dim, self.qk_dim, self.qk_dim)]
        normed_TD = F.layer_norm(x_TD, (x_TD.shape[1],), self.input_norm_weight, self.input_norm_bias, self.norm_eps)
        uvqk = torch.addmm(self.uvqk_bias.to(dtype), normed_TD.to(dtype), self.uvqk_weight.to(dtype))
        u, v, q, k = torch.split(uvqk if self.production else F.silu(uvqk), widths, dim=1)
        u = F.silu(u) if self.production else u
        attention_THV = hstu_attention(
            q.view(T, self.num_heads, self.qk_dim),
            k.view(T, self.num_heads, self.qk_dim),
            v.view(T, self.num_heads, self.value_dim),
            layout.offsets,
            mask,
            num_targets=layout.num_candidates,
            max_len=self.max_len,
        )
        gated = self._norm_attention(attention_THV.reshape(T, widths[0])).to(dtype) * u
        if self.production:
            gated = torch.cat([u, x_TD.to(dtype), gated], dim=1)
        gated = F.dropout(gated, self.dropout, self.training)
        return torch.addmm(x_TD.to(dtype), gated, self.output_weight.to(dtype)).to(x_TD.dtype)

    def _norm_attention(self, attention: Tensor) -> Tensor:
        if self.group_norm:
            return F.group_norm(
                attention, self.num_heads, self.output_norm_weight, self.output_norm_bias, self.norm_eps
            )
        return F.layer_norm(
            attention, attention.shape[1:], self.output_norm_weight, self.output_norm_bias, self.norm_eps
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
    factor_T1 = (kept_B / (1 - probability)).to(x_TD.dtype)[layout.user_T][:, None]
    return torch.lerp(x_TD, output_TD, factor_T1)


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
        HstuLayer(
            dim=dim,
            num_heads=layer.num_heads,
            qk_dim=layer.qk_dim,
            value_dim=layer.value_dim,
            max_len=max_len,
            production=layer.variant == "production",
            group_norm=layer.norm == "group",
            norm_eps=layer.norm_eps,
            dropout=layer.dropout,
        )
        for stage in built
        for _ in range(stage.num_layers)
    ]
    return HstuTower(layers, built, stochastic_depth=layer.stochastic_depth)
