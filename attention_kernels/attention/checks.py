"""Checks of the attention functions' arguments: shapes and dtypes on the host, values where they lie in host memory.

Legend as in `interface.py`.
"""

import itertools
import math
from typing import Literal

import torch
from torch import Tensor

from attention_kernels.mask import SemiLocalMask

Backend = Literal["auto", "triton", "reference"]
_BACKENDS = ("auto", "triton", "reference")
TRITON_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
"""What the kernels take."""
_DTYPES = (*TRITON_DTYPES, torch.float64)
_MAX_HEAD_SIZE = 256


def check_problem(
    offsets: Tensor,
    mask: SemiLocalMask,
    num_targets: Tensor | None,
    scale: float | None,
    max_len: int,
    backend: str,
) -> None:
    """Checks what is the same for all layers, as far as shapes and dtypes tell, without touching a device."""
    if not isinstance(mask, SemiLocalMask):
        raise ValueError(f"mask is a {type(mask).__name__}, expected a SemiLocalMask")
    if backend not in _BACKENDS:
        raise ValueError(f"backend={backend!r} is none of {', '.join(_BACKENDS)}")
    _check_index("offsets", offsets)
    if offsets.shape[0] < 1:
        raise ValueError("offsets is empty, expected [B + 1] entries (one zero for an empty batch)")
    if num_targets is not None:
        _check_index("num_targets", num_targets)
        if num_targets.device != offsets.device:
            raise ValueError(f"num_targets is on {num_targets.device}, offsets on {offsets.device}; put both on one")
        if num_targets.shape[0] != offsets.shape[0] - 1:
            raise ValueError(f"num_targets is {_describe(num_targets)}, expected [{offsets.shape[0] - 1}] as offsets")
    if isinstance(max_len, bool) or not isinstance(max_len, (int, torch.SymInt)) or max_len < 1:
        raise ValueError(f"max_len={max_len!r} must be a positive integer, the model's longest sequence")
    if scale is not None and (not isinstance(scale, (int, float, torch.SymFloat)) or not math.isfinite(scale)):
        raise ValueError(f"scale={scale!r} must be a finite number")


def check_tensors(q: Tensor, k: Tensor, v: Tensor, offsets: Tensor, *, fewer_rows: bool = False) -> None:
    """Checks a layer's tensors likewise.  `fewer_rows`: q holds fewer rows than there are keys."""
    for name, x in (("q_THK", q), ("k_THK", k), ("v_THV", v)):
        if not isinstance(x, Tensor) or x.dim() != 3:
            raise ValueError(f"{name} must be a tensor [T, heads, size], got {_describe(x)}")
        if x.dtype not in _DTYPES or x.dtype != q.dtype:
            raise ValueError(f"{name} is {x.dtype}; q, k and v must share one dtype of bfloat16, float16, float32")
        if x.device != q.device:
            raise ValueError(f"{name} is on {x.device}, q_THK on {q.device}; put them on one device")
        if not 1 <= x.shape[2] <= _MAX_HEAD_SIZE:
            raise ValueError(f"{name} has head size {x.shape[2]}, expected 1 to {_MAX_HEAD_SIZE}")
        if x.shape[1] < 1:
            raise ValueError(f"{name} has no heads: {_describe(x)}")
        if x.stride(2) != 1 and x.shape[2] > 1:
            raise ValueError(f"{name} has stride {x.stride(2)} in its last dimension, expected 1; call contiguous()")
    if k.shape[1:] != q.shape[1:] or (k.shape[0] != q.shape[0] and not fewer_rows):
        raise ValueError(f"k_THK is {_describe(k)}, expected the shape of q_THK, {tuple(q.shape)}")
    if v.shape[:2] != k.shape[:2]:
        raise ValueError(f"v_THV is {_describe(v)}, expected [{k.shape[0]}, {k.shape[1]}, V] as k_THK")
    if offsets.device != q.device:
        raise ValueError(f"offsets is on {offsets.device}, q_THK on {q.device}; put them on one device")
    if offsets.shape[0] == 1 and k.shape[0] != 0:
        raise ValueError(f"offsets describes no sequence, but k_THK holds {k.shape[0]} positions")
    # Under a compiler or an exporter sizes may be symbols, of which nothing is known here.
    if isinstance(k.shape[0], int) and k.shape[0] >= 2**31:
        raise ValueError(f"k_THK holds {k.shape[0]} positions, and kernels count to 2**31 - 1: take a smaller batch")


def _check_index(name: str, x: Tensor) -> None:
    if not isinstance(x, Tensor) or x.dim() != 1:
        raise ValueError(f"{name} must be a one-dimensional tensor, got {_describe(x)}")
    if x.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"{name} is {x.dtype}, expected int32 or int64")


