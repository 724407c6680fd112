"""Biases of pairs of query and key in kernels: the buckets of their times, and the sums of scores' gradients by bias.

Buckets are looked up once a plan, a byte a pair, by whole numbers alone: they are `relative_bias.log_bucket`'s on
every device.  The kernel of dq leaves the gradients of all scores; here they are added up in a fixed order, so that
the biases' gradients are the same bits every time.  A program adds those of one sequence, head and few distances in
registers, a column of all buckets for each of its lanes; another kernel adds what programs found.

Letters: i_ index, o_ offsets, p_ pointer, b_ block, m_ mask.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from attention_kernels.attention.plan import AttentionPlan, PairTimes
from attention_kernels.launcher import launch
from attention_kernels.relative_bias import RelativeBiases
from attention_kernels.rows import cdiv, pad_size

_DISTANCES, _ROWS = 32, 4
"""Distances of a program, and how many rows it reads at once."""
_FOUND = 64
"""Programs whose sums are read at once."""


def arguments(plan: AttentionPlan, biases: RelativeBiases | None) -> tuple[Any, ...]:
    """What kernels are given of biases: `tiles.PairBiases`."""
    if biases is None:
        return None, None, None, 1, 1, 1
    assert plan.times is not None
    position, time = (x.contiguous() for x in biases)
    return position, time, _buckets(plan, plan.times), position.shape[1], time.shape[1], plan.times.longest


def allocate_scores(q: Tensor, plan: AttentionPlan) -> Tensor:
    """Room for twice the scores' gradients times `max_len`, [H, T, longest], row by row; what is not seen stays
    unwritten."""
    assert plan.times is not None
    return torch.empty(q.shape[1], q.shape[0], plan.times.longest, dtype=torch.float32, device=q.device)


def gradients(dscore: Tensor, plan: AttentionPlan, biases: RelativeBiases) -> tuple[Tensor, Tensor]:
    """The gradients of both biases in float32."""
    assert plan.times is not None
    heads, _, longest = dscore.shape
    num_sequences, (num_positions, num_buckets) = plan.offsets.shape[0] - 1, (x.shape[1] for x in biases)
    blocks, padded = cdiv(longest, _DISTANCES), pad_size(num_buckets)
    by_distance = torch.empty(heads, num_sequences, blocks * _DISTANCES, dtype=torch.float32, device=dscore.device)
    by_bucket = torch.empty(heads, num_sequences * blocks, padded, dtype=torch.float32, device=dscore.device)
    launch(
        pair_sums_kernel,
        (num_sequences, blocks, heads),
        *(dscore, _buckets(plan, plan.times), plan.offsets, by_distance, by_bucket),
        *(num_sequences, blocks, longest, dscore.stride(0)),
        BUCKETS=padded,
        DISTANCES=_DISTANCES,
        ROWS=_ROWS,
        num_warps=8,
    )
    dposition, dtime = (torch.empty(x.shape, dtype=torch.float32, device=x.device) for x in biases)
    position_blocks = cdiv(num_positions, _DISTANCES)
    launch(
        add_found_kernel,
        (position_blocks + cdiv(num_buckets, _DISTANCES), heads),
        *(by_distance, by_bucket, dposition, dtime),
        *(num_sequences, blocks, position_blocks, num_positions, num_buckets, 0.5 / plan.max_len),
        BUCKETS=padded,
        DISTANCES=_DISTANCES,
        FOUND=_FOUND,
        num_warps=4,
    )
    return dposition, dtime


def _buckets(plan: AttentionPlan, times: PairTimes) -> Tensor:
    """[T, longest] uint8: the time bucket of each row and key of its sequence that it sees; rubbish elsewhere."""
    if "buckets" not in times.made:
        buckets = torch.empty(times.happened.shape[0], times.longest, dtype=torch.uint8, device=times.happened.device)
        times.made["buckets"] = buckets
        starts = times.bucket_starts
        launch(
            bucket_kernel,
            (plan.offsets.shape[0] - 1, cdiv(times.longest, 16)),
            *(times.happened, times.asked, starts, plan.offsets, buckets, starts.shape[0], times.longest),
            # More than half of the largest bucket.
            HALF=pad_size(starts.shape[0]) // 2,
            ROWS=16,
            KEYS=64,
            num_warps=4,
        )
    found: Tensor = times.made["buckets"]
    return found


@triton.jit(do_not_specialize=["G", "longest"])
def bucket_kernel(
    happened, asked, bucket_starts, offsets, buckets, G, longest,
    HALF: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """Programs (sequence, block of rows): the last bucket that starts at the distance or before, by halving."""
    start = tl.load(offsets + tl.program_id(0))
    n = (tl.load(offsets + tl.program_id(0) + 1) - start).to(tl.int32)
    first = tl.program_id(1) * ROWS
    o_row = first + tl.arange(0, ROWS)
    m_row = o_row < n
    b_asked = tl.load(asked + start + o_row, mask=m_row, other=0)
    for key in range(0, tl.minimum(first + ROWS, n), KEYS):
        o_key = key + tl.arange(0, KEYS)
        b_happened = tl.load(happened + start + o_key, mask=o_key < n, other=0)
        distance = tl.abs(b_asked[:, None] - b_happened[None, :])
        bucket = tl.zeros([ROWS, KEYS], tl.int32)
        for i in tl.static_range(8):
            candidate = bucket + (HALF >> i)
            b_start = tl.load(bucket_starts + candidate, mask=candidate < G, other=0)
            bucket = tl.where((candidate < G) & (distance >= b_start), candidate, bucket)
        p_bucket = buckets + (start + o_row).to(tl.int64)[:, None] * longest + o_key[None, :]
        tl.store(p_bucket, bucket.to(tl.uint8), mask=m_row[:, None] & (o_key[None, :] <= o_row[:, None]))


@triton.jit
def load_pairs(dscore, buckets, start, o_row, o_distance, n, longest):
    """(gradients of scores, buckets) of rows and the keys that lie so far back; 0 where there are none."""
    m = (o_row < n) & (o_distance <= o_row)
    o_pair = (start + o_row) * longest + (o_row - o_distance)
    b_dscore = tl.load(dscore + o_pair, mask=m, other=0.0)
    return b_dscore, tl.load(buckets + o_pair, mask=m, other=0).to(tl.int32)


@triton.jit(do_not_specialize=["B", "blocks", "longest", "stride_h"])
def pair_sums_kernel(
    dscore, buckets, offsets, by_distance, by_bucket, B, blocks, longest, stride_h,
    BUCKETS: tl.constexpr, DISTANCES: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Programs (sequence, block of distances, head): sums of a sequence's pairs by distance and by bucket."""
    i_b, i_d, i_h = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    start = tl.load(offsets + i_b).to(tl.int64)
    n = (tl.load(offsets + i_b + 1) - start).to(tl.int32)
    o_lane = tl.arange(0, ROWS * DISTANCES)
    o_distance = i_d * DISTANCES + o_lane % DISTANCES
    o_bucket = tl.arange(0, BUCKETS)
    b_distance = tl.zeros([ROWS * DISTANCES], tl.float32)
    b_bucket = tl.zeros([BUCKETS, ROWS * DISTANCES], tl.float32)
    of_head = dscore + i_h.to(tl.int64) * stride_h
    o_row = i_d * DISTANCES + o_lane // DISTANCES
    b_next, next_bucket = load_pairs(of_head, buckets, start, o_row, o_distance, n, longest)
    for _ in range(i_d * DISTANCES, n, ROWS):
        b_dscore, bucket = b_next, next_bucket
        # Under way while these are added.
        o_row += ROWS
        b_next, next_bucket = load_pairs(of_head, buckets, start, o_row, o_distance, n, longest)
        b_distance += b_dscore
        # Not a sum with `where`, which takes an instruction more than an addition under a condition.
        b_bucket = tl.where(bucket[None, :] == o_bucket[:, None], b_bucket + b_dscore[None, :], b_bucket)
    slot = i_h.to(tl.int64) * B + i_b
    p_distance = by_distance + (slot * blocks + i_d) * DISTANCES + tl.arange(0, DISTANCES)
    tl.store(p_distance, tl.sum(b_distance.reshape(ROWS, DISTANCES), 0))
    tl.store(by_bucket + (slot * blocks + i_d) * BUCKETS + o_bucket, tl.sum(b_bucket, 1))


