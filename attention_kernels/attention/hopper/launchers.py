"""Launchers of the warp-specialised kernels, for what `takes` admits.  Validates nothing (see `interface.py`).

Grids are one program a multiprocessor; nothing waits for a length on the device.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from attention_kernels.attention import tile_sums
from attention_kernels.attention.hopper.backward import hopper_dkdv_kernel, hopper_dq_kernel
from attention_kernels.attention.hopper.forward import hopper_forward_kernel
from attention_kernels.attention.hopper.rings import GROUP_SIZE, block_layout, thread_registers
from attention_kernels.attention.plan import AttentionPlan, Schedule
from attention_kernels.attention.portable import launchers as portable
from attention_kernels.attention.portable.launchers import (
    Backward,
    block_size,
    head_rows,
    partials,
    shape_of,
    tma_aligned,
)
from attention_kernels.attention.portable.tuning import choose_config
from attention_kernels.attention.schedule import Shape, schedules
from attention_kernels.launcher import Blocks, launch
from attention_kernels.rows import is_hopper, multiprocessors, pad_size

_GROUP = GROUP_SIZE.value
_HELD = 2 * _GROUP


@dataclass(frozen=True, kw_only=True, slots=True)
class RingConfig:
    """The groups and buffers of one kernel."""

    groups: int = 2
    """Compute groups of 64 rows (or keys)."""

    block: int
    """Positions of a streamed tile."""

    held_stages: int
    """Held tiles in shared memory: with two the next item's are loaded while this one's are in use."""

    stages: int
    """Streamed tiles in shared memory; at least two, as a group releases a tile only when it has the next."""

    wide: bool = False
    """Whether it is the backward for large heads (`wide.py`), in which both groups of dk and dv share 64 keys."""

    def __post_init__(self) -> None:
        if self.stages < 2:
            raise ValueError(f"stages={self.stages}: a group would wait for ever for the next tile; take at least 2")


@dataclass(frozen=True, kw_only=True, slots=True)
class Rings:
    """The buffers of the three kernels.  `full_`: without a window."""

    forward: RingConfig
    full_forward: RingConfig
    dq: RingConfig
    full_dq: RingConfig
    full_dkdv: RingConfig


_SMALL = Rings(
    forward=RingConfig(block=64, held_stages=1, stages=5),
    full_forward=RingConfig(groups=3, block=64, held_stages=2, stages=3),
    dq=RingConfig(block=64, held_stages=1, stages=4),
    full_dq=RingConfig(block=64, held_stages=1, stages=4),
    full_dkdv=RingConfig(block=64, held_stages=1, stages=4),
)
RINGS = {
    64: _SMALL,
    128: _SMALL,
    256: Rings(
        forward=RingConfig(block=64, held_stages=1, stages=2),
        full_forward=RingConfig(block=64, held_stages=1, stages=2),
        dq=RingConfig(block=32, held_stages=1, stages=2),
        full_dq=RingConfig(block=64, held_stages=1, stages=2, wide=True),
        full_dkdv=RingConfig(block=64, held_stages=1, stages=2, wide=True),
    ),
}
"""By the larger head size, padded to a power of two."""


def takes(*tensors: Tensor) -> bool:
    """Whether these kernels run on q, k, v (and dout): a Hopper GPU, 16 bits, sizes that fit, aligned for TMA."""
    q = tensors[0]
    return (
        is_hopper(q.device)
        and q.dtype != torch.float32
        and all(pad_size(x.shape[2]) in RINGS for x in tensors)
        and tma_aligned(*tensors)
    )


def forward(q_RHK: Tensor, k_THK: Tensor, v_THV: Tensor, plan: AttentionPlan, biases: None = None) -> Tensor:
    """Attention output [R, H, V] in v's dtype; accumulates in float32.  There are no `biases` here."""
    out = torch.empty((q_RHK.shape[0], *v_THV.shape[1:]), dtype=v_THV.dtype, device=v_THV.device)
    if out.numel() == 0:
        return out
    rings = RINGS[block_size(q_RHK, v_THV)]
    ring = rings.full_forward if plan.mask.local is None else rings.forward
    block = ring.groups * _GROUP
    rows, _ = schedules(plan, _shape(q_RHK, k_THK, v_THV), row_block=block, key_block=None)
    assert rows is not None
    launch(
        hopper_forward_kernel,
        _grid(rows, q_RHK),
        *(_rows(q_RHK, _GROUP), _rows(k_THK, ring.block), _rows(v_THV, ring.block)),
        *(out, rows.table, rows.counters, partials(rows, block, v_THV), rows.arrivals, q_RHK.shape[1]),
        *(plan.scale_of(q_RHK) / 2, 1 / plan.max_len),
        *out.stride()[:2],
        V=v_THV.shape[2],
        GROUPS=ring.groups,
        HAS_LOCAL=plan.mask.local is not None,
        SPLIT=rows.split_items > 0,
        **_options(plan, ring),
    )
    return out


