"""One HSTU layer as one autograd function, which decides itself what it keeps for the backward.

By default it keeps three tensors of a token's width: the layer's input, U before SiLU and the attention output.  The
backward rebuilds the normed input, V, Q and K by one product, and norm(attention) * silu(U) inside the kernel that
differentiates it, which also takes SiLU's slope at U.  Each of these can be kept instead; the gradients are the same
numbers either way, because what is rebuilt is rebuilt by the same operations from the same inputs.  Not in FP8, where
V, Q and K are rebuilt without quantisation: their gradients are then those of slightly other values.

Gradients of U, V, Q and K are written into slices of one buffer, which is then the right-hand side of two products.
The slopes of SiLU at V, Q and K lie there before, and attention's backward multiplies by them as it writes.

Shapes as in `layer.py`.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from attention_kernels.attention.checks import check_first_order
from attention_kernels.layer import linear, operations
from attention_kernels.relative_bias import RelativeBiases
from trainer.models.layer import LayerBatch, LayerParameters, LayerSpec, ProductWeights, cast_products


class _FusedLayer(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_TD: Tensor,
        spec: LayerSpec,
        batch: LayerBatch,
        has_backward: bool,
        weights: ProductWeights,
        *parameters: Tensor,
    ) -> Tensor:
        backend = operations.layer_backend(x_TD)
        T, W = x_TD.shape[0], spec.gate_width
        # What is kept of V, Q and K's SiLU lies where their gradients will.
        keeps_slopes = has_backward and not spec.recompute_uvqk and not spec.production
        duvqk = _gradient_buffer(x_TD, spec) if keeps_slopes else None
        slopes = None if duvqk is None else duvqk[:, W:]
        (u, vqk), normed_TD, mean, rstd = _project(
            x_TD, slopes, parameters=parameters[:4], weights=weights, spec=spec, backend=backend
        )
        biases = _biases(parameters)
        attention = batch.attention.forward(*spec.split_heads(vqk), batch.plan, biases).view(T, W)
        out, gated = output_rows(
            attention, u, x_TD, parameters=parameters[4:7], weights=weights, spec=spec, batch=batch, backend=backend
        )
        ctx.spec, ctx.batch, ctx.backend, ctx.weights = spec, batch, backend, weights
        ctx.save_for_backward(
            x_TD,
            u,
            attention,
            # Statistics come back with the normed input where that is rebuilt.
            None if spec.recompute_normed else mean,
            None if spec.recompute_normed else rstd,
            None if spec.recompute_normed else normed_TD,
            duvqk,
            None if spec.recompute_uvqk else vqk,
            None if spec.recompute_gated else gated,
            *parameters,
        )
        return out

    @staticmethod
    def backward(ctx: Any, dout_TD: Tensor) -> tuple[Tensor | None, ...]:
        check_first_order("an HSTU layer")
        x_TD, u, attention, mean, rstd, normed_TD, duvqk, vqk, gated, *parameters = ctx.saved_tensors
        norm_weight, norm_bias, _, uvqk_bias, gate_weight, gate_bias = parameters[:6]
        spec: LayerSpec = ctx.spec
        batch: LayerBatch = ctx.batch
        backend, weights = ctx.backend, ctx.weights
        T, dtype, W = x_TD.shape[0], x_TD.dtype, spec.gate_width
        dout_TD = dout_TD.contiguous()
        if duvqk is None:
            duvqk = _gradient_buffer(x_TD, spec)
        else:
            # Written over: PyTorch then refuses a second backward through this layer.
            torch.autograd.graph.increment_version(duvqk)

        dgated = dout_TD @ weights.output_weight.t()
        dattention, residual_TD, rebuilt, dgate_weight, dgate_bias, du_bias = operations.gated_norm_backward(
            dgated,
            attention,
            u,
            gate_weight,
            gate_bias,
            spec.norm_eps,
            **gate_options(spec, batch, x_TD),
            residual_TD=dout_TD,
            du=duvqk[:, :W],
            backend=backend,
        )
        del dgated
        doutput_weight = weight_gradient(rebuilt if gated is None else gated, dout_TD)
        del rebuilt, gated

        norm = (norm_weight, norm_bias, spec.norm_eps)
        if normed_TD is None:
            normed_TD, mean, rstd = operations.layer_norm_forward(x_TD, *norm, backend=backend)
        if vqk is None:
            vqk = _vqk(normed_TD, weights.uvqk_weight, uvqk_bias, duvqk[:, W:], spec, dtype=dtype, backend=backend)
        dattention_THV = dattention.view(T, spec.num_heads, spec.value_dim)
        sums, dbiases = _attend_backward(dattention_THV, vqk, duvqk[:, W:], _biases(parameters), spec, batch)
        duvqk_bias = torch.cat([du_bias, *sums])
        del dattention, dattention_THV, vqk
        duvqk_weight = weight_gradient(normed_TD, duvqk)
        del normed_TD
        dnormed_TD = duvqk @ weights.uvqk_weight.t()
        del duvqk
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
        typed = (x.to(parameter.dtype) for x, parameter in zip((*gradients, *dbiases), parameters, strict=True))
        return (dx_TD, None, None, None, None, *typed)


def _project(
    x_TD: Tensor,
    slopes: Tensor | None,
    *,
    parameters: tuple[Tensor, ...],
    weights: ProductWeights,
    spec: LayerSpec,
    backend: operations.LayerBackend,
) -> tuple[tuple[Tensor, Tensor], Tensor | None, Tensor, Tensor]:
    """(U before SiLU; V, Q and K), the normed input (None in FP8), its statistics; `slopes` as in `_vqk`."""
    norm_weight, norm_bias, weight, bias = parameters
    norm = (x_TD, norm_weight, norm_bias, spec.norm_eps)
    W, dtype = spec.gate_width, x_TD.dtype
    if not spec.fp8:
        normed_TD, mean, rstd = operations.layer_norm_forward(*norm, backend=backend)
        columns, u_bias = weights.uvqk_weight, weights.uvqk_bias[:W]
        u = linear.linear(normed_TD, columns[:, :W], u_bias, dtype=dtype, backend=backend)
        vqk = _vqk(normed_TD, columns, bias, slopes, spec, dtype=dtype, backend=backend)
        return (u, vqk), normed_TD, mean, rstd
    rows, row_scale, mean, rstd = linear.layer_norm_fp8(*norm, backend=backend)
    columns, column_scale = linear.quantise_columns(weight, backend=backend)
    scales = (row_scale, column_scale[:W])
    u = linear.linear(rows, columns[:W], bias[:W], scales=scales, dtype=dtype, backend=backend)
    scales = (row_scale, column_scale[W:])
    vqk = _vqk(rows, columns, bias, slopes, spec, scales=scales, dtype=dtype, backend=backend)
    return (u, vqk), None, mean, rstd


def _vqk(
    rows: Tensor,
    weight: Tensor,
    bias: Tensor,
    slopes: Tensor | None,
    spec: LayerSpec,
    *,
    scales: tuple[Tensor, Tensor] | None = None,
    dtype: torch.dtype,
    backend: operations.LayerBackend,
) -> Tensor:
    """V, Q and K; the slopes of their SiLU, where the layer has one there, into `slopes` if given."""
    W = spec.gate_width
    columns = weight[W:] if scales else weight[:, W:]
    if spec.production:
        return linear.linear(rows, columns, bias[W:], scales=scales, dtype=dtype, backend=backend)
    return linear.linear_silu(rows, columns, bias[W:], slopes=slopes, scales=scales, dtype=dtype, backend=backend)


def output_rows(
    attention: Tensor,
    u: Tensor,
    x_TD: Tensor,
    *,
    parameters: tuple[Tensor, ...],
    weights: ProductWeights,
    spec: LayerSpec,
    batch: LayerBatch,
    backend: operations.LayerBackend,
) -> tuple[Tensor, Tensor | None]:
    """The layer's output, and norm(attention) * silu(U) (None in FP8)."""
    norm_weight, norm_bias, weight = parameters
    gate = (attention, u, norm_weight, norm_bias, spec.norm_eps)
    options = gate_options(spec, batch, x_TD)
    if not spec.fp8:
        gated = operations.gated_norm_forward(*gate, **options, backend=backend)
        return linear.matmul_residual(gated, weights.output_weight, x_TD, backend=backend), gated
    rows, scale = linear.gated_norm_fp8(*gate, **options, backend=backend)
    columns = linear.quantise_columns(weight, backend=backend)
    return linear.matmul_fp8(rows, scale, *columns, residual=x_TD, dtype=x_TD.dtype, backend=backend), None


