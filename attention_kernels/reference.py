"""HSTU attention in plain PyTorch: the definition that every kernel is tested against.

Slow and dense on purpose: it builds the boolean mask of each sequence.  Runs on any device and any floating type
(float64 inputs are computed in float64, all others in float32), a block of query rows at a time so that memory
stays bounded however long a sequence is.  The backward is written out; tests compare it with autograd.

Legend: T packed positions, R rows that are computed, H heads, K query-key size, V value size, B rows of one block,
N keys of a sequence.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from attention_kernels.attention.plan import AttentionPlan
from attention_kernels.layer.reference import silu_slope
from attention_kernels.mask import SemiLocalMask
from attention_kernels.relative_bias import RelativeBiases, relative_attention, relative_attention_backward

# Scores of one block of rows: heads x rows x keys elements, 64 MiB in float32.
_MAX_BLOCK_ELEMENTS = 2**24


def dense_mask(mask: SemiLocalMask, h: int, t: int, *, device: torch.device | str = "cpu") -> Tensor:
    """Boolean [n, n] mask (query, key) of one sequence with `h` history and `t` target tokens, n = num_context + h + t.

    >>> dense_mask(SemiLocalMask(local=1, global_rows=1), h=4, t=1).int().tolist()
    [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [0, 1, 1, 0, 0], [1, 1, 1, 1, 0], [1, 1, 1, 1, 1]]
    """
    if h < 0 or t < 0:
        raise ValueError(f"h={h} and t={t} must not be negative")
    return _mask_rows(mask, mask.num_context, h, t, 0, mask.num_context + h + t, torch.device(device))


def forward(
    q_RHK: Tensor, k_THK: Tensor, v_THV: Tensor, plan: AttentionPlan, biases: RelativeBiases | None = None
) -> Tensor:
    """Attention output [R, H, V] in v's dtype: sum over allowed keys of silu(scale <q, k>) / max_len v[k].

    With biases, as in `relative_bias.py`.
    """
    if biases is not None:
        return relative_attention(q_RHK, k_THK, v_THV, plan, biases)
    out_RHV = torch.empty((q_RHK.shape[0], *v_THV.shape[1:]), dtype=v_THV.dtype, device=v_THV.device)
    for keys, rows, mask_BN in _blocks(q_RHK, plan):
        q_HBK, k_HNK, v_HNV = _heads_first(q_RHK[rows], k_THK[keys], v_THV[keys])
        score_HBN = q_HBK @ k_HNK.transpose(1, 2) * plan.scale_of(q_RHK)
        weight_HBN = torch.nn.functional.silu(score_HBN).masked_fill_(~mask_BN, 0.0) / plan.max_len
        out_RHV[rows] = (weight_HBN @ v_HNV).transpose(0, 1).to(out_RHV.dtype)
    return out_RHV


def backward(
    dout_RHV: Tensor,
    q_RHK: Tensor,
    k_THK: Tensor,
    v_THV: Tensor,
    plan: AttentionPlan,
    biases: RelativeBiases | None = None,
) -> tuple[Tensor, ...]:
    """Gradients of q, k and v, each in its tensor's dtype, accumulated in float32 (float64 for float64 inputs); behind
    them those of biases, if given."""
    if biases is not None:
        return relative_attention_backward(dout_RHV, q_RHK, k_THK, v_THV, plan, biases)
    scale, max_len = plan.scale_of(q_RHK), plan.max_len
    dq, dk, dv = (torch.zeros(x.shape, dtype=_accumulate_dtype(x), device=x.device) for x in (q_RHK, k_THK, v_THV))
    for keys, rows, mask_BN in _blocks(q_RHK, plan):
        q_HBK, k_HNK, v_HNV = _heads_first(q_RHK[rows], k_THK[keys], v_THV[keys])
        (dout_HBV,) = _heads_first(dout_RHV[rows])
        score_HBN = q_HBK @ k_HNK.transpose(1, 2) * scale
        weight_HBN = torch.nn.functional.silu(score_HBN).masked_fill_(~mask_BN, 0.0) / max_len
        dscore_HBN = (dout_HBV @ v_HNV.transpose(1, 2) * silu_slope(score_HBN)).masked_fill_(~mask_BN, 0.0)
        dscore_HBN *= scale / max_len
        dq[rows] += (dscore_HBN @ k_HNK).transpose(0, 1)
        dk[keys] += (dscore_HBN.transpose(1, 2) @ q_HBK).transpose(0, 1)
        dv[keys] += (weight_HBN.transpose(1, 2) @ dout_HBV).transpose(0, 1)
    return dq.to(q_RHK.dtype), dk.to(k_THK.dtype), dv.to(v_THV.dtype)


def _blocks(q_RHK: Tensor, plan: AttentionPlan) -> Iterator[tuple[slice, slice, Tensor]]:
    """Yields (keys, rows, mask [B, N]) of every sequence, few rows at a time.  Reads offsets on the host."""
    bounds = plan.offsets.tolist()
    targets = [0] * (len(bounds) - 1) if plan.num_targets is None else plan.num_targets.tolist()
    row_starts = plan.row_offsets.tolist()
    for i, (start, end, t) in enumerate(zip(bounds[:-1], bounds[1:], targets, strict=True)):
        n = end - start
        # An empty sequence holds fewer context tokens than the model has.
        c = min(plan.mask.num_context, n - t)
        row = row_starts[i]
        step = max(1, _MAX_BLOCK_ELEMENTS // max(1, n * q_RHK.shape[1]))
        for begin, stop in _computed(plan, c, n - t, n):
            for first in range(begin, stop, step):
                last = min(first + step, stop)
                mask_BN = _mask_rows(plan.mask, c, n - c - t, t, first, last, q_RHK.device)
                yield slice(start, end), slice(row, row + last - first), mask_BN
                row += last - first


def _computed(plan: AttentionPlan, c: int, u: int, n: int) -> list[tuple[int, int]]:
    """Runs of a sequence's positions that are rows: context ends at c, history at u, targets at n."""
    if plan.rows is None:
        return [(0, n)]
    return [(0, c if plan.rows.context else 0), (max(c, u - plan.rows.newest), n)]


def _mask_rows(mask: SemiLocalMask, c: int, h: int, t: int, first: int, last: int, device: torch.device) -> Tensor:
    """Rows first..last-1 of the dense mask, written as the table in `mask.py`."""
    q = torch.arange(first, last, device=device)[:, None]
    k = torch.arange(c + h + t, device=device)[None, :]
    row_is_history = (q >= c) & (q < c + h)
    row_is_target = q >= c + h
    key_is_context = k < c
    key_is_history = (k >= c) & (k < c + h)
    if mask.local is None:
        near = torch.ones_like(q >= k)
    else:
        near = (q - k <= mask.local) | (q >= c + h - mask.global_rows) | (k - c < mask.global_columns)
    seen_by_history = key_is_context | (key_is_history & (k <= q) & near)
    seen_by_context_or_target = key_is_context | key_is_history | (row_is_target & (k == q))
    return torch.where(row_is_history, seen_by_history, seen_by_context_or_target)


def _heads_first(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(x.to(_accumulate_dtype(x)).transpose(0, 1) for x in tensors)


def _accumulate_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32
