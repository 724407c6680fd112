"""Backward kernels for Hopper GPUs: dq over two groups of 64 query rows, dk and dv over two groups of 64 keys.

Two kernels for the reason given in `portable/backward.py`, which defines what they compute on any GPU.  That of dk and
dv runs without a window only: with one, the portable kernel is faster.
"""

from typing import Any, NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import warpgroup_mma, warpgroup_mma_wait

from attention_kernels.attention.hopper.groups import (
    left_operand,
    score_slopes,
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
    make_held_rings,
    make_queue,
    make_ring,
    pass_by,
    release,
    wait_block,
    walk_of_group,
)
from attention_kernels.attention.hopper.wide import make_exchange, sum_wide_dq, wide_dkdv_group
from attention_kernels.attention.tiles import Output, partner_start


class RowWork(NamedTuple):
    """What the groups of dq share."""

    held_rings: Any
    """For each group its rings of queries and of the output's gradients."""
    k_ring: Ring
    v_ring: Ring
    dq: Output
    H: gl.tensor
    half_scale: gl.tensor
    dq_scale: gl.tensor


class KeyWork(NamedTuple):
    """What the groups of dk and dv share."""

    held_rings: Any
    """For each group its rings of keys and of values; with large heads one pair for both."""
    q_ring: Ring
    dout_ring: Ring
    exchange: Ring
    """With large heads, slopes on their way from one group to the other; else None."""
    dk: Output
    dv: Output
    H: gl.tensor
    half_scale: gl.tensor
    dk_scale: gl.tensor
    dv_scale: gl.tensor


@gluon.jit
def sum_dq(
    b_q, b_dout, k_ring, v_ring, i_use, walk, bounds, half_scale,
    HAS_LOCAL: gl.constexpr, HAS_TARGETS: gl.constexpr,
):  # fmt: skip
    """A group's sum over the tiles that it needs; the first that streams past is the i_use-th filling.

    The scores of the next tile are multiplied before the sum of this one.
    """
    row, partners, lo, begin, end, _ = walk
    BLOCK_N: gl.constexpr = k_ring.buffers.shape[2]
    b_dq = zero_sum(k_ring.buffers.shape[3])
    if begin < end:
        i_tile = i_use + begin - lo
        b_score = start_products(b_q, wait_block(k_ring, i_tile))
        b_dweight = start_products(b_dout, wait_block(v_ring, i_tile))
        b_score, b_dweight = warpgroup_mma_wait(0, deps=(b_score, b_dweight))
        release(v_ring, i_tile)
        key = partner_start(begin, partners, BLOCK_N)
        b_dscore = score_slopes(b_score, b_dweight, k_ring, half_scale, row, key, bounds, HAS_LOCAL, HAS_TARGETS)
        for j in range(begin + 1, end):
            i_tile = i_use + j - lo
            key = partner_start(j, partners, BLOCK_N)
            b_score = start_products(b_q, wait_block(k_ring, i_tile))
            b_dweight = start_products(b_dout, wait_block(v_ring, i_tile))
            b_before = wait_block(k_ring, i_tile - 1)
            b_dq = warpgroup_mma(b_dscore, b_before, b_dq, is_async=True)
            b_score, b_dweight = warpgroup_mma_wait(1, deps=(b_score, b_dweight))
            release(v_ring, i_tile)
            b_next = score_slopes(b_score, b_dweight, k_ring, half_scale, row, key, bounds, HAS_LOCAL, HAS_TARGETS)
            # The sum's left operand stays in its registers until the sum is done.
            b_dq, b_dscore = warpgroup_mma_wait(0, deps=(b_dq, b_dscore))
            release(k_ring, i_tile - 1)
            b_dscore = b_next
        i_tile = i_use + end - 1 - lo
        b_k = wait_block(k_ring, i_tile)
        b_dq = warpgroup_mma(b_dscore, b_k, b_dq, is_async=True)
        b_dq = warpgroup_mma_wait(0, deps=(b_dq,))
        release(k_ring, i_tile)
    return b_dq