def _attend_backward(
    dout_THV: Tensor, vqk: Tensor, dvqk: Tensor, biases: RelativeBiases | None, spec: LayerSpec, batch: LayerBatch
) -> tuple[list[Tensor], list[Tensor]]:
    """Writes the gradients of the product of V, Q and K into `dvqk`, over the slopes of its SiLU if any.

    Returns their sums, and the gradients of attention's biases.
    """
    out, scaled = spec.split_heads(dvqk), not spec.production
    q_sum, k_sum, v_sum, *dbiases = batch.attention.backward(
        dout_THV, spec.split_heads(vqk), batch.plan, biases, scaled=scaled, out=out
    )
    return [v_sum.flatten(), q_sum.flatten(), k_sum.flatten()], dbiases


def _biases(parameters: Sequence[Tensor]) -> RelativeBiases | None:
    """Attention's, which come last where a layer has them."""
    return RelativeBiases(*parameters[7:]) if len(parameters) > 7 else None


def weight_gradient(rows_TX: Tensor, gradient_TY: Tensor) -> Tensor:
    """The gradient [X, Y] of a weight; a GPU need not round the product's float32 sums to the type of its operands."""
    if rows_TX.is_cuda and rows_TX.itemsize == 2:
        return torch.mm(rows_TX.t(), gradient_TY, out_dtype=torch.float32)
    return rows_TX.t() @ gradient_TY