def check_like(name: str, x: Tensor, model: Tensor, *, rows: int, strided: bool = True) -> None:
    """A gradient: `rows` rows like the model's; `strided`: rows must have a stride of 1."""
    shape = (rows, *model.shape[1:])
    if not isinstance(x, Tensor) or x.shape != shape:
        raise ValueError(f"{name} is {_describe(x)}, expected shape {shape}")
    if x.dtype != model.dtype or x.device != model.device:
        raise ValueError(f"{name} is {x.dtype} on {x.device}, expected {model.dtype} on {model.device}")
    if strided and x.stride(2) != 1 and x.shape[2] > 1:
        raise ValueError(f"{name} has stride {x.stride(2)} in its last dimension, expected 1")


def check_first_order(what: str) -> None:
    """Called in a backward: refuses `create_graph`, by which this backward would have to be differentiable itself."""
    if torch.is_grad_enabled():
        raise RuntimeError(f"{what} has no second derivatives: call backward or grad without create_graph=True")


def _describe(x: object) -> str:
    return f"{x.dtype} {tuple(x.shape)}" if isinstance(x, Tensor) else f"a {type(x).__name__}"


def check_values(offsets: Tensor, num_targets: Tensor | None, num_context: int, max_len: int) -> None:
    """Checks the values of offsets and num_targets in host memory: to read them from a GPU would be to wait for it."""
    if offsets.device.type != "cpu":
        return
    bounds = offsets.tolist()
    if bounds[0] != 0:
        raise ValueError(f"offsets starts at {bounds[0]}, expected 0")
    lengths = [end - start for start, end in itertools.pairwise(bounds)]
    if lengths and min(lengths) < 0:
        raise ValueError(f"offsets decreases after entry {lengths.index(min(lengths))}")
    if lengths and max(lengths) > max_len:
        raise ValueError(f"max_len={max_len} is below the longest sequence in offsets, {max(lengths)}")
    targets = [0] * len(lengths) if num_targets is None else num_targets.tolist()
    for i, (n, t) in enumerate(zip(lengths, targets, strict=True)):
        if not 0 <= t <= n:
            raise ValueError(f"num_targets[{i}]={t} must lie between 0 and the sequence's length, {n}")
        if 0 < n < num_context + t:
            raise ValueError(
                f"offsets gives sequence {i} {n} tokens, fewer than mask.num_context={num_context} plus its {t} targets"
            )


MAX_TIME_BUCKETS = 256
"""Kernels keep a pair's bucket in a byte."""


def check_times(offsets: Tensor, happened: Tensor, asked: Tensor, bucket_starts: Tensor, longest: int) -> None:
    """Checks what biases need beside offsets."""
    for name, x in (("happened", happened), ("asked", asked), ("bucket_starts", bucket_starts)):
        if x.dim() != 1 or x.dtype != torch.int64 or x.device != offsets.device:
            raise ValueError(f"times.{name} is {_describe(x)} on {x.device}, expected int64 beside offsets")
    if happened.shape != asked.shape:
        raise ValueError(f"times.asked is {_describe(asked)}, expected the shape of times.happened")
    if not 1 <= bucket_starts.shape[0] <= MAX_TIME_BUCKETS:
        raise ValueError(f"times.bucket_starts is {_describe(bucket_starts)}, expected 1 to {MAX_TIME_BUCKETS} buckets")
    if offsets.device.type == "cpu" and offsets.shape[0] > 1 and int(offsets.diff().max()) > longest:
        raise ValueError(
            f"times.longest={longest} is below the longest sequence in offsets, {int(offsets.diff().max())}"
        )


def check_biases(q: Tensor, position: Tensor, time: Tensor, happened: Tensor, num_buckets: int) -> None:
    """Checks a layer's biases, of a plan with times: [H, M] and [H, G] in float32, or float64 as q."""
    heads, wide = q.shape[1], torch.promote_types(q.dtype, torch.float32)
    for name, x in (("position", position), ("time", time)):
        if x.dim() != 2 or x.shape[0] != heads or x.shape[1] < 1 or x.dtype != wide or x.device != q.device:
            raise ValueError(f"biases.{name} is {_describe(x)} on {x.device}, expected {wide} [{heads} heads, biases]")
    if time.shape[1] != num_buckets:
        raise ValueError(f"biases.time has {time.shape[1]} buckets, the plan's times {num_buckets}")
    if happened.shape[0] != q.shape[0]:
        raise ValueError(f"times.happened has {happened.shape[0]} positions, q_THK {q.shape[0]}")


def check_total(k: Tensor, offsets: Tensor, *, padded: bool) -> None:
    """Checks, in host memory, that the offsets end where keys do; `padded`: at the latest."""
    if offsets.device.type != "cpu" or (padded and int(offsets[-1]) <= k.shape[0]):
        return
    if int(offsets[-1]) != k.shape[0]:
        raise ValueError(f"offsets runs from 0 to {int(offsets[-1])}, expected 0 to T = {k.shape[0]}")
