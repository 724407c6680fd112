"""Forward kernel for Hopper GPUs: groups of 64 query rows share the key and value tiles that a loader streams.

Two groups where there is a window or the head is wide; three, which read a third less a row, everywhere else.

The scores of the next tile are multiplied before the weighted sum of this one, so that a group computes SiLU while the
matrix unit works on its sum.  The definition is `forward.py`, which computes the same on any GPU.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import warpgroup_mma, warpgroup_mma_wait

from attention_kernels.hopper_groups import (
    left_operand,
    matrix_layout,
    start_products,
    store_group,
    weights_and_slopes,
    zero_sum,
)
from attention_kernels.hopper_tiles import (
    load_held_tiles,
    load_partner_tiles,
    make_order,
    make_ring,
    next_number,
    partners_of_group,
    pass_by,
    release,
    wait_block,
)
from attention_kernels.tiles import load_item, partner_start


@gluon.jit
def tile_weights(b_score, v_ring, half_scale, row, key, bounds, HAS_LOCAL: gl.constexpr, HAS_TARGETS: gl.constexpr):
    """silu of a group's scores, as the left operand of the weighted sum."""
    b_weight, _ = weights_and_slopes(b_score, half_scale, row, key, bounds, False, HAS_LOCAL, HAS_TARGETS)
    return left_operand(b_weight, v_ring)


@gluon.jit
def compute_forward(
    work, GROUP: gl.constexpr, GROUPS: gl.constexpr, V: gl.constexpr, BLOCK_N: gl.constexpr,
    HAS_LOCAL: gl.constexpr, HAS_TARGETS: gl.constexpr, SPLIT: gl.constexpr,
):  # fmt: skip
    """A group: its rows of every item of this program."""
    rings, order, output, table, H, half_scale, out_scale = work
    q_rings, k_ring, v_ring = rings
    q_ring = q_rings[GROUP][0]
    out, stride_ot, stride_oh, partials, counters = output
    # The next item's queries are loaded while this one's are in use, and the matrix unit reads half as much.
    IN_REGISTERS: gl.constexpr = GROUPS == 2 and q_ring.buffers.shape[3] <= 128
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
        i_use += hi - lo
        store_group(
            out, b_out * out_scale, None, stride_ot, stride_oh, i_h, H, start, row, last, part, parts, home,
            partials, counters, GROUP, V, SPLIT, False, GROUPS,
        )  # fmt: skip
        number = next_number(order, i_item)
        i_item += 1


@gluon.jit(do_not_specialize=["H", "half_scale", "out_scale"])
def hopper_forward_kernel(
    q, k, v, out, table, partials, counters, H, half_scale, out_scale, stride_ot, stride_oh, V: gl.constexpr,
    HAS_LOCAL: gl.constexpr, HAS_TARGETS: gl.constexpr, SPLIT: gl.constexpr,
    GROUPS: gl.constexpr, HELD_STAGES: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """out[q] = out_scale sum_k silu(2 half_scale <q, k>) v[k], summed in float32.  Grid: one program a processor."""
    BLOCK_N: gl.constexpr = k.block_shape[1]
    q_rings = (
        ((make_ring(q, HELD_STAGES, 1),), (make_ring(q, HELD_STAGES, 1),))
        if GROUPS == 2
        else ((make_ring(q, HELD_STAGES, 1),), (make_ring(q, HELD_STAGES, 1),), (make_ring(q, HELD_STAGES, 1),))
    )
    k_ring = make_ring(k, STAGES, GROUPS)
    v_ring = make_ring(v, STAGES, GROUPS)
    order = make_order(GROUPS)
    output = (out, stride_ot, stride_oh, partials, counters)
    work = ((q_rings, k_ring, v_ring), order, output, table, H, half_scale, out_scale)
    partners = ((k, v), (k_ring, v_ring), order, table, H, BLOCK_N, True, HAS_LOCAL, SPLIT)
    if GROUPS == 2:
        gl.warp_specialize(
            [
                (compute_forward, (work, 0, GROUPS, V, BLOCK_N, HAS_LOCAL, HAS_TARGETS, SPLIT)),
                (compute_forward, (work, 1, GROUPS, V, BLOCK_N, HAS_LOCAL, HAS_TARGETS, SPLIT)),
                (load_partner_tiles, partners),
                (load_held_tiles, ((q,), q_rings, order, table, H)),
            ],
            [4, 1, 1],
            [240, 24, 24],
        )
    else:
        gl.warp_specialize(
            [
                (compute_forward, (work, 0, GROUPS, V, BLOCK_N, HAS_LOCAL, HAS_TARGETS, SPLIT)),
                (compute_forward, (work, 1, GROUPS, V, BLOCK_N, HAS_LOCAL, HAS_TARGETS, SPLIT)),
                (compute_forward, (work, 2, GROUPS, V, BLOCK_N, HAS_LOCAL, HAS_TARGETS, SPLIT)),
                (load_partner_tiles, partners),
                (load_held_tiles, ((q,), q_rings, order, table, H)),
            ],
            [4, 4, 1, 1],
            [160, 160, 24, 24],
        )
