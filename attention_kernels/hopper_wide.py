"""The backward for head sizes of 129 to 256 on Hopper, where a sum of 64 x 256 takes half of a group's registers.

dk and dv: both groups share 64 keys.  The first computes scores and sums dv, the second computes gradients of weights
and sums dk; all that passes between them is the slope of SiLU, through shared memory.

dq: groups hold 64 rows each, as for smaller heads, but a tile of 64 values has a single buffer, which is all the room
there is.  So its product comes as late and its release as early as can be: the next tile's scores are multiplied
behind this tile's sum, before the next values are waited for.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, warpgroup_mma, warpgroup_mma_wait

from attention_kernels.hopper_groups import (
    left_operand,
    matrix_layout,
    score_slopes,
    start_products,
    store_group,
    weights_and_slopes,
    zero_sum,
)
from attention_kernels.hopper_tiles import (
    GROUP_SIZE,
    Ring,
    make_barriers,
    next_number,
    release,
    wait_block,
    wait_empty,
)
from attention_kernels.tiles import live_rows, load_item, part_range, partner_start

_SLOPES = gl.constexpr(2)
"""Tiles of slopes between the groups: the first may be so many ahead."""


@gluon.jit
def make_exchange(BLOCK_M: gl.constexpr):
    """The ring of slopes that the first group hands to the second, [keys, rows] each."""
    LAYOUT: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=2 * BLOCK_M, element_bitwidth=16, rank=3)
    buffers = gl.allocate_shared_memory(gl.float16, [_SLOPES, 1, GROUP_SIZE, BLOCK_M], LAYOUT)
    full, empty = make_barriers(_SLOPES, 1)
    return Ring(buffers, full, empty)


@gluon.jit
def compute_wide_dkdv(
    work, GROUP: gl.constexpr, K: gl.constexpr, V: gl.constexpr, BLOCK_M: gl.constexpr,
    HAS_LOCAL: gl.constexpr, HAS_TARGETS: gl.constexpr, SPLIT: gl.constexpr, SCALED: gl.constexpr,
):  # fmt: skip
    """`hopper_backward.compute_dkdv` where both groups hold the same keys."""
    rings, order, output, table, H, half_scale, dk_scale, dv_scale = work
    held_rings, q_ring, dout_ring, exchange = rings
    k_ring, v_ring = held_rings[0]
    dk, dv, k_sums, v_sums, strides, k_partials, v_partials, k_counters, v_counters = output
    stride_dkt, stride_dkh, stride_dvt, stride_dvh = strides
    # What is held and multiplied by the one, and what the left operand is summed over.
    held_ring = k_ring if GROUP == 0 else v_ring
    summed_ring = dout_ring if GROUP == 0 else q_ring
    num_items = gl.load(table) * H
    number = gl.program_id(0)
    i_item = 0
    i_use = 0
    while number < num_items:
        i_h = number % H
        start, bounds, first, last, part, parts, home = load_item(table, number // H)
        partners = live_rows(first, last, bounds, BLOCK_M, HAS_LOCAL)
        lo, hi = part_range(partners, part, parts, SPLIT)
        b_held = wait_block(held_ring, i_item)
        b_sum = zero_sum(summed_ring.buffers.shape[3])
        for j in range(lo, hi):
            if GROUP == 0:
                row = partner_start(j, partners, BLOCK_M)
                b_score = start_products(b_held, wait_block(q_ring, i_use))
                b_score = warpgroup_mma_wait(0, deps=(b_score,))
                release(q_ring, i_use)
                b_weight, b_slope = weights_and_slopes(
                    b_score, half_scale, row, first, bounds, True, HAS_LOCAL, HAS_TARGETS
                )
                stage = wait_empty(exchange, i_use)
                exchange.buffers.index(stage).reshape([GROUP_SIZE, BLOCK_M]).store(b_slope.to(gl.float16))
                gl.thread_barrier()
                mbarrier.arrive(exchange.full.index(stage))
                b_left = left_operand(b_weight, summed_ring)
            else:
                b_dweight = start_products(b_held, wait_block(dout_ring, i_use))
                b_dweight = warpgroup_mma_wait(0, deps=(b_dweight,))
                release(dout_ring, i_use)
                b_slope = wait_block(exchange, i_use).load(matrix_layout(BLOCK_M))
                gl.thread_barrier()
                release(exchange, i_use)
                b_left = left_operand(b_dweight * b_slope.to(gl.float32), summed_ring)
            b_sum = warpgroup_mma(b_left, wait_block(summed_ring, i_use), b_sum, is_async=True)
            b_sum, b_left = warpgroup_mma_wait(0, deps=(b_sum, b_left))
            release(summed_ring, i_use)
            i_use += 1
        if GROUP == 0:
            store_group(
                dv, b_sum * dv_scale, v_sums, stride_dvt, stride_dvh, i_h, H, start, first, last, part, parts, home,
                v_partials, v_counters, 0, V, SPLIT, SCALED, GROUPS=1, SUMS=4, buffer=b_held,
            )  # fmt: skip
        else:
            store_group(
                dk, b_sum * dk_scale, k_sums, stride_dkt, stride_dkh, i_h, H, start, first, last, part, parts, home,
                k_partials, k_counters, 0, K, SPLIT, SCALED, GROUPS=1, SUMS=4, buffer=b_held,
            )  # fmt: skip
        release(held_ring, i_item)
        number = next_number(order, i_item)
        i_item += 1


@gluon.jit
def wide_slopes(
    b_score, b_dout, k_ring, v_ring, i_tile, half_scale, row, key, bounds,
    HAS_LOCAL: gl.constexpr, HAS_TARGETS: gl.constexpr,
):  # fmt: skip
    """`score_slopes` of scores that are being multiplied; multiplies the gradients of weights, and frees the values."""
    b_dweight = start_products(b_dout, wait_block(v_ring, i_tile))
    b_score, b_dweight = warpgroup_mma_wait(0, deps=(b_score, b_dweight))
    release(v_ring, i_tile)
    return score_slopes(b_score, b_dweight, k_ring, half_scale, row, key, bounds, HAS_LOCAL, HAS_TARGETS)


@gluon.jit
def sum_wide_dq(
    b_q, b_dout, k_ring, v_ring, i_use, lo, begin, end, row, partners, bounds, half_scale,
    HAS_LOCAL: gl.constexpr, HAS_TARGETS: gl.constexpr,
):  # fmt: skip
    """`hopper_backward.sum_dq` with one buffer of values, which arrive while a tile is summed and the next scored."""
    BLOCK_N: gl.constexpr = k_ring.buffers.shape[2]
    b_dq = zero_sum(k_ring.buffers.shape[3])
    if begin < end:
        b_score = start_products(b_q, wait_block(k_ring, i_use + begin - lo))
        for j in range(begin, end - 1):
            i_tile = i_use + j - lo
            key = partner_start(j, partners, BLOCK_N)
            b_dscore = wide_slopes(
                b_score, b_dout, k_ring, v_ring, i_tile, half_scale, row, key, bounds, HAS_LOCAL, HAS_TARGETS
            )
            b_dq = warpgroup_mma(b_dscore, wait_block(k_ring, i_tile), b_dq, is_async=True)
            b_score = start_products(b_q, wait_block(k_ring, i_tile + 1))
            b_dq, b_dscore = warpgroup_mma_wait(1, deps=(b_dq, b_dscore))
            release(k_ring, i_tile)
        i_tile = i_use + end - 1 - lo
        key = partner_start(end - 1, partners, BLOCK_N)
        b_dscore = wide_slopes(
            b_score, b_dout, k_ring, v_ring, i_tile, half_scale, row, key, bounds, HAS_LOCAL, HAS_TARGETS
        )
        b_dq = warpgroup_mma(b_dscore, wait_block(k_ring, i_tile), b_dq, is_async=True)
        b_dq, b_dscore = warpgroup_mma_wait(0, deps=(b_dq, b_dscore))
        release(k_ring, i_tile)
    return b_dq