@gluon.jit
def dq_group(
    item, i_h, i_item, i_use, work, GROUP: gl.constexpr, K: gl.constexpr, BLOCK_N: gl.constexpr,
    HAS_LOCAL: gl.constexpr, HAS_TARGETS: gl.constexpr, SPLIT: gl.constexpr, SCALED: gl.constexpr, WIDE: gl.constexpr,
):  # fmt: skip
    """A group: its rows of an item."""
    held_rings, k_ring, v_ring, dq, H, half_scale, dq_scale = work
    q_ring, dout_ring = held_rings[GROUP]
    walk = walk_of_group(item, GROUP, BLOCK_N, True, HAS_LOCAL, SPLIT)
    pass_by((k_ring, v_ring), i_use, i_use + walk.begin - walk.lo)
    b_q = wait_block(q_ring, i_item)
    b_dout = wait_block(dout_ring, i_item)
    if WIDE:
        b_dq = sum_wide_dq(b_q, b_dout, k_ring, v_ring, i_use, walk, item.bounds, half_scale, HAS_TARGETS)
    else:
        b_dq = sum_dq(b_q, b_dout, k_ring, v_ring, i_use, walk, item.bounds, half_scale, HAS_LOCAL, HAS_TARGETS)
    release(q_ring, i_item)
    if not WIDE:
        release(dout_ring, i_item)
    pass_by((k_ring, v_ring), i_use + walk.end - walk.lo, i_use + walk.hi - walk.lo)
    store_group(
        dq, b_dq * dq_scale, item.row_start, walk.own, item, i_h, H,
        GROUP, K, SPLIT, SCALED, SUMS=4 if WIDE else 1, buffer=b_dout if WIDE else None,
    )  # fmt: skip
    if WIDE:
        # It lent its buffer, as the next item needs it later than its queries.
        release(dout_ring, i_item)
    return i_use + walk.hi - walk.lo


@gluon.jit
def compute_dq(
    queue, work, GROUP: gl.constexpr, K: gl.constexpr, BLOCK_N: gl.constexpr,
    HAS_LOCAL: gl.constexpr, HAS_TARGETS: gl.constexpr, SPLIT: gl.constexpr, SCALED: gl.constexpr, WIDE: gl.constexpr,
):  # fmt: skip
    """`dq_group` of all items."""
    each_item(queue, dq_group, (work, GROUP, K, BLOCK_N, HAS_LOCAL, HAS_TARGETS, SPLIT, SCALED, WIDE))


