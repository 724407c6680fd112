"""Launchers of the warp-specialised kernels, for what `takes` admits.  Validates nothing (see `interface.py`).

Grids are one program a multiprocessor; nothing waits for a length on the device.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from attention_kernels import tile_sums, triton_attention
from attention_kernels.hopper_backward import hopper_dkdv_kernel, hopper_dq_kernel
from attention_kernels.hopper_forward import hopper_forward_kernel
from attention_kernels.hopper_tiles import GROUP_SIZE, block_layout, thread_registers
from attention_kernels.launcher import Blocks, launch
from attention_kernels.mask import SemiLocalMask
from attention_kernels.rows import is_hopper, multiprocessors, pad_size
from attention_kernels.schedule import Schedule
from attention_kernels.triton_attention import block_size, build_schedule, head_rows, partials, tma_aligned
from attention_kernels.tuning import choose_config

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
    """Of the backward for large heads (`hopper_wide.py`), in which both groups of dk and dv share 64 keys."""

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


def forward(
    q_THK: Tensor,
    k_THK: Tensor,
    v_THV: Tensor,
    offsets: Tensor,
    mask: SemiLocalMask,
    *,
    num_targets: Tensor | None,
    scale: float,
    max_len: int,
) -> Tensor:
    """Attention output [T, H, V] in v's dtype; accumulates in float32."""
    out = torch.empty(v_THV.shape, dtype=v_THV.dtype, device=v_THV.device)
    if out.numel() == 0:
        return out
    rings = RINGS[block_size(q_THK, v_THV)]
    ring = rings.full_forward if mask.local is None else rings.forward
    rows = ring.groups * _GROUP
    plan, _ = build_schedule(mask, offsets, num_targets, q_THK, v_THV, rows, None, _split_programs(q_THK))
    assert plan is not None
    launch(
        hopper_forward_kernel,
        _grid(plan, q_THK),
        *(_rows(q_THK, _GROUP), _rows(k_THK, ring.block), _rows(v_THV, ring.block)),
        *(out, plan.table, partials(plan, q_THK, rows, v_THV), plan.counters, q_THK.shape[1], scale / 2, 1 / max_len),
        *out.stride()[:2],
        V=v_THV.shape[2],
        GROUPS=ring.groups,
        **_options(mask, plan, num_targets, ring),
    )
    return out


def backward(
    dout_THV: Tensor,
    q_THK: Tensor,
    k_THK: Tensor,
    v_THV: Tensor,
    offsets: Tensor,
    mask: SemiLocalMask,
    *,
    num_targets: Tensor | None,
    scale: float,
    max_len: int,
    out: tuple[Tensor, Tensor, Tensor],
    scaled: bool = False,
    sums: bool = False,
) -> tuple[Tensor, ...] | None:
    """`triton_attention.backward`.

    With a window, keys have few rows and two results each to store: there the portable kernel is faster.
    """
    dq, dk, dv = out
    size = block_size(q_THK, v_THV)
    rings = RINGS[size]
    portable = None if mask.local is None else choose_config(mask, q_THK.dtype, size).dkdv
    row_ring = rings.full_dq if mask.local is None else rings.dq
    key_ring = rings.full_dkdv
    key_block = portable.keys if portable is not None else _GROUP if key_ring.wide else _HELD
    rows, keys = build_schedule(mask, offsets, num_targets, q_THK, v_THV, _HELD, key_block, _split_programs(q_THK))
    assert rows is not None and keys is not None
    inputs = (dout_THV, q_THK, k_THK, v_THV)
    options: dict[str, Any] = {"scale": scale, "max_len": max_len, "scaled": scaled}
    # Sums a tile: the portable kernel adds up all keys, ours a warp's, four a group that holds its own; rows a group's,
    # or with large heads a warp's.
    row_groups = 8 if row_ring.wide else 2
    key_groups = 1 if portable is not None else 4 if key_ring.wide else 8
    total = tile_sums.allocate(rows, keys, out, row_groups=row_groups, key_groups=key_groups) if sums else None
    q_sums, k_sums, v_sums = total or (None, None, None)
    key_arguments = (inputs, (dk, dv), (k_sums, v_sums), mask, num_targets, keys)
    if portable is None:
        backward_keys(*key_arguments, key_ring, **options)
    else:
        triton_attention.backward_keys(*key_arguments, portable, **options)
    backward_rows(inputs, dq, q_sums, mask, num_targets, rows, row_ring, **options)
    return total and tile_sums.add(rows, keys, total, out)


