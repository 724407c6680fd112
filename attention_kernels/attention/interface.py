"""The public attention functions, the choice of backend, and the registered operators.

Arguments are checked here and where a plan is made (`plan.py`), by `checks.py`, and nowhere below.  The operators
(`longview::hstu_attention_forward` and `..._backward`) carry fake implementations, and the forward autograd, so
torch.compile and torch.export pass through.  Layers that write their own backward call `attention_forward` and
`projection_backward` with a plan of their own.

Legend: T packed positions, R rows (T, or where a plan computes some of them, those), H heads, K query-key size,
V value size, B users.
"""

import functools
import logging
from typing import Any

import torch
from torch import Tensor

from attention_kernels import reference
from attention_kernels.attention import padding
from attention_kernels.attention.checks import (
    TRITON_DTYPES,
    Backend,
    check_biases,
    check_first_order,
    check_like,
    check_problem,
    check_tensors,
    check_total,
    check_values,
)
from attention_kernels.attention.hopper import launchers as hopper
from attention_kernels.attention.plan import AttentionPlan
from attention_kernels.attention.portable import launchers as portable
from attention_kernels.attention.portable.launchers import Backward
from attention_kernels.launcher import INTERPRETED, check_device
from attention_kernels.mask import SemiLocalMask
from attention_kernels.relative_bias import RelativeBiases

logger = logging.getLogger(__name__)


def hstu_attention(
    q_THK: Tensor,
    k_THK: Tensor,
    v_THV: Tensor,
    offsets: Tensor,
    mask: SemiLocalMask,
    num_targets: Tensor | None = None,
    scale: float | None = None,
    max_len: int = 16384,
    backend: Backend = "auto",
) -> Tensor:
    """SiLU attention of packed sequences: out[q] = sum over allowed k of silu(scale <q, k>) / max_len v[k].

    Differentiable (once) in q, k and v, which may be strided views (slices of one fused projection) with a contiguous
    last dimension.  Accumulates in float32; the result [T, H, V] is contiguous and has v's dtype.  Output and gradients
    are the same bits every time.

    Args:
        q_THK, k_THK: [T, H, K], bfloat16, float16 or float32, K up to 256.
        v_THV: [T, H, V], the same dtype.
        offsets: [B + 1], int32 or int64, where each sequence starts; offsets[0] == 0 and offsets[-1] == T.
        mask: which keys a query sees.
        num_targets: [B], int32 or int64: how many of the last tokens of a sequence are targets.  None: none.
        scale: factor of the scores; default K ** -0.5.
        max_len: constant of the model, the same in training and serving, never below the longest sequence.
        backend: "triton" (CUDA, or CPU tensors in Triton's interpreter), "reference" (dense, any device), or "auto":
            Triton on CUDA tensors, the reference otherwise.

    Raises:
        ValueError: naming the argument that is wrong.  The values of offsets and num_targets are checked on the CPU
            only: reading them from a GPU would stall it.
    """
    check_problem(offsets, mask, num_targets, scale, max_len, backend)
    check_tensors(q_THK, k_THK, v_THV, offsets)
    scale = float(q_THK.shape[2] ** -0.5 if scale is None else scale)
    out_THV: Tensor = torch.ops.longview.hstu_attention_forward(
        q_THK, k_THK, v_THV, offsets, num_targets, *_mask_fields(mask), scale, max_len, backend
    )
    return out_THV


def attention_forward(
    q_RHK: Tensor, k_THK: Tensor, v_THV: Tensor, plan: AttentionPlan, biases: RelativeBiases | None = None
) -> Tensor:
    """`hstu_attention` of a plan's problem, [R, H, V].  Not differentiable.

    `biases`, of a plan with times alone, are added to scores (`relative_bias.py`).

    Raises:
        ValueError: naming the tensor that is wrong.
    """
    check_tensors(q_RHK, k_THK, v_THV, plan.offsets, fewer_rows=plan.rows is not None)
    check_total(k_THK, plan.offsets, padded=plan.padded)
    _check_biases(q_RHK, plan, biases)
    module = _choose_backend(plan.backend, q_RHK, k_THK, v_THV, biased=biases is not None)
    out: Tensor = module.forward(q_RHK, k_THK, v_THV, plan, biases)
    if plan.padded:
        padding.zero([(out, plan.row_offsets)], on_host=module is reference)
    return out