@gluon.jit(do_not_specialize=["H", "half_scale", "dq_scale"])
def hopper_dq_kernel(
    dout, q, k, v, dq, sums, table, counters, partials, arrivals, H, half_scale, dq_scale, stride_dt, stride_dh,
    K: gl.constexpr, HAS_LOCAL: gl.constexpr, HAS_TARGETS: gl.constexpr, SPLIT: gl.constexpr, SCALED: gl.constexpr,
    WIDE: gl.constexpr, HELD_STAGES: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """dq[q] = dq_scale sum_k 2 silu'(score) <dout[q], v[k]> k[k].  Grid: one program a processor.

    WIDE: head sizes over 128, without a window (`wide.py`).
    """
    BLOCK_N: gl.constexpr = k.block_shape[1]
    held_rings = make_held_rings(q, dout, HELD_STAGES)
    k_ring = make_ring(k, STAGES, 2)
    v_ring = make_ring(v, 1 if WIDE else STAGES, 2)
    queue = make_queue(table, counters, H)
    output = Output(dq, stride_dt, stride_dh, sums, partials, arrivals)
    work = RowWork(held_rings, k_ring, v_ring, output, H, half_scale, dq_scale)
    gl.warp_specialize(
        [
            (compute_dq, (queue, work, 0, K, BLOCK_N, HAS_LOCAL, HAS_TARGETS, SPLIT, SCALED, WIDE)),
            (compute_dq, (queue, work, 1, K, BLOCK_N, HAS_LOCAL, HAS_TARGETS, SPLIT, SCALED, WIDE)),
            (load_partner_tiles, (queue, (k, v), (k_ring, v_ring), BLOCK_N, True, HAS_LOCAL, SPLIT)),
            (load_held_tiles, (queue, (q, dout), held_rings, True)),
        ],
        [4, 1, 1],
        [240, 24, 24],
    )


@gluon.jit
def dkdv_group(
    item, i_h, i_item, i_use, work, GROUP: gl.constexpr, K: gl.constexpr, V: gl.constexpr, BLOCK_M: gl.constexpr,
    HAS_TARGETS: gl.constexpr, SCALED: gl.constexpr,
):  # fmt: skip
    """A group: its keys of an item.  Scores are transposed, keys by rows."""
    held_rings, q_ring, dout_ring, _, dk, dv, H, half_scale, dk_scale, dv_scale = work
    k_ring, v_ring = held_rings[GROUP]
    walk = walk_of_group(item, GROUP, BLOCK_M, False, False, False)
    key, partners, lo, begin, end, hi = walk
    pass_by((q_ring, dout_ring), i_use, i_use + begin - lo)
    b_k = wait_block(k_ring, i_item)
    b_v = wait_block(v_ring, i_item)
    b_dk = zero_sum(k_ring.buffers.shape[3])
    b_dv = zero_sum(v_ring.buffers.shape[3])
    for j in range(begin, end):
        i_tile = i_use + j - lo
        row = partner_start(j, partners, BLOCK_M)
        b_q = wait_block(q_ring, i_tile)
        b_score = start_products(b_k, b_q)
        b_dout = wait_block(dout_ring, i_tile)
        b_dweight = start_products(b_v, b_dout)
        b_score = warpgroup_mma_wait(1, deps=(b_score,))
        b_weight, b_slope = weights_and_slopes(b_score, half_scale, row, key, item.bounds, True, False, HAS_TARGETS)
        b_w = left_operand(b_weight, dout_ring)
        b_dv = warpgroup_mma(b_w, b_dout, b_dv, is_async=True)
        b_dweight = warpgroup_mma_wait(1, deps=(b_dweight,))
        b_ds = left_operand(b_dweight * b_slope, q_ring)
        b_dk = warpgroup_mma(b_ds, b_q, b_dk, is_async=True)
        b_dv, b_w = warpgroup_mma_wait(1, deps=(b_dv, b_w))
        release(dout_ring, i_tile)
        b_dk, b_ds = warpgroup_mma_wait(0, deps=(b_dk, b_ds))
        release(q_ring, i_tile)
    release(k_ring, i_item)
    release(v_ring, i_item)
    pass_by((q_ring, dout_ring), i_use + end - lo, i_use + hi - lo)
    store_group(dv, b_dv * dv_scale, item.start, key, item, i_h, H, GROUP, V, False, SCALED, SUMS=4)
    store_group(dk, b_dk * dk_scale, item.start, key, item, i_h, H, GROUP, K, False, SCALED, SUMS=4)
    return i_use + hi - lo


@gluon.jit
def compute_dkdv(
    queue, work, GROUP: gl.constexpr, K: gl.constexpr, V: gl.constexpr, BLOCK_M: gl.constexpr,
    HAS_TARGETS: gl.constexpr, SCALED: gl.constexpr, WIDE: gl.constexpr,
):  # fmt: skip
    """`dkdv_group` of all items, or `wide_dkdv_group`."""
    role: gl.constexpr = wide_dkdv_group if WIDE else dkdv_group
    each_item(queue, role, (work, GROUP, K, V, BLOCK_M, HAS_TARGETS, SCALED))


@gluon.jit(do_not_specialize=["H", "half_scale", "dk_scale", "dv_scale"])
def hopper_dkdv_kernel(
    dout, q, k, v, dk, dv, k_sums, v_sums, table, counters, H, half_scale, dk_scale, dv_scale,
    stride_dkt, stride_dkh, stride_dvt, stride_dvh, K: gl.constexpr, V: gl.constexpr,
    HAS_TARGETS: gl.constexpr, SCALED: gl.constexpr,
    WIDE: gl.constexpr, HELD_STAGES: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """dv[k] = dv_scale sum_q silu(score) dout[q], dk[k] likewise, without a window.  Grid: one program a processor.

    WIDE: head sizes over 128 (`wide.py`).
    """
    BLOCK_M: gl.constexpr = q.block_shape[1]
    if WIDE:
        # Both groups share the keys: the first multiplies by k, the second by v.
        held_rings = ((make_ring(k, HELD_STAGES, 1), make_ring(v, HELD_STAGES, 1)),)
        exchange = make_exchange(BLOCK_M)
    else:
        held_rings = make_held_rings(k, v, HELD_STAGES)
        exchange = None
    q_ring = make_ring(q, STAGES, 2)
    dout_ring = make_ring(dout, STAGES, 2)
    queue = make_queue(table, counters, H)
    outputs = (
        Output(dk, stride_dkt, stride_dkh, k_sums, None, None), Output(dv, stride_dvt, stride_dvh, v_sums, None, None)
    )  # fmt: skip
    work = KeyWork(held_rings, q_ring, dout_ring, exchange, outputs[0], outputs[1], H, half_scale, dk_scale, dv_scale)
    gl.warp_specialize(
        [
            (compute_dkdv, (queue, work, 0, K, V, BLOCK_M, HAS_TARGETS, SCALED, WIDE)),
            (compute_dkdv, (queue, work, 1, K, V, BLOCK_M, HAS_TARGETS, SCALED, WIDE)),
            (load_partner_tiles, (queue, (q, dout), (q_ring, dout_ring), BLOCK_M, False, False, False)),
            (load_held_tiles, (queue, (k, v), held_rings, False)),
        ],
        [4, 1, 1],
        [240, 24, 24],
    )