def backward_keys(
    inputs: tuple[Tensor, Tensor, Tensor, Tensor],
    out: tuple[Tensor, Tensor],
    sums: tuple[Tensor | None, Tensor | None],
    mask: SemiLocalMask,
    num_targets: Tensor | None,
    plan: Schedule,
    ring: RingConfig,
    *,
    scale: float,
    max_len: int,
    scaled: bool,
) -> None:
    """Gradients of k and v from (dout, q, k, v)."""
    dout, q, k, v = inputs
    dk, dv = out
    heads = q.shape[1]
    launch(
        hopper_dkdv_kernel,
        _grid(plan, q),
        *(_rows(dout, ring.block), _rows(q, ring.block), _rows(k, _GROUP), _rows(v, _GROUP)),
        *(dk, dv, *sums, plan.table, partials(plan, q, _HELD, q), partials(plan, q, _HELD, v)),
        *(plan.counters, plan.counters[2 * plan.split_items * heads :], heads),
        *(scale / 2, scale / (2 * max_len), 1 / max_len),
        *dk.stride()[:2],
        *dv.stride()[:2],
        K=q.shape[2],
        V=v.shape[2],
        SCALED=scaled,
        WIDE=ring.wide,
        **_options(mask, plan, num_targets, ring),
    )


def backward_rows(
    inputs: tuple[Tensor, Tensor, Tensor, Tensor],
    dq: Tensor,
    sums: Tensor | None,
    mask: SemiLocalMask,
    num_targets: Tensor | None,
    plan: Schedule,
    ring: RingConfig,
    *,
    scale: float,
    max_len: int,
    scaled: bool,
) -> None:
    """Gradient of q from (dout, q, k, v)."""
    dout, q, k, v = inputs
    launch(
        hopper_dq_kernel,
        _grid(plan, q),
        *(_rows(dout, _GROUP), _rows(q, _GROUP), _rows(k, ring.block), _rows(v, ring.block)),
        *(
            dq,
            sums,
            plan.table,
            partials(plan, q, _HELD, q),
            plan.counters,
            q.shape[1],
            scale / 2,
            scale / (2 * max_len),
        ),
        *dq.stride()[:2],
        K=q.shape[2],
        SCALED=scaled,
        WIDE=ring.wide,
        **_options(mask, plan, num_targets, ring),
    )


def _split_programs(q: Tensor) -> int:
    """Parts of long tiles, over all heads: one for every other program, as each part costs a sum to write and read."""
    return multiprocessors(q.device) // 2


def _grid(plan: Schedule, q: Tensor) -> tuple[int]:
    return (min(multiprocessors(q.device), plan.max_items * q.shape[1]),)


def _options(mask: SemiLocalMask, plan: Schedule, num_targets: Tensor | None, ring: RingConfig) -> dict[str, Any]:
    """Compile-time arguments that the three kernels share."""
    return {
        "HAS_LOCAL": mask.local is not None,
        "HAS_TARGETS": num_targets is not None,
        "SPLIT": plan.split_items > 0,
        "HELD_STAGES": ring.held_stages,
        "STAGES": ring.stages,
        "num_warps": 4,
        "maxnreg": thread_registers(ring.groups),
    }


def _rows(x: Tensor, block: int) -> Blocks:
    """`head_rows` for a Gluon kernel."""
    return head_rows(x, block, block_layout(block, pad_size(x.shape[2]), x.dtype))
