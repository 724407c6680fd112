"""The HSTU layer, and the tower: layers with a mask each over one packed batch of sequences.

Shapes: T packed tokens, C candidates of all users, R rows (T, or those of them that are read), D model width.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from attention_kernels import AttentionPlan, SemiLocalMask, make_plan, plan_of_newest, plan_of_targets
from trainer.models.config import StageConfig
from trainer.models.layer import Attention, LayerBatch, LayerParameters, LayerSpec, ProductWeights, cast_products
from trainer.models.layer_at_rows import layer_at_rows
from trainer.models.layer_config import LayerConfig
from trainer.models.layer_function import fused_layer
from trainer.models.layout import EventTimes, SequenceLayout, candidate_rows, keep_newest, take_rows
from trainer.models.precision import compute_dtype

ALL_AT_HAND = Attention()


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
        if spec.initial_std is None:
            nn.init.xavier_uniform_(self.uvqk_weight)
        else:
            nn.init.normal_(self.uvqk_weight, std=spec.initial_std)
        nn.init.xavier_uniform_(self.output_weight)

    def forward(
        self,
        x_TD: Tensor,
        plan: AttentionPlan,
        weights: ProductWeights | None = None,
        attention: Attention = ALL_AT_HAND,
    ) -> Tensor:
        """Returns the layer's output [T, D], residual included, in the type of computation.

        `weights` as in `layer_function.fused_layer`.
        """
        x_TD, batch = x_TD.to(compute_dtype(x_TD)), self._batch(plan, attention)
        out: Tensor = fused_layer(x_TD, self.parameter_set(), self.spec, batch, weights=weights)
        return out

    def at_rows(
        self, x_TD: Tensor, rows_R: Tensor, plan: AttentionPlan, weights: ProductWeights | None = None
    ) -> Tensor:
        """The rows of `forward`'s output that `plan` computes, [R, D], computed alone: `rows_R`, with -1 for padding.

        Equal but for rounding, and for which elements dropout zeroes.  Nothing here is in FP8: there is little to
        multiply.  A row of padding is a copy of the first one's, which nobody reads, so that it has no gradients.
        """
        spec, rows_R = replace(self.spec, fp8=False), rows_R.clamp(min=0)
        x_TD, batch = x_TD.to(compute_dtype(x_TD)), self._batch(plan, ALL_AT_HAND)
        out: Tensor = layer_at_rows(x_TD, rows_R, self.parameter_set(), spec, batch, weights=weights)
        return out

    def plan(self, layout: SequenceLayout, mask: SemiLocalMask, *, padded: bool = False) -> AttentionPlan:
        """The attention of layers like this one over sequences that lie so; `padded`: with rows behind them."""
        # Attention leaves out the padding of a padded layout, its last sequence.
        sequences = layout.num_users - layout.padded
        return make_plan(
            layout.offsets[: sequences + 1],
            mask,
            num_targets=layout.num_candidates[:sequences],
            scale=self.spec.scale,
            max_len=self.spec.max_len,
            padded=padded or layout.padded,
        )

    def _batch(self, plan: AttentionPlan, attention: Attention) -> LayerBatch:
        dropout = self.spec.dropout if self.training else 0.0
        # Drawn where it is read, from the generator that each step seeds: a recorded step draws anew.
        seed = torch.randint(2**31, (1,), device=self.uvqk_weight.device) if dropout > 0 else None
        if seed is not None and attention.part:
            seed += attention.part
        return LayerBatch(plan=plan, attention=attention, dropout=dropout, seed=seed)

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


class _LayerInput(NamedTuple):
    """What a layer takes.  Not to be made by `_replace`: PyTorch 2.11's torch.compile empties that at a graph break."""

    x_TD: Tensor
    layout: SequenceLayout
    plan: AttentionPlan
    weights: ProductWeights