@triton.jit(do_not_specialize=["B", "blocks", "position_blocks", "M", "G", "factor"])
def add_found_kernel(
    by_distance, by_bucket, dposition, dtime, B, blocks, position_blocks, M, G, factor,
    BUCKETS: tl.constexpr, DISTANCES: tl.constexpr, FOUND: tl.constexpr,
):  # fmt: skip
    """Programs (block of position biases, then of time biases; head): adds what programs found."""
    i_block, i_h = tl.program_id(0), tl.program_id(1)
    if i_block < position_blocks:
        o_position = i_block * DISTANCES + tl.arange(0, DISTANCES)
        width = blocks * DISTANCES
        found = by_distance + i_h.to(tl.int64) * B * width
        b_sum = add_rows(found, B, width, o_position, tl.minimum(M, width), DISTANCES, FOUND)
        if i_block == position_blocks - 1:
            # Distances of M places and more share the last bias.
            for first in range(M, width, DISTANCES):
                o_beyond = first + tl.arange(0, DISTANCES)
                b_beyond = add_rows(found, B, width, o_beyond, width, DISTANCES, FOUND)
                b_sum += tl.where(o_position == M - 1, tl.sum(b_beyond, 0), 0.0)
        tl.store(dposition + i_h * M + o_position, b_sum * factor, mask=o_position < M)
    else:
        o_bucket = (i_block - position_blocks) * DISTANCES + tl.arange(0, DISTANCES)
        found = by_bucket + i_h.to(tl.int64) * B * blocks * BUCKETS
        b_sum = add_rows(found, B * blocks, BUCKETS, o_bucket, G, DISTANCES, FOUND)
        tl.store(dtime + i_h * G + o_bucket, b_sum * factor, mask=o_bucket < G)


@triton.jit
def add_rows(found, num_rows, width, o_column, end, COLUMNS: tl.constexpr, ROWS: tl.constexpr):
    """The sums of some columns before `end` over all rows."""
    b_sum = tl.zeros([ROWS, COLUMNS], tl.float32)
    for first in range(0, num_rows, ROWS):
        o_row = first + tl.arange(0, ROWS)
        m = (o_row < num_rows)[:, None] & (o_column < end)[None, :]
        b_sum += tl.load(found + o_row.to(tl.int64)[:, None] * width + o_column[None, :], mask=m, other=0.0)
    return tl.sum(b_sum, 0)
