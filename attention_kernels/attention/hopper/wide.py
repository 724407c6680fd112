"""The backward for head sizes of 129 to 256 on Hopper, where a sum of 64 x 256 takes half of a group's registers.

dk and dv: both groups share 64 keys.  The first computes scores and sums dv, the second computes gradients of weights
and sums dk; all that passes between them is the slope of SiLU, through shared memory.

dq: groups hold 64 rows each, as for smaller heads, but a tile of 64 values has a single buffer, which is all the room
there is.  So its product comes as late and its release as early as can be: the next tile's scores are multiplied
behind this tile's sum, before the next values are waited for.

Neither runs with a window.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, warpgroup_mma, warpgroup_mma_wait

from attention_kernels.attention.hopper.groups import (
    left_operand,
    matrix_layout,
    score_slopes,
    start_products,
    store_group,
    weights_and_slopes,
    zero_sum,
)
from attention_kernels.attention.hopper.rings import (
    GROUP_SIZE,
    Ring,
    live_partners,
    make_barriers,
    release,
    wait_block,
    wait_empty,
)
from attention_kernels.attention.tiles import count_partners, partner_start

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
def wide_dkdv_group(
    item, i_h, i_item, i_use, work, GROUP: gl.constexpr, K: gl.constexpr, V: gl.constexpr, BLOCK_M: gl.constexpr,
    HAS_TARGETS: gl.constexpr, SCALED: gl.constexpr,
):  # fmt: skip
    """`backward.dkdv_group` where both groups hold the same keys."""
    held_rings, q_ring, dout_ring, exchange, dk, dv, H, half_scale, dk_scale, dv_scale = work
    k_ring, v_ring = held_rings[0]
    # What is held and multiplied by the one, and what the left operand is summed over.
    held_ring = k_ring if GROUP == 0 else v_ring
    summed_ring = dout_ring if GROUP == 0 else q_ring
    partners = live_partners(item, BLOCK_M, False, False)
    b_held = wait_block(held_ring, i_item)
    b_sum = zero_sum(summed_ring.buffers.shape[3])
    for j in range(0, count_partners(partners)):
        if GROUP == 0:
            row = partner_start(j, partners, BLOCK_M)
            b_score = start_products(b_held, wait_block(q_ring, i_use))
            b_score = warpgroup_mma_wait(0, deps=(b_score,))
            release(q_ring, i_use)
            b_weight, b_slope = weights_and_slopes(
                b_score, half_scale, row, item.first, item.bounds, True, False, HAS_TARGETS
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
    output = dv if GROUP == 0 else dk
    b_sum = b_sum * (dv_scale if GROUP == 0 else dk_scale)
    SIZE: gl.constexpr = V if GROUP == 0 else K
    store_group(
        output, b_sum, item.start, item.first, item, i_h, H, 0, SIZE, False, SCALED, GROUPS=1, SUMS=4, buffer=b_held
    )
    release(held_ring, i_item)
    return i_use


@gluon.jit
def wide_slopes(b_score, b_dout, k_ring, v_ring, i_tile, half_scale, row, key, bounds, HAS_TARGETS: gl.constexpr):
    """`score_slopes` of scores that are being multiplied; multiplies the gradients of weights, and frees the values."""
    b_dweight = start_products(b_dout, wait_block(v_ring, i_tile))
    b_score, b_dweight = warpgroup_mma_wait(0, deps=(b_score, b_dweight))
    release(v_ring, i_tile)
    return score_slopes(b_score, b_dweight, k_ring, half_scale, row, key, bounds, False, HAS_TARGETS)


@gluon.jit
def sum_wide_dq(b_q, b_dout, k_ring, v_ring, i_use, walk, bounds, half_scale, HAS_TARGETS: gl.constexpr):
    """`backward.sum_dq` with one buffer of values, which arrive while a tile is summed and the next scored."""
    row, partners, lo, begin, end, _ = walk
    BLOCK_N: gl.constexpr = k_ring.buffers.shape[2]
    b_dq = zero_sum(k_ring.buffers.shape[3])
    if begin < end:
        b_score = start_products(b_q, wait_block(k_ring, i_use + begin - lo))
        for j in range(begin, end - 1):
            i_tile = i_use + j - lo
            key = partner_start(j, partners, BLOCK_N)
            b_dscore = wide_slopes(b_score, b_dout, k_ring, v_ring, i_tile, half_scale, row, key, bounds, HAS_TARGETS)
            b_dq = warpgroup_mma(b_dscore, wait_block(k_ring, i_tile), b_dq, is_async=True)
            b_score = start_products(b_q, wait_block(k_ring, i_tile + 1))
            b_dq, b_dscore = warpgroup_mma_wait(1, deps=(b_dq, b_dscore))
            release(k_ring, i_tile)
        i_tile = i_use + end - 1 - lo
        key = partner_start(end - 1, partners, BLOCK_N)
        b_dscore = wide_slopes(b_score, b_dout, k_ring, v_ring, i_tile, half_scale, row, key, bounds, HAS_TARGETS)
        b_dq = warpgroup_mma(b_dscore, wait_block(k_ring, i_tile), b_dq, is_async=True)
        b_dq, b_dscore = warpgroup_mma_wait(0, deps=(b_dq, b_dscore))
        release(k_ring, i_tile)
    return b_dq
