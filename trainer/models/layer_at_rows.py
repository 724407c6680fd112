"""An HSTU layer at some of its rows alone, where nothing reads the others: the last layer of a ranker, whose head reads
candidates, and a layer before a stage that keeps the newest events.

U, Q, attention, gate and output product are computed for these rows, V and K for all tokens, as a row sees tokens that
are none.  Of the two products of a layer this leaves half of the first and next to nothing of the second, and attention
costs as many rows as there are.  Like `layer_function.py` it is one autograd function that keeps three tensors: the
input of all tokens, and of the rows U before SiLU and the attention output.

Shapes as in `layer.py`; R rows of all users.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from attention_kernels import attention_forward, projection_backward
from attention_kernels.attention.checks import check_first_order
from attention_kernels.layer import linear, operations
from trainer.models.layer import LayerBatch, LayerParameters, LayerSpec, ProductWeights, cast_products
from trainer.models.layer_function import gate_options, output_rows, weight_gradient


class _Columns(NamedTuple):
    """The fused product's weight and bias, cut into what rows need and what all tokens do."""

    u_weight: Tensor
    """[D, W]."""
    u_bias: Tensor
    q_weight: Tensor
    """[D, H * K]."""
    q_bias: Tensor
    vk_weight: Tensor
    """[D, W + H * K]."""
    vk_bias: Tensor


class _Heads(NamedTuple):
    """What attention reads, by heads."""

    q: Tensor
    """[R, H, K]."""
    k: Tensor
    """[T, H, K]."""
    v: Tensor
    """[T, H, V]."""


class _LayerAtRows(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_TD: Tensor,
        rows_R: Tensor,
        spec: LayerSpec,
        batch: LayerBatch,
        weights: ProductWeights,
        *parameters: Tensor,
    ) -> Tensor:
        backend = operations.layer_backend(x_TD)
        norm_weight, norm_bias, _, bias = parameters[:4]
        normed_TD, mean, rstd = operations.layer_norm_forward(
            x_TD, norm_weight, norm_bias, spec.norm_eps, backend=backend
        )
        columns = _cut(weights, bias, spec)
        normed_RD, x_RD = normed_TD[rows_R], x_TD[rows_R]
        u = linear.linear(normed_RD, columns.u_weight, columns.u_bias, dtype=x_TD.dtype, backend=backend)
        heads = _heads(normed_TD, normed_RD, columns, (None, None), spec, backend)
        attention = attention_forward(*heads, batch.plan).flatten(1)
        out, _ = output_rows(
            attention, u, x_RD, parameters=parameters[4:], weights=weights, spec=spec, batch=batch, backend=backend
        )
        ctx.spec, ctx.batch, ctx.backend, ctx.weights, ctx.columns = spec, batch, backend, weights, columns
        kept = (None, None, None) if spec.recompute_normed else (normed_TD, mean, rstd)
        ctx.save_for_backward(x_TD, rows_R, u, attention, *kept, *parameters)
        return out

    @staticmethod
    def backward(ctx: Any, dout_RD: Tensor) -> tuple[Tensor | None, ...]:
        check_first_order("an HSTU layer")
        x_TD, rows_R, u, attention, normed_TD, mean, rstd, *parameters = ctx.saved_tensors
        norm_weight, norm_bias, _, _, gate_weight, gate_bias, _ = parameters
        spec: LayerSpec = ctx.spec
        batch: LayerBatch = ctx.batch
        columns: _Columns = ctx.columns
        backend, dtype, W = ctx.backend, x_TD.dtype, spec.gate_width
        dout_RD = dout_RD.contiguous()
        width = W + spec.num_heads * spec.qk_dim
        duq = torch.empty(rows_R.shape[0], width, dtype=dtype, device=x_TD.device)
        dvk = torch.empty(x_TD.shape[0], width, dtype=dtype, device=x_TD.device)

        dattention, residual_RD, gated, dgate_weight, dgate_bias, du_bias = operations.gated_norm_backward(
            dout_RD @ ctx.weights.output_weight.t(),
            attention,
            u,
            gate_weight,
            gate_bias,
            spec.norm_eps,
            **gate_options(spec, batch, x_TD[rows_R] if spec.production else x_TD),
            residual_TD=dout_RD,
            du=duq[:, :W],
            backend=backend,
        )
        doutput_weight = weight_gradient(gated, dout_RD)
        if normed_TD is None:
            normed_TD, mean, rstd = operations.layer_norm_forward(
                x_TD, norm_weight, norm_bias, spec.norm_eps, backend=backend
            )
        normed_RD = normed_TD[rows_R]
        # The slopes of SiLU lie where attention's backward will multiply by them.
        heads = _heads(normed_TD, normed_RD, columns, (duq[:, W:], dvk), spec, backend)
        q_sum, k_sum, v_sum = projection_backward(
            dattention.view(-1, spec.num_heads, spec.value_dim),
            *heads,
            batch.plan,
            scaled=not spec.production,
            out=_split(duq[:, W:], dvk, spec),
        )
        duvqk_bias = torch.cat([du_bias, v_sum.flatten(), q_sum.flatten(), k_sum.flatten()])
        duvqk_weight, dnormed_TD = _products_backward((normed_TD, normed_RD), (duq, dvk), rows_R, columns)
        residual_TD = torch.zeros_like(x_TD).index_add_(0, rows_R, residual_RD)
        dx_TD, dnorm_weight, dnorm_bias = operations.layer_norm_backward(
            dnormed_TD,
            x_TD,
            norm_weight,
            norm_bias,
            mean,
            rstd,
            spec.norm_eps,
            residual_TD=residual_TD,
            backend=backend,
        )
        gradients = (dnorm_weight, dnorm_bias, duvqk_weight, duvqk_bias, dgate_weight, dgate_bias, doutput_weight)
        typed = (gradient.to(parameter.dtype) for gradient, parameter in zip(gradients, parameters, strict=True))
        return (dx_TD, None, None, None, None, *typed)


