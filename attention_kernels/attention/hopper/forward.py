"""Forward kernel for Hopper GPUs: two or three groups of 64 query rows over one stream of keys and values.

`portable/forward.py` defines what it computes on any GPU, `rings.py` says how the roles work together.
"""

from typing import Any, NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import warpgroup_mma, warpgroup_mma_wait

from attention_kernels.attention.hopper.groups import (
    left_operand,
    matrix_layout,
    start_products,
    store_group,
    weights_and_slopes,
    zero_sum,
)
from attention_kernels.attention.hopper.rings import (
    Ring,
    each_item,
    load_held_tiles,
    load_partner_tiles,
    make_queue,
    make_ring,
    pass_by,
    release,
    wait_block,
    walk_of_group,
)
from attention_kernels.attention.tiles import Output, partner_start


class ForwardWork(NamedTuple):
    """What the groups of the forward share."""

    q_rings: Any
    """For each group a tuple of one ring."""
    k_ring: Ring
    v_ring: Ring
    output: Output
    H: gl.tensor
    half_scale: gl.tensor
    out_scale: gl.tensor


@gluon.jit
def tile_weights(b_score, v_ring, half_scale, row, key, bounds, HAS_LOCAL: gl.constexpr, HAS_TARGETS: gl.constexpr):
    """silu of a group's scores, as the left operand of the weighted sum."""
    b_weight, _ = weights_and_slopes(b_score, half_scale, row, key, bounds, False, HAS_LOCAL, HAS_TARGETS)
    return left_operand(b_weight, v_ring)


@gluon.jit
def forward_group(
    item, i_h, i_item, i_use, work, GROUP: gl.constexpr, GROUPS: gl.constexpr, V: gl.constexpr, BLOCK_N: gl.constexpr,
    HAS_LOCAL: gl.constexpr, HAS_TARGETS: gl.constexpr, SPLIT: gl.constexpr,
):  # fmt: skip
    """A group: its rows of an item."""
    q_rings, k_ring, v_ring, output, H, half_scale, out_scale = work
    q_ring = q_rings[GROUP][0]
    # The next item's queries are loaded while this one's are in use, and the matrix unit reads half as much.
    IN_REGISTERS: gl.constexpr = GROUPS == 2 and q_ring.buffers.shape[3] <= 128
    bounds = item.bounds
    walk = walk_of_group(item, GROUP, BLOCK_N, True, HAS_LOCAL, SPLIT)
    row, partners, lo, begin, end, hi = walk
    pass_by((k_ring, v_ring), i_use, i_use + begin - lo)
    b_q = wait_block(q_ring, i_item)
    if IN_REGISTERS:
        b_q = b_q.load(gl.DotOperandLayout(0, matrix_layout(BLOCK_N), 2))
        release(q_ring, i_item)
    b_out = zero_sum(v_ring.buffers.shape[3])
    if begin < end:
        i_tile = i_use + begin - lo
        b_score = start_products(b_q, wait_block(k_ring, i_tile))
        b_score = warpgroup_mma_wait(0, deps=(b_score,))
        release(k_ring, i_tile)
        key = partner_start(begin, partners, BLOCK_N)
        b_weight = tile_weights(b_score, v_ring, half_scale, row, key, bounds, HAS_LOCAL, HAS_TARGETS)
        for j in range(begin + 1, end):
            i_tile = i_use + j - lo
            key = partner_start(j, partners, BLOCK_N)
            b_score = start_products(b_q, wait_block(k_ring, i_tile))
            b_v = wait_block(v_ring, i_tile - 1)
            b_out = warpgroup_mma(b_weight, b_v, b_out, is_async=True)
            b_score = warpgroup_mma_wait(1, deps=(b_score,))
            release(k_ring, i_tile)
            b_next = tile_weights(b_score, v_ring, half_scale, row, key, bounds, HAS_LOCAL, HAS_TARGETS)
            # The sum's left operand stays in its registers until the sum is done.
            b_out, b_weight = warpgroup_mma_wait(0, deps=(b_out, b_weight))
            release(v_ring, i_tile - 1)
            b_weight = b_next
        i_tile = i_use + end - 1 - lo
        b_v = wait_block(v_ring, i_tile)
        b_out = warpgroup_mma(b_weight, b_v, b_out, is_async=True)
        b_out = warpgroup_mma_wait(0, deps=(b_out,))
        release(v_ring, i_tile)
    if not IN_REGISTERS:
        release(q_ring, i_item)
    pass_by((k_ring, v_ring), i_use + end - lo, i_use + hi - lo)
    store_group(output, b_out * out_scale, item.row_start, row, item, i_h, H, GROUP, V, SPLIT, False, GROUPS)
    return i_use + hi - lo


@gluon.jit
def forward_role(
    queue, work, descriptors, ROLE: gl.constexpr, GROUPS: gl.constexpr, V: gl.constexpr, BLOCK_N: gl.constexpr,
    HAS_LOCAL: gl.constexpr, HAS_TARGETS: gl.constexpr, SPLIT: gl.constexpr,
):  # fmt: skip
    """One of the groups, or behind them the loader of keys and values, or that of queries."""
    q, k, v = descriptors
    if ROLE < GROUPS:
        each_item(queue, forward_group, (work, ROLE, GROUPS, V, BLOCK_N, HAS_LOCAL, HAS_TARGETS, SPLIT))
    elif ROLE == GROUPS:
        load_partner_tiles(queue, (k, v), (work.k_ring, work.v_ring), BLOCK_N, True, HAS_LOCAL, SPLIT)
    else:
        load_held_tiles(queue, (q,), work.q_rings, True)


@gluon.jit(do_not_specialize=["H", "half_scale", "out_scale"])
def hopper_forward_kernel(
    q, k, v, out, table, counters, partials, arrivals, H, half_scale, out_scale, stride_ot, stride_oh,
    V: gl.constexpr, HAS_LOCAL: gl.constexpr, HAS_TARGETS: gl.constexpr, SPLIT: gl.constexpr,
    GROUPS: gl.constexpr, HELD_STAGES: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """out[q] = out_scale sum_k silu(2 half_scale <q, k>) v[k], summed in float32.  Grid: one program a processor."""
    BLOCK_N: gl.constexpr = k.block_shape[1]
    q_rings = [(make_ring(q, HELD_STAGES, 1),) for _ in ((0, 1) if GROUPS == 2 else (0, 1, 2))]
    k_ring = make_ring(k, STAGES, GROUPS)
    v_ring = make_ring(v, STAGES, GROUPS)
    queue = make_queue(table, counters, H, GROUPS)
    output = Output(out, stride_ot, stride_oh, None, partials, arrivals)
    work = ForwardWork(q_rings, k_ring, v_ring, output, H, half_scale, out_scale)
    gl.warp_specialize(
        [
            (forward_role, (queue, work, (q, k, v), ROLE, GROUPS, V, BLOCK_N, HAS_LOCAL, HAS_TARGETS, SPLIT))
            for ROLE in ((0, 1, 2, 3) if GROUPS == 2 else (0, 1, 2, 3, 4))
        ],
        [4, 1, 1] if GROUPS == 2 else [4, 4, 1, 1],
        [240, 24, 24] if GROUPS == 2 else [160, 160, 24, 24],
    )