def backward(call: Backward, *, sums: bool) -> tuple[Tensor, ...] | None:
    """`portable.launchers.backward`.

    With a window, keys have few rows and two results each to store: there the portable kernel is faster.
    """
    plan, size = call.plan, block_size(call.q, call.v)
    rings = RINGS[size]
    tile = None if plan.mask.local is None else choose_config(plan.mask, call.q.dtype, size).dkdv
    row_ring = rings.full_dq if plan.mask.local is None else rings.dq
    key_ring = rings.full_dkdv
    key_block = tile.keys if tile is not None else _GROUP if key_ring.wide else _HELD
    rows, keys = schedules(plan, _shape(call.q, call.k, call.v), row_block=_HELD, key_block=key_block)
    assert rows is not None and keys is not None
    # Sums a tile: the portable kernel adds up all keys, ours a warp's, four a group that holds its own; rows a group's,
    # or with large heads a warp's.
    row_groups = 8 if row_ring.wide else 2
    key_groups = 1 if tile is not None else 4 if key_ring.wide else 8
    total = (
        tile_sums.allocate(rows, keys, call.gradients, row_groups=row_groups, key_groups=key_groups) if sums else None
    )
    q_sums, k_sums, v_sums = total or (None, None, None)
    if tile is not None:
        portable.backward_keys(call, (k_sums, v_sums), keys, tile)
    else:
        backward_keys(call, (k_sums, v_sums), keys, key_ring)
    backward_rows(call, q_sums, rows, row_ring)
    return total and tile_sums.add(rows, keys, total, call.gradients)


def backward_keys(call: Backward, sums: tuple[Tensor | None, Tensor | None], keys: Schedule, ring: RingConfig) -> None:
    """Gradients of k and v, without a window."""
    q, k, v, dk, dv = call.q, call.k, call.v, call.dk, call.dv
    scale, max_len = call.plan.scale_of(q), call.plan.max_len
    launch(
        hopper_dkdv_kernel,
        _grid(keys, q),
        *(_rows(call.dout, ring.block), _rows(q, ring.block), _rows(k, _GROUP), _rows(v, _GROUP)),
        *(dk, dv, *sums, keys.table, keys.counters, q.shape[1]),
        *(scale / 2, scale / (2 * max_len), 1 / max_len),
        *dk.stride()[:2],
        *dv.stride()[:2],
        K=q.shape[2],
        V=v.shape[2],
        SCALED=call.scaled,
        WIDE=ring.wide,
        **_options(call.plan, ring),
    )


def backward_rows(call: Backward, sums: Tensor | None, rows: Schedule, ring: RingConfig) -> None:
    """Gradient of q."""
    q, k, v, dq = call.q, call.k, call.v, call.dq
    scale = call.plan.scale_of(q)
    launch(
        hopper_dq_kernel,
        _grid(rows, q),
        *(_rows(call.dout, _GROUP), _rows(q, _GROUP), _rows(k, ring.block), _rows(v, ring.block)),
        *(dq, sums, rows.table, rows.counters, partials(rows, _HELD, q), rows.arrivals, q.shape[1]),
        *(scale / 2, scale / (2 * call.plan.max_len)),
        *dq.stride()[:2],
        K=q.shape[2],
        HAS_LOCAL=call.plan.mask.local is not None,
        SPLIT=rows.split_items > 0,
        SCALED=call.scaled,
        WIDE=ring.wide,
        **_options(call.plan, ring),
    )


def _shape(q: Tensor, k: Tensor, v: Tensor) -> Shape:
    """Long tiles in as many parts, over all heads, as every other program: each part costs a sum to write and read."""
    return shape_of(q, k, v, multiprocessors(q.device) // 2)


def _grid(schedule: Schedule, q: Tensor) -> tuple[int]:
    return (min(multiprocessors(q.device), schedule.max_items * q.shape[1]),)


def _options(plan: AttentionPlan, ring: RingConfig) -> dict[str, Any]:
    """Compile-time arguments that the three kernels share."""
    return {
        "HAS_TARGETS": plan.num_targets is not None,
        "HELD_STAGES": ring.held_stages,
        "STAGES": ring.stages,
        "num_warps": 4,
        "maxnreg": thread_registers(ring.groups),
    }


def _rows(x: Tensor, block: int) -> Blocks:
    """`head_rows` for a Gluon kernel."""
    return head_rows(x, block, block_layout(block, pad_size(x.shape[2]), x.dtype))
