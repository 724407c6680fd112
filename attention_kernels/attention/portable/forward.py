"""Forward kernel: one program holds a tile of query rows of one head and walks its live key tiles.

It is not the launcher (`launchers.py`) and decides nothing about mask (`tiles.py`) or order (`schedule.py`).
"""

import triton
import triton.language as tl

from attention_kernels.attention.items import item_of_program
from attention_kernels.attention.tiles import (
    Output,
    PairBiases,
    element_mask,
    half_bias,
    is_full,
    live_keys,
    load_rows,
    part_range,
    partner_start,
    product,
    store_or_reduce,
)
from attention_kernels.sigmoid import twice_sigmoid


@triton.jit(do_not_specialize=["H", "half_scale", "out_scale", "M", "G", "longest"])
def forward_kernel(
    q, k, v, out, table, partials, arrivals, H, half_scale, out_scale,
    stride_qt, stride_qh, stride_kt, stride_kh, stride_vt, stride_vh, stride_ot, stride_oh,
    position, time, buckets, M, G, longest,
    K: tl.constexpr, V: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, HAS_LOCAL: tl.constexpr, HAS_TARGETS: tl.constexpr,
    SPLIT: tl.constexpr, TMA: tl.constexpr, APPROXIMATE: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
    BIASED: tl.constexpr,
):  # fmt: skip
    """out[q] = out_scale sum_k silu(2 half_scale <q, k>) v[k], accumulated in float32."""
    is_there, item, i_h = item_of_program(table, H)
    biases = PairBiases(position, time, buckets, M, G, longest)
    start, row_start, bounds, first, last = item.start, item.row_start, item.bounds, item.first, item.last
    if is_there:
        b_q = load_rows(q, stride_qt, stride_qh, i_h, row_start, first, last, BLOCK_M, K, BLOCK_K, TMA)
        partners = live_keys(first, last, bounds, BLOCK_N, HAS_LOCAL)
        begin, end = part_range(partners, item.part, item.parts, SPLIT)
        o_row = first + tl.arange(0, BLOCK_M)
        b_out = tl.zeros([BLOCK_M, BLOCK_V], tl.float32)
        for i in tl.range(begin, end, num_stages=STAGES):
            key = partner_start(i, partners, BLOCK_N)
            b_k = load_rows(k, stride_kt, stride_kh, i_h, start, key, bounds.n, BLOCK_N, K, BLOCK_K, TMA)
            b_half = product(b_q, tl.trans(b_k), None, PRECISION) * half_scale
            o_key = key + tl.arange(0, BLOCK_N)
            if BIASED:
                b_half += half_bias(biases, i_h, start, o_row[:, None], o_key[None, :], bounds.n)
            b_weight = b_half * twice_sigmoid(b_half, APPROXIMATE)
            if not is_full(first, last, key, key + BLOCK_N, bounds, HAS_LOCAL):
                m = element_mask(o_row[:, None], o_key[None, :], bounds, HAS_LOCAL, HAS_TARGETS)
                b_weight = tl.where(m, b_weight, 0.0)
            b_v = load_rows(v, stride_vt, stride_vh, i_h, start, key, bounds.n, BLOCK_N, V, BLOCK_V, TMA)
            b_out = product(b_weight.to(b_v.dtype), b_v, b_out, PRECISION)
        output = Output(out, stride_ot, stride_oh, None, partials, arrivals)
        store_or_reduce(output, b_out * out_scale, row_start, item, i_h, H, BLOCK_M, V, BLOCK_V, SPLIT, False)
