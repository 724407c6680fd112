"""The public attention functions, the choice of backend, and the registered operators.

Arguments are checked here (`checks.py`) and nowhere below.  The operators (`longview::hstu_attention_forward` and
`..._backward`) carry fake implementations, and the forward autograd, so torch.compile and torch.export pass through.

Legend: T packed positions, H heads, K query-key size, V value size, B users.
"""

import functools
import logging
from typing import Any

import torch
from torch import Tensor

from attention_kernels import hopper_attention, reference, triton_attention
from attention_kernels.checks import TRITON_DTYPES, Backend, check_first_order, check_inputs, check_like, check_values
from attention_kernels.launcher import INTERPRETED, check_device
from attention_kernels.mask import SemiLocalMask

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
    scale = check_inputs(q_THK, k_THK, v_THV, offsets, mask, num_targets, scale, max_len, backend)
    out_THV: Tensor = torch.ops.longview.hstu_attention_forward(
        q_THK, k_THK, v_THV, offsets, num_targets, *_mask_fields(mask), scale, max_len, backend
    )
    return out_THV


def hstu_attention_backward(
    dout_THV: Tensor,
    q_THK: Tensor,
    k_THK: Tensor,
    v_THV: Tensor,
    offsets: Tensor,
    mask: SemiLocalMask,
    num_targets: Tensor | None = None,
    scale: float | None = None,
    max_len: int = 16384,
    backend: Backend = "auto",
    *,
    out: tuple[Tensor, Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients (dq, dk, dv) of `hstu_attention`, for layers that write their own backward.  Not differentiable.

    `out` takes three tensors of the shapes and dtype of q, k and v that are overwritten in full, for instance slices
    of the gradient of one fused projection; they may be strided as the inputs may.
    """
    arguments = _backward_arguments(
        dout_THV, q_THK, k_THK, v_THV, offsets, mask, num_targets, scale, max_len, backend, out
    )
    if out is None:
        dq, dk, dv = torch.ops.longview.hstu_attention_backward(*arguments)
        return dq, dk, dv
    torch.ops.longview.hstu_attention_backward_out(*arguments, False, False, *out)
    return out


def hstu_projection_backward(
    dout_THV: Tensor,
    q_THK: Tensor,
    k_THK: Tensor,
    v_THV: Tensor,
    offsets: Tensor,
    mask: SemiLocalMask,
    num_targets: Tensor | None = None,
    scale: float | None = None,
    max_len: int = 16384,
    backend: Backend = "auto",
    *,
    scaled: bool,
    out: tuple[Tensor, Tensor, Tensor],
) -> tuple[Tensor, Tensor, Tensor]:
    """`hstu_attention_backward` with what a projection's own backward needs next, before anything is stored.

    With `scaled`, what `out` holds multiplies the gradients that overwrite it: for q = silu(x), likewise k and v, put
    the slopes of SiLU at x there, and they become the gradients of x.
    Returns the sums of the gradients over positions in float32 (float64 for float64), [H, K] twice and [H, V]:
    gradients of biases.
    """
    arguments = _backward_arguments(
        dout_THV, q_THK, k_THK, v_THV, offsets, mask, num_targets, scale, max_len, backend, out
    )
    q_sum, k_sum, v_sum = torch.ops.longview.hstu_attention_backward_out(*arguments, scaled, True, *out)
    return q_sum, k_sum, v_sum


def _backward_arguments(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    offsets: Tensor,
    mask: SemiLocalMask,
    num_targets: Tensor | None,
    scale: float | None,
    max_len: int,
    backend: Backend,
    out: tuple[Tensor, Tensor, Tensor] | None,
) -> tuple[Any, ...]:
    """The operators' arguments, checked."""
    scale = check_inputs(q, k, v, offsets, mask, num_targets, scale, max_len, backend)
    check_like("dout_THV", dout, v)
    for i, (gradient, tensor) in enumerate(zip(out or (), (q, k, v), strict=out is not None)):
        check_like(f"out[{i}]", gradient, tensor)
    return (dout, q, k, v, offsets, num_targets, *_mask_fields(mask), scale, max_len, backend)


@functools.cache
def _mask_of(local: int | None, global_rows: int, global_columns: int, num_context: int) -> SemiLocalMask:
    """The inverse of `_mask_fields`."""
    return SemiLocalMask(local=local, global_rows=global_rows, global_columns=global_columns, num_context=num_context)


def _mask_fields(mask: SemiLocalMask) -> tuple[int | None, int, int, int]:
    return mask.local, mask.global_rows, mask.global_columns, mask.num_context


@functools.cache
def _log_backend(backend: str, device_type: str, reason: str) -> None:
    logger.info("attention backend on %s tensors: %s (%s)", device_type, backend, reason)


def _choose_backend(backend: str, *tensors: Tensor) -> Any:
    """The module that computes on q, k, v (and dout): `reference`, `hopper_attention` or `triton_attention`."""
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
    if hopper_attention.takes(*tensors):
        _log_backend("triton, warp-specialised for Hopper", q.device.type, reason)
        return hopper_attention
    _log_backend("triton", q.device.type, reason)
    return triton_attention


_MASK_SCHEMA = "int? local, int global_rows, int global_columns, int num_context"
_COMMON_SCHEMA = (
    f"Tensor q, Tensor k, Tensor v, Tensor offsets, Tensor? num_targets, {_MASK_SCHEMA}, "
    "float scale, int max_len, str backend"
)
_FORWARD = "longview::hstu_attention_forward"
_BACKWARD = "longview::hstu_attention_backward"
_BACKWARD_OUT = "longview::hstu_attention_backward_out"

torch.library.define(_FORWARD, f"({_COMMON_SCHEMA}) -> Tensor")
torch.library.define(_BACKWARD, f"(Tensor dout, {_COMMON_SCHEMA}) -> (Tensor, Tensor, Tensor)")
torch.library.define(
    _BACKWARD_OUT,
    f"(Tensor dout, {_COMMON_SCHEMA}, bool scaled, bool sums, Tensor(a!) dq, Tensor(b!) dk, Tensor(c!) dv) "
    "-> (Tensor, Tensor, Tensor)",
)


def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    offsets: Tensor,
    num_targets: Tensor | None,
    local: int | None,
    global_rows: int,
    global_columns: int,
    num_context: int,
    scale: float,
    max_len: int,
    backend: str,
) -> Tensor:
    offsets, num_targets = _indices(q, offsets, num_targets, num_context, max_len)
    mask = _mask_of(local, global_rows, global_columns, num_context)
    module = _choose_backend(backend, q, k, v)
    out: Tensor = module.forward(q, k, v, offsets, mask, num_targets=num_targets, scale=scale, max_len=max_len)
    return out


def _backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *arguments: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    torch.ops.longview.hstu_attention_backward_out(dout, q, k, v, *arguments, False, False, dq, dk, dv)
    return dq, dk, dv


def _backward_out(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    offsets: Tensor,
    num_targets: Tensor | None,
    local: int | None,
    global_rows: int,
    global_columns: int,
    num_context: int,
    scale: float,
    max_len: int,
    backend: str,
    scaled: bool,
    sums: bool,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
) -> tuple[Tensor, ...]:
    """Returns the sums over positions, or three tensors of nothing."""
    offsets, num_targets = _indices(q, offsets, num_targets, num_context, max_len)
    mask = _mask_of(local, global_rows, global_columns, num_context)
    # A gradient may arrive transposed or expanded.
    dout = dout if dout.stride(2) == 1 and 0 not in dout.stride() else dout.contiguous()
    module = _choose_backend(backend, q, k, v, dout)
    out = (dq, dk, dv)
    options: dict[str, Any] = {"num_targets": num_targets, "scale": scale, "max_len": max_len}
    wide = _sum_dtype(q)
    if q.numel() == 0:
        total = [x.new_zeros(x.shape[1:], dtype=wide) for x in out]
    elif module is reference:
        gradients = list(reference.backward(dout, q, k, v, offsets, mask, **options))
        if scaled:
            gradients = [x * factor.to(wide) for x, factor in zip(gradients, out, strict=True)]
        for destination, gradient in zip(out, gradients, strict=True):
            destination.copy_(gradient)
        total = [x.sum(0, dtype=wide) for x in gradients]
    else:
        total = module.backward(dout, q, k, v, offsets, mask, **options, out=out, scaled=scaled, sums=sums)
    return tuple(total if sums else (q.new_empty(0, dtype=wide) for _ in out))


def _indices(
    q: Tensor, offsets: Tensor, num_targets: Tensor | None, num_context: int, max_len: int
) -> tuple[Tensor, Tensor | None]:
    """Offsets and numbers of targets as kernels read them, their values checked where that costs nothing."""
    check_values(q, offsets, num_targets, num_context, max_len)
    return offsets.contiguous(), None if num_targets is None else num_targets.contiguous()


def _sum_dtype(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


torch.library.impl(_FORWARD, ("cpu", "cuda"), _forward)
torch.library.impl(_BACKWARD, ("cpu", "cuda"), _backward)
torch.library.impl(_BACKWARD_OUT, ("cpu", "cuda"), _backward_out)


@torch.library.register_fake(_FORWARD)
def _forward_fake(q: Tensor, k: Tensor, v: Tensor, *arguments: Any) -> Tensor:
    return v.new_empty(v.shape)


@torch.library.register_fake(_BACKWARD)
def _backward_fake(dout: Tensor, q: Tensor, k: Tensor, v: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


@torch.library.register_fake(_BACKWARD_OUT)
def _backward_out_fake(*arguments: Any) -> tuple[Tensor, ...]:
    sums, *out = arguments[-4:]
    return tuple(x.new_empty(x.shape[1:] if sums else 0, dtype=_sum_dtype(x)) for x in out)


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
