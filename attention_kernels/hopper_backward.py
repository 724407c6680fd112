"""Backward kernels for Hopper GPUs: dq over two groups of 64 query rows, dk and dv over two groups of 64 keys.

Two kernels for the reason given in `backward.py`, which defines what they compute on any GPU.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import warpgroup_mma, warpgroup_mma_wait

from attention_kernels.hopper_groups import (
    left_operand,
    score_slopes,
    start_products,
    store_group,
    weights_and_slopes,
    zero_sum,
)
from attention_kernels.hopper_tiles import (
    load_held_tiles,
    load_partner_tiles,
    make_held_rings,
    make_order,
    make_ring,
    next_number,
    partners_of_group,
    pass_by,
    release,
    wait_block,
)
from attention_kernels.hopper_wide import compute_wide_dkdv, make_exchange, sum_wide_dq
from attention_kernels.tiles import load_item, partner_start


@gluon.jit
def sum_dq(
    b_q, b_dout, k_ring, v_ring, i_use, lo, begin, end, row, partners, bounds, half_scale,
    HAS_LOCAL: gl.constexpr, HAS_TARGETS: gl.constexpr,
):  # fmt: skip
    """A group's sum over the tiles begin..end-1 of those that stream past from lo on, the i_use-th fillings.

    The scores of the next tile are multiplied before the sum of this one.
    """
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
def compute_dq(
    work, GROUP: gl.constexpr, K: gl.constexpr, BLOCK_N: gl.constexpr,
    HAS_LOCAL: gl.constexpr, HAS_TARGETS: gl.constexpr, SPLIT: gl.constexpr, SCALED: gl.constexpr, WIDE: gl.constexpr,
):  # fmt: skip
    """A group: its rows of every item of this program."""
    rings, order, output, table, H, half_scale, dq_scale = work
    held_rings, k_ring, v_ring = rings
    q_ring, dout_ring = held_rings[GROUP]
    dq, sums, stride_dt, stride_dh, partials, counters = output
    num_items = gl.load(table) * H
    number = gl.program_id(0)
    i_item = 0
    i_use = 0
    while number < num_items:
        i_h = number % H
        start, bounds, first, last, part, parts, home = load_item(table, number // H)
        row, partners, lo, begin, end, hi = partners_of_group(
            first, last, part, parts, bounds, GROUP, BLOCK_N, True, HAS_LOCAL, SPLIT
        )
        pass_by((k_ring, v_ring), i_use, i_use + begin - lo)
        b_q = wait_block(q_ring, i_item)
        b_dout = wait_block(dout_ring, i_item)
        if WIDE:
            b_dq = sum_wide_dq(
                b_q, b_dout, k_ring, v_ring, i_use, lo, begin, end, row, partners, bounds, half_scale,
                HAS_LOCAL, HAS_TARGETS,
            )  # fmt: skip
        else:
            b_dq = sum_dq(
                b_q, b_dout, k_ring, v_ring, i_use, lo, begin, end, row, partners, bounds, half_scale,
                HAS_LOCAL, HAS_TARGETS,
            )  # fmt: skip
        release(q_ring, i_item)
        if not WIDE:
            release(dout_ring, i_item)
        pass_by((k_ring, v_ring), i_use + end - lo, i_use + hi - lo)
        i_use += hi - lo
        store_group(
            dq, b_dq * dq_scale, sums, stride_dt, stride_dh, i_h, H, start, row, last, part, parts, home,
            partials, counters, GROUP, K, SPLIT, SCALED, SUMS=4 if WIDE else 1, buffer=b_dout if WIDE else None,
        )  # fmt: skip
        if WIDE:
            # It lent its buffer, as the next item needs it later than its queries.
            release(dout_ring, i_item)
        number = next_number(order, i_item)
        i_item += 1


@gluon.jit(do_not_specialize=["H", "half_scale", "dq_scale"])
def hopper_dq_kernel(
    dout, q, k, v, dq, sums, table, partials, counters, H, half_scale, dq_scale, stride_dt, stride_dh, K: gl.constexpr,
    HAS_LOCAL: gl.constexpr, HAS_TARGETS: gl.constexpr, SPLIT: gl.constexpr, SCALED: gl.constexpr,
    WIDE: gl.constexpr, HELD_STAGES: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """dq[q] = dq_scale sum_k 2 silu'(score) <dout[q], v[k]> k[k].  Grid: one program a processor.

    WIDE: head sizes over 128, without a window (`hopper_wide.py`).
    """
    BLOCK_N: gl.constexpr = k.block_shape[1]
    held_rings = make_held_rings(q, dout, HELD_STAGES)
    k_ring = make_ring(k, STAGES, 2)
    v_ring = make_ring(v, 1 if WIDE else STAGES, 2)
    rings = (held_rings, k_ring, v_ring)
    order = make_order()
    output = (dq, sums, stride_dt, stride_dh, partials, counters)
    work = (rings, order, output, table, H, half_scale, dq_scale)
    gl.warp_specialize(
        [
            (compute_dq, (work, 0, K, BLOCK_N, HAS_LOCAL, HAS_TARGETS, SPLIT, SCALED, WIDE)),
            (compute_dq, (work, 1, K, BLOCK_N, HAS_LOCAL, HAS_TARGETS, SPLIT, SCALED, WIDE)),
            (load_partner_tiles, ((k, v), (k_ring, v_ring), order, table, H, BLOCK_N, True, HAS_LOCAL, SPLIT)),
            (load_held_tiles, ((q, dout), held_rings, order, table, H)),
        ],
        [4, 1, 1],
        [240, 24, 24],
    )


@gluon.jit
def compute_dkdv(
    work, GROUP: gl.constexpr, K: gl.constexpr, V: gl.constexpr, BLOCK_M: gl.constexpr,
    HAS_LOCAL: gl.constexpr, HAS_TARGETS: gl.constexpr, SPLIT: gl.constexpr, SCALED: gl.constexpr,
):  # fmt: skip
    """A group: its keys of every item of this program.  Scores are transposed, keys by rows."""
    rings, order, output, table, H, half_scale, dk_scale, dv_scale = work
    held_rings, q_ring, dout_ring = rings
    k_ring, v_ring = held_rings[GROUP]
    dk, dv, k_sums, v_sums, strides, k_partials, v_partials, k_counters, v_counters = output
    stride_dkt, stride_dkh, stride_dvt, stride_dvh = strides
    num_items = gl.load(table) * H
    number = gl.program_id(0)
    i_item = 0
    i_use = 0
    while number < num_items:
        i_h = number % H
        start, bounds, first, last, part, parts, home = load_item(table, number // H)
        key, partners, lo, begin, end, hi = partners_of_group(
            first, last, part, parts, bounds, GROUP, BLOCK_M, False, HAS_LOCAL, SPLIT
        )
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
            b_weight, b_slope = weights_and_slopes(b_score, half_scale, row, key, bounds, True, HAS_LOCAL, HAS_TARGETS)
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
        i_use += hi - lo
        store_group(
            dv, b_dv * dv_scale, v_sums, stride_dvt, stride_dvh, i_h, H, start, key, last, part, parts, home,
            v_partials, v_counters, GROUP, V, SPLIT, SCALED, SUMS=4,
        )  # fmt: skip
        store_group(
            dk, b_dk * dk_scale, k_sums, stride_dkt, stride_dkh, i_h, H, start, key, last, part, parts, home,
            k_partials, k_counters, GROUP, K, SPLIT, SCALED, SUMS=4,
        )  # fmt: skip
        number = next_number(order, i_item)
        i_item += 1


@gluon.jit(do_not_specialize=["H", "half_scale", "dk_scale", "dv_scale"])
def hopper_dkdv_kernel(
    dout, q, k, v, dk, dv, k_sums, v_sums, table, k_partials, v_partials, k_counters, v_counters,
    H, half_scale, dk_scale, dv_scale,
    stride_dkt, stride_dkh, stride_dvt, stride_dvh, K: gl.constexpr, V: gl.constexpr,
    HAS_LOCAL: gl.constexpr, HAS_TARGETS: gl.constexpr, SPLIT: gl.constexpr, SCALED: gl.constexpr,
    WIDE: gl.constexpr, HELD_STAGES: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """dv[k] = dv_scale sum_q silu(score) dout[q], dk[k] likewise.  Grid: one program a processor.

    WIDE: head sizes over 128 (`hopper_wide.py`).
    """
    BLOCK_M: gl.constexpr = q.block_shape[1]
    if WIDE:
        # Both groups share the keys: the first multiplies by k, the second by v.
        held_rings = ((make_ring(k, HELD_STAGES, 1), make_ring(v, HELD_STAGES, 1)),)
    else:
        held_rings = make_held_rings(k, v, HELD_STAGES)
    q_ring = make_ring(q, STAGES, 2)
    dout_ring = make_ring(dout, STAGES, 2)
    rings = (held_rings, q_ring, dout_ring)
    if WIDE:
        exchange = make_exchange(BLOCK_M)
        rings = (held_rings, q_ring, dout_ring, exchange)  # type: ignore[assignment]  # decided at compile time
    order = make_order()
    strides = (stride_dkt, stride_dkh, stride_dvt, stride_dvh)
    output = (dk, dv, k_sums, v_sums, strides, k_partials, v_partials, k_counters, v_counters)
    work = (rings, order, output, table, H, half_scale, dk_scale, dv_scale)
    gl.warp_specialize(
        [
            (
                compute_wide_dkdv if WIDE else compute_dkdv,
                (work, 0, K, V, BLOCK_M, HAS_LOCAL, HAS_TARGETS, SPLIT, SCALED),
            ),
            (
                compute_wide_dkdv if WIDE else compute_dkdv,
                (work, 1, K, V, BLOCK_M, HAS_LOCAL, HAS_TARGETS, SPLIT, SCALED),
            ),
            (load_partner_tiles, ((q, dout), (q_ring, dout_ring), order, table, H, BLOCK_M, False, HAS_LOCAL, SPLIT)),
            (load_held_tiles, ((k, v), held_rings, order, table, H)),
        ],
        [4, 1, 1],
        [240, 24, 24],
    )