def _gradient_buffer(x_TD: Tensor, spec: LayerSpec) -> Tensor:
    return torch.empty(x_TD.shape[0], spec.uvqk_width, dtype=x_TD.dtype, device=x_TD.device)


def gate_options(spec: LayerSpec, batch: LayerBatch, x_TD: Tensor) -> dict[str, Any]:
    return {
        "num_groups": spec.num_groups,
        "x_TD": x_TD if spec.production else None,
        "dropout": batch.dropout,
        "seed": batch.seed,
    }


# Opaque to torch.compile, which would look into kernels and products that are already fused, and on a CPU stumbles over
# the reference's autograd; what lies between layers is compiled.
@torch.compiler.disable
def fused_layer(
    x_TD: Tensor,
    parameters: LayerParameters,
    spec: LayerSpec,
    batch: LayerBatch,
    *,
    weights: ProductWeights | None = None,
) -> Tensor:
    """`layer.plain_layer` with its own backward; `x_TD` is contiguous and of the type of computation.

    `weights` are `cast_products` of the parameters, if the caller has cast those of several layers at once.
    """
    p = parameters
    out: Tensor = _FusedLayer.apply(  # type: ignore[no-untyped-call]  # torch.autograd has no types
        x_TD,
        spec,
        batch,
        torch.is_grad_enabled(),
        weights or cast_products([p], x_TD.dtype)[0],
        p.input_norm_weight,
        p.input_norm_bias,
        p.uvqk_weight,
        p.uvqk_bias,
        p.output_norm_weight,
        p.output_norm_bias,
        p.output_weight,
        *(p.biases or ()),
    )
    return out
