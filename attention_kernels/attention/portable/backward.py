"""Backward kernels: dq over tiles of query rows, dk and dv over tiles of keys, each over its own live tiles.

Two kernels compute seven products a tile pair where one kernel with atomic additions to dq computes five; in exchange
every sum has one owner and one order, so gradients are the same bits every time.

With x = scale <q, k>: dsilu/dx = sigmoid(x) (1 + x - silu(x)).  The constants scale and 1 / max_len multiply the
accumulated sums, not every element.
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
    live_rows,
    load_rows,
    part_range,
    partner_start,
    product,
    row_range,
    store_or_reduce,
    twice_slope,
)
from attention_kernels.sigmoid import twice_sigmoid


@triton.jit(do_not_specialize=["H", "half_scale", "dq_scale", "M", "G", "longest", "stride_ds"])
def dq_kernel(
    dout, q, k, v, dq, sums, table, partials, arrivals, H, half_scale, dq_scale,
    stride_gt, stride_gh, stride_qt, stride_qh, stride_kt, stride_kh, stride_vt, stride_vh, stride_dt, stride_dh,
    position, time, buckets, M, G, longest, dscore, stride_ds,
    K: tl.constexpr, V: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, HAS_LOCAL: tl.constexpr, HAS_TARGETS: tl.constexpr,
    SPLIT: tl.constexpr, TMA: tl.constexpr, APPROXIMATE: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
    SCALED: tl.constexpr, BIASED: tl.constexpr,
):  # fmt: skip
    """dq[q] = dq_scale sum_k 2 silu'(score) <dout[q], v[k]> k[k]; one program a row tile and head."""
    is_there, item, i_h = item_of_program(table, H)
    biases = PairBiases(position, time, buckets, M, G, longest)
    start, row_start, bounds, first, last = item.start, item.row_start, item.bounds, item.first, item.last
    if is_there:
        b_q = load_rows(q, stride_qt, stride_qh, i_h, row_start, first, last, BLOCK_M, K, BLOCK_K, TMA)
        b_dout = load_rows(dout, stride_gt, stride_gh, i_h, row_start, first, last, BLOCK_M, V, BLOCK_V, TMA)
        partners = live_keys(first, last, bounds, BLOCK_N, HAS_LOCAL)
        begin, end = part_range(partners, item.part, item.parts, SPLIT)
        o_row = first + tl.arange(0, BLOCK_M)
        b_dq = tl.zeros([BLOCK_M, BLOCK_K], tl.float32)
        for i in tl.range(begin, end, num_stages=STAGES):
            key = partner_start(i, partners, BLOCK_N)
            b_k = load_rows(k, stride_kt, stride_kh, i_h, start, key, bounds.n, BLOCK_N, K, BLOCK_K, TMA)
            b_v = load_rows(v, stride_vt, stride_vh, i_h, start, key, bounds.n, BLOCK_N, V, BLOCK_V, TMA)
            b_half = product(b_q, tl.trans(b_k), None, PRECISION) * half_scale
            o_key = key + tl.arange(0, BLOCK_N)
            if BIASED:
                b_half += half_bias(biases, i_h, start, o_row[:, None], o_key[None, :], bounds.n)
            b_dweight = product(b_dout, tl.trans(b_v), None, PRECISION)
            b_sigmoid2 = twice_sigmoid(b_half, APPROXIMATE)
            b_dscore = b_dweight * twice_slope(b_half, b_sigmoid2)
            if not is_full(first, last, key, key + BLOCK_N, bounds, HAS_LOCAL):
                m = element_mask(o_row[:, None], o_key[None, :], bounds, HAS_LOCAL, HAS_TARGETS)
                b_dscore = tl.where(m, b_dscore, 0.0)
            if BIASED:
                # Twice the score's gradient, times max_len.
                p_dscore = dscore + i_h.to(tl.int64) * stride_ds + (start + o_row).to(tl.int64)[:, None] * longest
                m = (o_key[None, :] <= o_row[:, None]) & (o_row < last)[:, None]
                tl.store(p_dscore + o_key[None, :], b_dscore, mask=m)
            b_dq = product(b_dscore.to(b_k.dtype), b_k, b_dq, PRECISION)
        output = Output(dq, stride_dt, stride_dh, sums, partials, arrivals)
        store_or_reduce(output, b_dq * dq_scale, row_start, item, i_h, H, BLOCK_M, K, BLOCK_K, SPLIT, SCALED)


