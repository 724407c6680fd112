"""What one HSTU layer computes: its parameters and settings, and the plain definition.

`plain_layer` is the readable form that autograd differentiates; `layer_function.fused_layer` computes the same with its
own backward.

Shapes: T packed tokens, D model width, H heads, K query-key size, V value size, W = H * V gate width.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from attention_kernels import AttentionPlan, attention_forward, hstu_attention, projection_backward
from attention_kernels.layer import reference
from attention_kernels.relative_bias import RelativeBiases, relative_attention


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerSpec:
    """Everything that is fixed when a layer is built."""

    num_heads: int
    qk_dim: int
    value_dim: int
    max_len: int
    """Attention divides by it."""
    scale: float | None = None
    """Factor of <q, k> inside SiLU; None for 1 / sqrt(qk_dim)."""
    production: bool = False
    """Meta's variant: SiLU on U alone, concatenated output product."""
    group_norm: bool = False
    """Norm of the attention output a head instead of over all heads."""
    norm_eps: float = 1e-6
    initial_std: float | None = None
    """Standard deviation of the fused product's initial values; None for Xavier's."""
    dropout: float = 0.0
    recompute_normed: bool = True
    recompute_uvqk: bool = True
    recompute_gated: bool = True
    fp8: bool = False
    """Forward products in FP8."""

    @property
    def gate_width(self) -> int:
        """W, the width of U and of V."""
        return self.num_heads * self.value_dim

    @property
    def uvqk_width(self) -> int:
        """Columns of the fused product."""
        return 2 * self.num_heads * (self.value_dim + self.qk_dim)

    @property
    def num_groups(self) -> int:
        """Groups of the attention output's norm."""
        return self.num_heads if self.group_norm else 1

    def output_inputs(self, dim: int) -> int:
        """Inner width of the output product."""
        return 2 * self.gate_width + dim if self.production else self.gate_width

    def split_heads(self, vqk: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Views [T, H, size] of q, k and v in the columns behind U."""
        T, key_width = vqk.shape[0], self.num_heads * self.qk_dim
        v, q, k = torch.split(vqk, [self.gate_width, key_width, key_width], dim=1)
        key_shape = (T, self.num_heads, self.qk_dim)
        return q.view(key_shape), k.view(key_shape), v.view(T, self.num_heads, self.value_dim)


class Attention:
    """How a layer's rows attend to each other: here, all of them are at hand.  Autograd does not look inside."""

    part = 0
    """Which part of the batch's rows a layer holds: dropout draws for each part anew."""

    def forward(
        self,
        q_THK: Tensor,
        k_THK: Tensor,
        v_THV: Tensor,
        plan: AttentionPlan,
        biases: RelativeBiases | None = None,
    ) -> Tensor:
        """[T, H, V] the attention output."""
        out: Tensor = attention_forward(q_THK, k_THK, v_THV, plan, biases)
        return out

    def backward(
        self,
        dout_THV: Tensor,
        qkv: tuple[Tensor, Tensor, Tensor],
        plan: AttentionPlan,
        biases: RelativeBiases | None = None,
        *,
        scaled: bool,
        out: tuple[Tensor, Tensor, Tensor],
    ) -> tuple[Tensor, ...]:
        """Gradients, as of `attention_kernels.projection_backward`."""
        sums: tuple[Tensor, ...] = projection_backward(dout_THV, *qkv, plan, biases, scaled=scaled, out=out)
        return sums


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerBatch:
    """What a layer needs to know of the batch."""

    plan: AttentionPlan
    attention: Attention = field(default_factory=Attention)
    dropout: float = 0.0
    """The layer's dropout while training, 0 otherwise."""
    seed: Tensor | None = None
    """[1] int64 on the device: decides which elements dropout zeroes; None without dropout."""


class ProductWeights(NamedTuple):
    """What a layer's products read, in the type of computation.  Not differentiable: gradients go to the parameters."""

    uvqk_weight: Tensor
    uvqk_bias: Tensor
    output_weight: Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerParameters:
    """A layer's tensors."""

    input_norm_weight: Tensor
    input_norm_bias: Tensor
    uvqk_weight: Tensor
    """[D, uvqk_width], columns in the order U, V, Q, K."""
    uvqk_bias: Tensor
    output_norm_weight: Tensor
    output_norm_bias: Tensor
    output_weight: Tensor
    """[output_inputs, D]."""
    biases: RelativeBiases | None = None
    """What attention adds to scores, if anything."""

    @property
    def products(self) -> tuple[Tensor, Tensor, Tensor]:
        """The parameters that products read."""
        return self.uvqk_weight, self.uvqk_bias, self.output_weight


# Opaque to torch.compile, which would make one small kernel a tensor of it.
@torch.compiler.disable
@torch.no_grad()
def cast_products(layers: Sequence[LayerParameters], dtype: torch.dtype) -> list[ProductWeights]:
    """The weights of these layers' products in `dtype`, by one launch for all of them."""
    sources = [source for layer in layers for source in layer.products]
    if all(source.dtype == dtype for source in sources):
        cast = [source.detach() for source in sources]
    else:
        # Kernels want rows that start at multiples of 16 bytes.
        sizes = [-(-source.numel() // 64) * 64 for source in sources]
        parts = torch.split(torch.empty(sum(sizes), dtype=dtype, device=sources[0].device), sizes)
        cast = [part[: x.numel()].view(x.shape) for part, x in zip(parts, sources, strict=True)]
        torch._foreach_copy_(cast, sources)
    return [ProductWeights(*cast[i : i + 3]) for i in range(0, len(cast), 3)]


def plain_layer(x_TD: Tensor, parameters: LayerParameters, spec: LayerSpec, batch: LayerBatch) -> Tensor:
    """The layer's output, residual included, in x's type."""
    p, dtype = parameters, x_TD.dtype
    normed_TD = reference.layer_norm(x_TD, p.input_norm_weight, p.input_norm_bias, spec.norm_eps)
    uvqk = torch.addmm(p.uvqk_bias.to(dtype), normed_TD, p.uvqk_weight.to(dtype))
    u, vqk = uvqk[:, : spec.gate_width], uvqk[:, spec.gate_width :]
    q_THK, k_THK, v_THV = spec.split_heads(vqk if spec.production else reference.silu(vqk))
    if p.biases is not None:
        attention_THV = relative_attention(q_THK, k_THK, v_THV, batch.plan, p.biases)
    else:
        attention_THV = hstu_attention(
            q_THK,
            k_THK,
            v_THV,
            batch.plan.offsets,
            batch.plan.mask,
            num_targets=batch.plan.num_targets,
            scale=batch.plan.scale,
            max_len=batch.plan.max_len,
        )
    gated = reference.gated_norm(
        attention_THV.reshape(x_TD.shape[0], spec.gate_width),
        u,
        p.output_norm_weight,
        p.output_norm_bias,
        spec.norm_eps,
        num_groups=spec.num_groups,
        x_TD=x_TD if spec.production else None,
        dropout=batch.dropout,
        seed=batch.seed,
    )
    return torch.addmm(x_TD, gated, p.output_weight.to(dtype))