def _cut(weights: ProductWeights, bias: Tensor, spec: LayerSpec) -> _Columns:
    """Columns in the order U, V, Q, K; `bias` is the parameter, which products with SiLU read unrounded."""
    widths = [spec.gate_width, spec.gate_width, spec.num_heads * spec.qk_dim, spec.num_heads * spec.qk_dim]
    u, v, q, k = torch.split(weights.uvqk_weight, widths, dim=1)
    _, v_bias, q_bias, k_bias = torch.split(bias, widths)
    return _Columns(
        u, weights.uvqk_bias[: spec.gate_width], q, q_bias, torch.cat([v, k], dim=1), torch.cat([v_bias, k_bias])
    )


def _heads(
    normed_TD: Tensor,
    normed_RD: Tensor,
    columns: _Columns,
    slopes: tuple[Tensor | None, Tensor | None],
    spec: LayerSpec,
    backend: operations.LayerBackend,
) -> _Heads:
    """q, k and v; the slopes of their SiLU, where the layer has one, into `slopes` (of q, of v and k) if given."""
    dtype = normed_TD.dtype
    products = (
        (normed_RD, columns.q_weight, columns.q_bias, slopes[0]),
        (normed_TD, columns.vk_weight, columns.vk_bias, slopes[1]),
    )
    if spec.production:
        q, vk = (linear.linear(rows, weight, b, dtype=dtype, backend=backend) for rows, weight, b, _ in products)
    else:
        q, vk = (
            linear.linear_silu(rows, weight, b, slopes=slope, dtype=dtype, backend=backend)
            for rows, weight, b, slope in products
        )
    return _split(q, vk, spec)


def _products_backward(
    normed: tuple[Tensor, Tensor], gradients: tuple[Tensor, Tensor], rows_R: Tensor, columns: _Columns
) -> tuple[Tensor, Tensor]:
    """Gradients of the fused product's weight and of its input [T, D], from those of U and Q [R] and of V and K [T].

    `normed` is the product's input, of all tokens and of the rows.
    """
    (normed_TD, normed_RD), (duq, dvk), W = normed, gradients, columns.u_weight.shape[1]
    duq_weight, dvk_weight = weight_gradient(normed_RD, duq), weight_gradient(normed_TD, dvk)
    duvqk_weight = torch.cat([duq_weight[:, :W], dvk_weight[:, :W], duq_weight[:, W:], dvk_weight[:, W:]], dim=1)
    dnormed_TD = dvk @ columns.vk_weight.t()
    dnormed_RD = torch.addmm(duq[:, :W] @ columns.u_weight.t(), duq[:, W:], columns.q_weight.t())
    # But for padding, whose gradients are 0, rows are all different: each is added to once.
    return duvqk_weight, dnormed_TD.index_add_(0, rows_R, dnormed_RD)


def _split(q: Tensor, vk: Tensor, spec: LayerSpec) -> _Heads:
    """Views [rows, H, size] of columns."""
    v, k = torch.split(vk, [spec.gate_width, spec.num_heads * spec.qk_dim], dim=1)
    key_size = (spec.num_heads, spec.qk_dim)
    return _Heads(
        q.view(q.shape[0], *key_size), k.view(k.shape[0], *key_size), v.view(v.shape[0], spec.num_heads, spec.value_dim)
    )


# Opaque to torch.compile for the reasons given at `layer_function.fused_layer`.
@torch.compiler.disable
def layer_at_rows(
    x_TD: Tensor,
    rows_R: Tensor,
    parameters: LayerParameters,
    spec: LayerSpec,
    batch: LayerBatch,
    *,
    weights: ProductWeights | None = None,
) -> Tensor:
    """`layer.plain_layer` at `rows_R`, the rows that the batch's plan computes: [R, D].

    Behind those of the plan's last sequence may stand padding, any rows.  `weights` as in `layer_function.fused_layer`.
    """
    p = parameters
    out: Tensor = _LayerAtRows.apply(  # type: ignore[no-untyped-call]  # torch.autograd has no types
        x_TD,
        rows_R,
        spec,
        batch,
        weights or cast_products([p], x_TD.dtype)[0],
        p.input_norm_weight,
        p.input_norm_bias,
        p.uvqk_weight,
        p.uvqk_bias,
        p.output_norm_weight,
        p.output_norm_bias,
        p.output_weight,
    )
    return out