class HstuTower(nn.Module):
    """Layers over one packed batch, stage by stage; before a stage all but the newest events may be dropped.

    The layer before it does not compute what is dropped: no later layer reads it.

    `stochastic_depth` is the probability that a user skips the last layer while training; it grows linearly from 0
    before the first layer.
    """

    def __init__(self, layers: Sequence[HstuLayer], stages: Sequence[Stage], *, stochastic_depth: float = 0.0) -> None:
        super().__init__()
        if not layers:
            raise ValueError("the tower has no layers, give it at least one")
        if len(layers) != sum(stage.num_layers for stage in stages):
            raise ValueError(f"the stages have {[stage.num_layers for stage in stages]} layers, got {len(layers)}")
        self.layers = nn.ModuleList(layers)
        self.stages = tuple(stages)
        self.stochastic_depth = stochastic_depth

    def forward(self, x_TD: Tensor, layout: SequenceLayout) -> tuple[Tensor, SequenceLayout]:
        """Returns the tokens of the last stage and their layout: all context and candidates, and the events left."""
        last = self._all_but_the_last(x_TD, layout)
        return self._whole(len(self.layers) - 1, last), last.layout

    def at_events(self, x_TD: Tensor, layout: SequenceLayout, times: EventTimes) -> Tensor:
        """The output at every event of a batch of nothing but events, none of which a stage drops.  Attention here
        knows no `times`."""
        outputs_TD, _ = self.forward(x_TD, layout)
        return outputs_TD

    def at_candidates(self, x_TD: Tensor, layout: SequenceLayout) -> Tensor:
        """What `forward` makes of the candidates, [C, D]: of the last layer, no other row is computed."""
        last = self._all_but_the_last(x_TD, layout)
        return self._at_rows(len(self.layers) - 1, last, plan_of_targets(last.plan), candidate_rows(last.layout))

    def _all_but_the_last(self, x_TD: Tensor, layout: SequenceLayout) -> _LayerInput:
        """The last layer's input."""
        weights = self._weights(compute_dtype(x_TD))
        keeps = [stage.keep_newest for stage in self.stages]
        if keeps[0] is not None:
            layout, rows_R = keep_newest(layout, keeps[0])
            x_TD = take_rows(x_TD, rows_R)
        index = 0
        for stage, keep in zip(self.stages, (*keeps[1:], None), strict=True):
            plan = self._layer(index).plan(layout, stage.mask)
            for _ in range(stage.num_layers - 1):
                x_TD = self._whole(index, _LayerInput(x_TD, layout, plan, weights[index]))
                index += 1
            last = _LayerInput(x_TD, layout, plan, weights[index])
            if index == len(self.layers) - 1:
                break
            if keep is None:
                x_TD = self._whole(index, last)
            else:
                layout, rows_R = keep_newest(layout, keep)
                x_TD = self._at_rows(index, last, plan_of_newest(plan, keep), rows_R)
            index += 1
        return last

    def _weights(self, dtype: torch.dtype) -> list[ProductWeights]:
        parameters = [self._layer(i).parameter_set() for i in range(len(self.layers))]
        weights: list[ProductWeights] = cast_products(parameters, dtype)
        return weights

    def _layer(self, index: int) -> HstuLayer:
        layer = self.layers[index]
        assert isinstance(layer, HstuLayer)
        return layer

    def _whole(self, index: int, given: _LayerInput) -> Tensor:
        """A layer's output, [T, D]."""
        output_TD = self._layer(index)(given.x_TD, given.plan, given.weights)
        return self._skip(given.x_TD, output_TD, given.layout.user_T, index + 1, given.layout)

    def _at_rows(self, index: int, given: _LayerInput, plan: AttentionPlan, rows_R: Tensor) -> Tensor:
        """The rows `rows_R` of a layer's output, which `plan` computes, [R, D]; those of padding, -1, are finite."""
        output_RD = self._layer(index).at_rows(given.x_TD, rows_R, plan, given.weights)
        if not (self.training and self.stochastic_depth > 0):
            return output_RD
        # The last token, which -1 takes, is padding too.
        user_R = given.layout.user_T[rows_R]
        return self._skip(take_rows(given.x_TD, rows_R), output_RD, user_R, index + 1, given.layout)

    def _skip(self, x_RD: Tensor, output_RD: Tensor, user_R: Tensor, depth: int, layout: SequenceLayout) -> Tensor:
        """The output of layer number `depth`, or while training with stochastic depth its input for some users."""
        probability = self.stochastic_depth * depth / len(self.layers)
        if not self.training or probability == 0:
            return output_RD
        return skip_users(x_RD, output_RD, user_R, layout.num_users, probability)


def skip_users(x_RD: Tensor, output_RD: Tensor, user_R: Tensor, num_users: int, probability: float) -> Tensor:
    """Let each user skip the layer with this probability, and scale the others' change so that its mean stays.

    `user_R` says whose each row is.
    """
    kept_B = torch.rand(num_users, device=x_RD.device) >= probability
    # In float32: rounded to bfloat16, the factor itself would shift the mean.
    factor_R1 = (kept_B / (1 - probability))[user_R][:, None]
    return torch.lerp(x_RD.float(), output_RD.float(), factor_R1).to(x_RD.dtype)


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
        initial_std=layer.initial_std,
        dropout=layer.dropout,
        recompute_normed=layer.recompute_normed,
        recompute_uvqk=layer.recompute_uvqk,
        recompute_gated=layer.recompute_gated,
        fp8=layer.fp8,
    )