def attention_backward(
    dout_RHV: Tensor,
    q_RHK: Tensor,
    k_THK: Tensor,
    v_THV: Tensor,
    plan: AttentionPlan,
    *,
    out: tuple[Tensor, Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients (dq, dk, dv) of `attention_forward`.  Not differentiable.

    `out` takes three tensors of the shapes and dtype of q, k and v that are overwritten in full, for instance slices
    of the gradient of one fused projection; they may be strided as the inputs may.
    """
    inputs = (q_RHK, k_THK, v_THV)
    if out is None:
        dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in inputs)
        out = (dq, dk, dv)
    _backward_out(dout_RHV, inputs, plan, out, sums=False)
    return out


def projection_backward(
    dout_RHV: Tensor,
    q_RHK: Tensor,
    k_THK: Tensor,
    v_THV: Tensor,
    plan: AttentionPlan,
    biases: RelativeBiases | None = None,
    *,
    scaled: bool,
    out: tuple[Tensor, Tensor, Tensor],
) -> tuple[Tensor, ...]:
    """`attention_backward` with what a projection's own backward needs next, before anything is stored.

    With `scaled`, what `out` holds multiplies the gradients that overwrite it: for q = silu(x), likewise k and v, put
    the slopes of SiLU at x there, and they become the gradients of x.
    Returns the sums of the gradients over positions in float32 (float64 for float64), [H, K] twice and [H, V]:
    gradients of the projection's biases.  Behind them, with `biases`, the gradients of those, [H, M] and [H, G].
    """
    total = _backward_out(dout_RHV, (q_RHK, k_THK, v_THV), plan, out, biases, scaled=scaled, sums=True)
    assert total is not None
    return total


def _backward_out(
    dout: Tensor,
    inputs: tuple[Tensor, Tensor, Tensor],
    plan: AttentionPlan,
    out: tuple[Tensor, Tensor, Tensor],
    biases: RelativeBiases | None = None,
    *,
    scaled: bool = False,
    sums: bool,
) -> tuple[Tensor, ...] | None:
    """Checks, writes the gradients, and returns their sums over positions if asked for, and the biases' gradients."""
    q, k, v = inputs
    check_tensors(q, k, v, plan.offsets, fewer_rows=plan.rows is not None)
    check_total(k, plan.offsets, padded=plan.padded)
    _check_biases(q, plan, biases)
    check_like("dout_RHV", dout, v, rows=q.shape[0], strided=False)
    for i, (gradient, tensor) in enumerate(zip(out, inputs, strict=True)):
        check_like(f"out[{i}]", gradient, tensor, rows=tensor.shape[0])
    # A gradient may arrive transposed or expanded.
    dout = dout if dout.stride(2) == 1 and 0 not in dout.stride() else dout.contiguous()
    wide = torch.promote_types(q.dtype, torch.float32)
    if q.numel() == 0:
        # Nothing is computed, so nothing depends on keys and values.
        for x in out:
            x.zero_()
        shapes = [*(x.shape[1:] for x in out), *(x.shape for x in biases or ())]
        return tuple(q.new_zeros(shape, dtype=wide) for shape in shapes) if sums else None
    module = _choose_backend(plan.backend, q, k, v, dout, biased=biases is not None)
    if module is reference:
        found = reference.backward(dout, q, k, v, plan, biases)
        gradients, of_biases = found[:3], found[3:]
        if scaled:
            gradients = tuple(x * factor.to(wide) for x, factor in zip(gradients, out, strict=True))
        for destination, gradient in zip(out, gradients, strict=True):
            destination.copy_(gradient)
        return (*(x.sum(0, dtype=wide) for x in gradients), *of_biases) if sums else None
    dq, dk, dv = out
    call = Backward(dout=dout, q=q, k=k, v=v, plan=plan, dq=dq, dk=dk, dv=dv, scaled=scaled, biases=biases)
    total: tuple[Tensor, ...] | None = module.backward(call, sums=sums)
    if plan.padded:
        padding.zero([(dq, plan.row_offsets), (dk, plan.offsets), (dv, plan.offsets)])
    return total


def _check_biases(q: Tensor, plan: AttentionPlan, biases: RelativeBiases | None) -> None:
    if biases is None:
        return
    if plan.times is None:
        raise ValueError("the plan has no times, which biases need: give make_plan some")
    check_biases(q, *biases, plan.times.happened, plan.times.bucket_starts.shape[0])


@functools.cache
def _mask_of(local: int | None, global_rows: int, global_columns: int, num_context: int) -> SemiLocalMask:
    """The inverse of `_mask_fields`."""
    return SemiLocalMask(local=local, global_rows=global_rows, global_columns=global_columns, num_context=num_context)


def _mask_fields(mask: SemiLocalMask) -> tuple[int | None, int, int, int]:
    return mask.local, mask.global_rows, mask.global_columns, mask.num_context


@functools.cache
def _log_backend(backend: str, device_type: str, reason: str) -> None:
    logger.info("attention backend on %s tensors: %s (%s)", device_type, backend, reason)


def _choose_backend(backend: str, *tensors: Tensor, biased: bool = False) -> Any:
    """The module that computes on q, k, v (and dout): `reference`, or the launchers of `hopper` or `portable`.  Only
    the kernels for Hopper know no biases."""
    q = tensors[0]
    on_cuda = q.device.type == "cuda"
    chosen = backend if backend != "auto" else ("triton" if on_cuda else "reference")
    reason = "chosen by device" if backend == "auto" else "asked for"
    if chosen == "reference":
        _log_backend(chosen, q.device.type, reason)
        return reference
    if on_cuda and INTERPRETED:
        raise ValueError(
            "TRITON_INTERPRET=1 runs the kernels on CPU tensors, got CUDA tensors: start Python without it"
        )
    if not on_cuda and not INTERPRETED:
        raise ValueError(
            f"backend='triton' needs CUDA tensors, got {q.device.type}; "
            "set TRITON_INTERPRET=1 before starting Python to run the kernels in Triton's interpreter"
        )
    check_device(q)
    if q.dtype not in TRITON_DTYPES:
        raise ValueError(f"q_THK is {q.dtype}; backend='triton' takes bfloat16, float16 and float32")
    if not biased and hopper.takes(*tensors):
        _log_backend("triton, warp-specialised for Hopper", q.device.type, reason)
        return hopper
    _log_backend("triton", q.device.type, reason)
    return portable


_MASK_SCHEMA = "int? local, int global_rows, int global_columns, int num_context"
_COMMON_SCHEMA = (
    f"Tensor q, Tensor k, Tensor v, Tensor offsets, Tensor? num_targets, {_MASK_SCHEMA}, "
    "float scale, int max_len, str backend"
)
_FORWARD = "longview::hstu_attention_forward"
_BACKWARD = "longview::hstu_attention_backward"

torch.library.define(_FORWARD, f"({_COMMON_SCHEMA}) -> Tensor")
torch.library.define(_BACKWARD, f"(Tensor dout, {_COMMON_SCHEMA}) -> (Tensor, Tensor, Tensor)")


def _forward(q: Tensor, k: Tensor, v: Tensor, *arguments: Any) -> Tensor:
    return attention_forward(q, k, v, _plan(*arguments))


def _backward(dout: Tensor, q: Tensor, k: Tensor, v: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    return attention_backward(dout, q, k, v, _plan(*arguments))


def _plan(
    offsets: Tensor,
    num_targets: Tensor | None,
    local: int | None,
    global_rows: int,
    global_columns: int,
    num_context: int,
    scale: float,
    max_len: int,
    backend: Backend,
) -> AttentionPlan:
    """The operators' arguments behind q, k and v as a plan, the values checked where that costs nothing."""
    check_values(offsets, num_targets, num_context, max_len)
    return AttentionPlan(
        offsets=offsets.contiguous(),
        mask=_mask_of(local, global_rows, global_columns, num_context),
        num_targets=None if num_targets is None else num_targets.contiguous(),
        scale=scale,
        max_len=max_len,
        backend=backend,
    )


torch.library.impl(_FORWARD, ("cpu", "cuda"), _forward)
torch.library.impl(_BACKWARD, ("cpu", "cuda"), _backward)


@torch.library.register_fake(_FORWARD)
def _forward_fake(q: Tensor, k: Tensor, v: Tensor, *arguments: Any) -> Tensor:
    return v.new_empty(v.shape)


@torch.library.register_fake(_BACKWARD)
def _backward_fake(dout: Tensor, q: Tensor, k: Tensor, v: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


class _Attention(torch.autograd.Function):
    """The forward operator with the backward operator as its derivative."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, offsets: Tensor, num_targets: Tensor | None, *arguments: Any
    ) -> Tensor:
        ctx.save_for_backward(q, k, v, offsets, num_targets)
        ctx.arguments = arguments
        return _forward_below_autograd(q, k, v, offsets, num_targets, *arguments)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        check_first_order("hstu_attention")
        (dout,) = gradients
        dq, dk, dv = torch.ops.longview.hstu_attention_backward(dout, *ctx.saved_tensors, *ctx.arguments)
        return dq, dk, dv, *([None] * (2 + len(ctx.arguments)))


def _forward_below_autograd(*arguments: Any) -> Tensor:
    with torch._C._AutoDispatchBelowAutograd():
        out: Tensor = torch.ops.longview.hstu_attention_forward(*arguments)
    return out


def _forward_autograd(q: Tensor, k: Tensor, v: Tensor, *arguments: Any) -> Tensor:
    """Registered by hand: `torch.library.register_autograd` takes the host twice as long."""
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        out: Tensor = _Attention.apply(q, k, v, *arguments)
        return out
    return _forward_below_autograd(q, k, v, *arguments)


torch.library.impl(_FORWARD, "Autograd", _forward_autograd)