@triton.jit(do_not_specialize=["H", "half_scale", "dk_scale", "dv_scale", "M", "G", "longest"])
def dkdv_kernel(
    dout, q, k, v, dk, dv, k_sums, v_sums, table, k_partials, v_partials, k_arrivals, v_arrivals,
    H, half_scale, dk_scale, dv_scale,
    stride_gt, stride_gh, stride_qt, stride_qh, stride_kt, stride_kh, stride_vt, stride_vh,
    stride_dkt, stride_dkh, stride_dvt, stride_dvh,
    position, time, buckets, M, G, longest,
    K: tl.constexpr, V: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, HAS_LOCAL: tl.constexpr, HAS_TARGETS: tl.constexpr,
    SPLIT: tl.constexpr, TMA: tl.constexpr, APPROXIMATE: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
    SCALED: tl.constexpr, BIASED: tl.constexpr,
):  # fmt: skip
    """dv[k] = dv_scale sum_q silu(score) dout[q], dk[k] likewise; one program a key tile and head.

    Scores are computed transposed, keys by rows, so that they are the left operand of both sums.
    """
    is_there, item, i_h = item_of_program(table, H)
    biases = PairBiases(position, time, buckets, M, G, longest)
    start, bounds, first, last = item.start, item.bounds, item.first, item.last
    if is_there:
        b_k = load_rows(k, stride_kt, stride_kh, i_h, start, first, bounds.n, BLOCK_N, K, BLOCK_K, TMA)
        b_v = load_rows(v, stride_vt, stride_vh, i_h, start, first, bounds.n, BLOCK_N, V, BLOCK_V, TMA)
        partners = live_rows(first, last, bounds, BLOCK_M, HAS_LOCAL)
        begin, end = part_range(partners, item.part, item.parts, SPLIT)
        o_key = first + tl.arange(0, BLOCK_N)
        b_dk = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
        b_dv = tl.zeros([BLOCK_N, BLOCK_V], tl.float32)
        for i in tl.range(begin, end, num_stages=STAGES):
            row = partner_start(i, partners, BLOCK_M)
            row_start, row_end = row_range(i, partners, item)
            b_q = load_rows(q, stride_qt, stride_qh, i_h, row_start, row, row_end, BLOCK_M, K, BLOCK_K, TMA)
            b_dout = load_rows(dout, stride_gt, stride_gh, i_h, row_start, row, row_end, BLOCK_M, V, BLOCK_V, TMA)
            b_half = product(b_k, tl.trans(b_q), None, PRECISION) * half_scale
            o_row = row + tl.arange(0, BLOCK_M)
            if BIASED:
                b_half += half_bias(biases, i_h, start, o_row[None, :], o_key[:, None], bounds.n)
            b_dweight = product(b_v, tl.trans(b_dout), None, PRECISION)
            b_sigmoid2 = twice_sigmoid(b_half, APPROXIMATE)
            b_weight = b_half * b_sigmoid2
            b_dscore = b_dweight * twice_slope(b_half, b_sigmoid2)
            if not is_full(row, row + BLOCK_M, first, last, bounds, HAS_LOCAL):
                m = element_mask(o_row[None, :], o_key[:, None], bounds, HAS_LOCAL, HAS_TARGETS)
                m = m & (o_row < row_end)[None, :]
                b_weight = tl.where(m, b_weight, 0.0)
                b_dscore = tl.where(m, b_dscore, 0.0)
            b_dv = product(b_weight.to(b_dout.dtype), b_dout, b_dv, PRECISION)
            b_dk = product(b_dscore.to(b_q.dtype), b_q, b_dk, PRECISION)
        output = Output(dv, stride_dvt, stride_dvh, v_sums, v_partials, v_arrivals)
        store_or_reduce(output, b_dv * dv_scale, start, item, i_h, H, BLOCK_N, V, BLOCK_V, SPLIT, SCALED)
        output = Output(dk, stride_dkt, stride_dkh, k_sums, k_partials, k_arrivals)
        store_or_reduce(output, b_dk * dk_scale, start, item, i_h, H, BLOCK_N, K, BLOCK_K, SPLIT, SCALED)
