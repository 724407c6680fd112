"""dk and dv for head sizes of 129 to 256 on Hopper: two groups share 64 keys, and each sums half of the head.

A group multiplies the scores of half of the streamed rows, passes their weights and slopes on through shared memory,
and adds the products of all rows to its own columns of dk and dv.  So no score is computed twice, and a sum of 64 x 128
fits the registers where one of 64 x 256 does not.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from attention_kernels.hopper_tiles import (
    GROUP_SIZE,
    half_scores,
    matrix_layout,
    next_number,
    release,
    store_group,
    tanh,
    twice_slope,
    wait_block,
)
from attention_kernels.tiles import live_rows, load_item, part_range, partner_start


@gluon.jit
def make_exchange(dtype: gl.constexpr, BLOCK_M: gl.constexpr):
    """Buffers for both groups' weights and slopes, [keys, half of the rows] each, and their barriers."""
    ROWS: gl.constexpr = BLOCK_M // 2
    LAYOUT: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=2 * ROWS, element_bitwidth=16, rank=2)
    weights = gl.allocate_shared_memory(dtype, [2, GROUP_SIZE, ROWS], LAYOUT)
    slopes = gl.allocate_shared_memory(dtype, [2, GROUP_SIZE, ROWS], LAYOUT)
    full = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    mbarrier.init(full, count=2)
    mbarrier.init(empty, count=2)
    return weights, slopes, full, empty


@gluon.jit
def compute_wide_dkdv(
    work, GROUP: gl.constexpr, K: gl.constexpr, V: gl.constexpr, BLOCK_M: gl.constexpr,
    HAS_LOCAL: gl.constexpr, HAS_TARGETS: gl.constexpr, SPLIT: gl.constexpr, SCALED: gl.constexpr,
):  # fmt: skip
    """`hopper_backward.compute_dkdv` where both groups hold the same keys: a group's columns of every item."""
    rings, order, output, table, H, half_scale, dk_scale, dv_scale = work
    held_rings, q_ring, dout_ring, exchange = rings
    k_ring, v_ring = held_rings[0]
    weights, slopes, full, empty = exchange
    dk, dv, k_sums, v_sums, strides, k_partials, v_partials, k_counters, v_counters = output
    stride_dkt, stride_dkh, stride_dvt, stride_dvh = strides
    HALF_K: gl.constexpr = k_ring.buffers.shape[3] // 2
    HALF_V: gl.constexpr = v_ring.buffers.shape[3] // 2
    ROWS: gl.constexpr = BLOCK_M // 2
    dtype: gl.constexpr = k_ring.buffers.dtype
    S_LAYOUT: gl.constexpr = matrix_layout(ROWS)
    num_items = gl.load(table) * H
    number = gl.program_id(0)
    i_item = 0
    i_use = 0
    while number < num_items:
        i_h = number % H
        start, bounds, first, last, part, parts, home = load_item(table, number // H)
        partners = live_rows(first, last, bounds, BLOCK_M, HAS_LOCAL)
        lo, hi = part_range(partners, part, parts, SPLIT)
        b_k = wait_block(k_ring, i_item)
        b_v = wait_block(v_ring, i_item)
        b_dk = gl.zeros([GROUP_SIZE, HALF_K], gl.float32, matrix_layout(HALF_K))
        b_dv = gl.zeros([GROUP_SIZE, HALF_V], gl.float32, matrix_layout(HALF_V))
        b_zero = gl.zeros([GROUP_SIZE, ROWS], gl.float32, S_LAYOUT)
        for j in range(lo, hi):
            row = partner_start(j, partners, BLOCK_M) + GROUP * ROWS
            b_q = wait_block(q_ring, i_use)
            own_q = b_q.slice(GROUP * ROWS, ROWS, dim=0)
            b_score = warpgroup_mma(b_k, own_q.permute([1, 0]), b_zero, use_acc=False, is_async=True)
            b_dout = wait_block(dout_ring, i_use)
            own_dout = b_dout.slice(GROUP * ROWS, ROWS, dim=0)
            b_dweight = warpgroup_mma(b_v, own_dout.permute([1, 0]), b_zero, use_acc=False, is_async=True)
            b_score = warpgroup_mma_wait(1, deps=(b_score,))
            b_half = half_scores(b_score, half_scale, row, first, bounds, True, HAS_LOCAL, HAS_TARGETS)
            b_tanh = tanh(b_half)
            b_weight = b_half * b_tanh + b_half
            b_slope = twice_slope(b_weight, b_tanh)
            mbarrier.wait(empty, (i_use + 1) & 1)
            weights.index(GROUP).store(b_weight.to(dtype))
            b_dweight = warpgroup_mma_wait(0, deps=(b_dweight,))
            slopes.index(GROUP).store((b_dweight * b_slope).to(dtype))
            # Every thread's stores must be seen by the matrix unit before one thread announces them.
            fence_async_shared()
            gl.thread_barrier()
            mbarrier.arrive(full)
            mbarrier.wait(full, i_use & 1)
            for i in gl.static_range(2):
                dout_part = b_dout.slice(i * ROWS, ROWS, dim=0).slice(GROUP * HALF_V, HALF_V, dim=1)
                b_dv = warpgroup_mma(weights.index(i), dout_part, b_dv, is_async=True)
                q_part = b_q.slice(i * ROWS, ROWS, dim=0).slice(GROUP * HALF_K, HALF_K, dim=1)
                b_dk = warpgroup_mma(slopes.index(i), q_part, b_dk, is_async=True)
            b_dv, b_dk = warpgroup_mma_wait(0, deps=(b_dv, b_dk))
            mbarrier.arrive(empty)
            release(dout_ring, i_use)
            release(q_ring, i_use)
            i_use += 1
        release(k_ring, i_item)
        release(v_ring, i_item)
        store_group(
            dv + GROUP * HALF_V, b_dv * dv_scale, v_sums, stride_dvt, stride_dvh, i_h, H, start, first, last,
            part, parts, home, v_partials, v_counters, GROUP, V - GROUP * HALF_V, SPLIT, SCALED,
        )  # fmt: skip
        store_group(
            dk + GROUP * HALF_K, b_dk * dk_scale, k_sums, stride_dkt, stride_dkh, i_h, H, start, first, last,
            part, parts, home, k_partials, k_counters, GROUP, K - GROUP * HALF_K, SPLIT, SCALED,
        )  # fmt: skip
        number = next_number(order, i_item)
        i_item += 1
