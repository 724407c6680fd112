"""Tile code shared by the forward and both backward kernels: live partners, the element mask, loads, partial sums.

A kernel holds one tile (of rows or of keys) and walks its live partner tiles, which lie in up to three segments of the
sequence.  Only a partner tile that a boundary of the mask crosses is masked element by element.  The segments of a tile
stay disjoint when they are rounded up to whole blocks: whatever a block covers beyond its segment, the mask forbids.

Letters: i_ index, o_ offsets, p_ pointer, b_ block, m_ mask.  Sequence bounds n, u, c, g, s, r, e as in `items.py`.
"""

from typing import NamedTuple

import triton
import triton.language as tl


class Partners(NamedTuple):
    """The live partner tiles of a tile: up to three segments, so many tiles from a start on each."""

    num_0: tl.tensor
    num_1: tl.tensor
    num_2: tl.tensor
    start_0: tl.tensor
    start_1: tl.tensor
    start_2: tl.tensor


class Output(NamedTuple):
    """Where a kernel's result goes: rows of [T, H, size], and what is kept of a tile beside them."""

    x: tl.tensor
    stride_t: tl.tensor
    stride_h: tl.tensor
    sums: tl.tensor
    """Slots for the sums of tiles over their rows; None: not wanted."""
    partials: tl.tensor
    """Slots for the partial sums of split tiles; None: no tile is split."""
    arrivals: tl.tensor
    """Counters of the parts that have written theirs."""


class PairBiases(NamedTuple):
    """What is added to scores: a layer's biases, and which of them is each pair's."""

    position: tl.tensor
    """[H, M]."""
    time: tl.tensor
    """[H, G]."""
    buckets: tl.tensor
    """[T, longest], a byte for each pair of a row and its sequence's keys."""
    num_positions: tl.tensor
    num_buckets: tl.tensor
    longest: tl.tensor


@triton.jit
def live_keys(first, last, bounds, BLOCK: tl.constexpr, HAS_LOCAL: tl.constexpr):
    """Key segments of a row tile: columns (from 0), main, own targets."""
    _, u, c, g, s, _, _, local = bounds
    main_start = 0
    num_columns = 0
    if HAS_LOCAL:
        in_band = (first >= c) & (first < g)
        if in_band:
            main_start = tl.maximum(first - local, 0)
            num_columns = tl.cdiv(tl.minimum(s, main_start), BLOCK)
            # Whole blocks of columns would reach into the band: then both are one segment.
            if num_columns * BLOCK > main_start:
                main_start = 0
                num_columns = 0
    main_end = tl.minimum(last, u)
    if first < c:
        main_end = u
    num_own = 0
    if last > u:
        # Likewise of whole blocks of history and the tile's own targets.
        if tl.cdiv(u, BLOCK) * BLOCK > first:
            main_end = last
        else:
            num_own = tl.cdiv(last - first, BLOCK)
    return Partners(num_columns, tl.cdiv(main_end - main_start, BLOCK), num_own, 0, main_start, first)


@triton.jit
def live_rows(first, last, bounds, BLOCK: tl.constexpr, HAS_LOCAL: tl.constexpr):
    """Row segments of a key tile: context (from 0), band, unrestricted rows."""
    n, u, c, g, s, r, e, local = bounds
    num_context = tl.cdiv(e, BLOCK)
    band_start = tl.maximum(first, r)
    band_end = n
    wide_start = n
    if first >= u:
        num_context = 0
        band_end = last
    if HAS_LOCAL:
        in_band = (first >= s) & (first < u)
        if in_band:
            # Not last + local, which could overflow.
            band_end = tl.maximum(last + tl.minimum(local, g - last), band_start)
            wide_start = tl.maximum(tl.maximum(g, r), first)
    # Neighbours whose blocks would overlap become one segment: context and band, band and unrestricted rows.  Context
    # rows with others between that are not computed have no neighbours: `row_range` ends their blocks.
    context_end = tl.where(r > c, 0, num_context * BLOCK)
    if band_end > band_start:
        if context_end > band_start:
            num_context = 0
            band_start = 0
        if band_start + tl.cdiv(band_end - band_start, BLOCK) * BLOCK > wide_start:
            band_end = n
            wide_start = n
    elif context_end > wide_start:
        num_context = 0
        wide_start = 0
    return Partners(
        num_context, tl.cdiv(band_end - band_start, BLOCK), tl.cdiv(n - wide_start, BLOCK),
        0, band_start, wide_start,
    )  # fmt: skip


@triton.jit
def count_partners(partners):
    """Live partner tiles of a tile."""
    return partners.num_0 + partners.num_1 + partners.num_2


@triton.jit
def partner_start(i, partners, BLOCK: tl.constexpr):
    """Where the i-th live partner tile begins."""
    num_0, num_1, _, start_0, start_1, start_2 = partners
    start = tl.where(i < num_0, start_0 + i * BLOCK, start_1 + (i - num_0) * BLOCK)
    return tl.where(i < num_0 + num_1, start, start_2 + (i - num_0 - num_1) * BLOCK)


@triton.jit
def row_range(i, partners, item):
    """(start, end) of the i-th live row tile of an item of keys: where the sequence's row 0 would lie among the rows,
    and where rows of the tile's kind end."""
    bounds = item.bounds
    apart = (i < partners.num_0) & (bounds.r > bounds.c)
    start = tl.where(apart, item.row_start + bounds.r - bounds.e, item.row_start)
    return start, tl.where(apart, bounds.e, bounds.n)


@triton.jit
def is_full(row_first, row_last, key_first, key_last, bounds, HAS_LOCAL: tl.constexpr):
    """Whether every row row_first..row_last-1 sees every key key_first..key_last-1."""
    n, u, c, g, s, _, _, local = bounds
    full = (row_first >= c) & (row_first >= key_last - 1) & (row_last <= n)
    if HAS_LOCAL:
        full = full & ((row_first >= g) | (key_last <= s) | (row_last - 1 - key_first <= local))
    return (full | (row_last <= c)) & (key_last <= u)


@triton.jit
def element_mask(o_row, o_key, bounds, HAS_LOCAL: tl.constexpr, HAS_TARGETS: tl.constexpr):
    """The mask of `mask.py`, element by element; `o_row` and `o_key` broadcast against each other."""
    n, u, c, g, s, _, _, local = bounds
    is_history = (o_row >= c) & (o_row < u)
    end = tl.where(is_history, o_row + 1, tl.where(o_row < n, u, 0))
    seen = o_key < end
    if HAS_LOCAL:
        # A negative `begin` sees everything; rows may lie near 2**31 only if the sequence does.
        begin = tl.where(is_history & (o_row < g), o_row - local, 0)
        seen = seen & ((o_key >= begin) | (o_key < s))
    if HAS_TARGETS:
        own = tl.where((o_row >= u) & (o_row < n), o_row, -1)
        seen = seen | (o_key == own)
    return seen


@triton.jit
def half_bias(biases, i_h, start, o_row, o_key, n):
    """Half of what is added to the scores of a sequence's rows and keys, which broadcast against each other; of keys
    that a row does not see, whatever is finite."""
    m = (o_key <= o_row) & (o_row < n)
    distance = tl.minimum(tl.maximum(o_row - o_key, 0), biases.num_positions - 1)
    bucket = tl.load(biases.buckets + (start + o_row).to(tl.int64) * biases.longest + o_key, mask=m, other=0)
    b_bias = tl.load(biases.position + i_h * biases.num_positions + distance)
    return 0.5 * (b_bias + tl.load(biases.time + i_h * biases.num_buckets + bucket.to(tl.int32)))


@triton.jit
def load_rows(
    x, stride_t, stride_h, i_h, start, first, n,
    BLOCK: tl.constexpr, SIZE: tl.constexpr, BLOCK_SIZE: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """Rows first..first+BLOCK-1 of a sequence, one head: [BLOCK, BLOCK_SIZE], zeros beyond SIZE.

    Without TMA rows beyond the sequence are zeros; with TMA they are the next sequence's, which the mask must remove.
    """
    if TMA:
        b_x = x.load([i_h, start + first, 0]).reshape(BLOCK, BLOCK_SIZE)
    else:
        o_row = first + tl.arange(0, BLOCK)
        o_size = tl.arange(0, BLOCK_SIZE)
        p_x = x + i_h.to(tl.int64) * stride_h + (start + o_row).to(tl.int64)[:, None] * stride_t + o_size[None, :]
        m_x = (o_row < n)[:, None]
        if SIZE != BLOCK_SIZE:
            m_x = m_x & (o_size < SIZE)[None, :]
        b_x = tl.load(p_x, mask=m_x, other=0.0)
    return b_x


@triton.jit
def twice_slope(b_half, b_sigmoid2):
    """Twice the slope of SiLU at x = 2 b_half: 2 sigmoid(x) (1 + x (1 - sigmoid(x)))."""
    return b_sigmoid2 * (1.0 + b_half * (2.0 - b_sigmoid2))


@triton.jit
def store_rows(
    output, b_x, slot, i_h, start, first, last,
    BLOCK: tl.constexpr, SIZE: tl.constexpr, BLOCK_SIZE: tl.constexpr, SCALED: tl.constexpr,
):  # fmt: skip
    """Writes rows first..last-1 of a sequence, one head, and their sum into a slot of the sums unless those are None.

    With SCALED, what the output holds multiplies what is written over it.
    """
    x, stride_t, stride_h, sums, _, _ = output
    o_row = first + tl.arange(0, BLOCK)
    o_size = tl.arange(0, BLOCK_SIZE)
    p_x = x + i_h.to(tl.int64) * stride_h + (start + o_row).to(tl.int64)[:, None] * stride_t + o_size[None, :]
    m_x = (o_row < last)[:, None] & (o_size < SIZE)[None, :]
    dtype: tl.constexpr = x.dtype.element_ty
    b_x = b_x.to(dtype)
    if SCALED:
        b_factor = tl.load(p_x, mask=m_x, other=0.0)
        b_x = (b_x.to(tl.float32) * b_factor.to(tl.float32)).to(dtype)
    tl.store(p_x, b_x, mask=m_x)
    if sums is not None:
        tl.store(sums + slot.to(tl.int64) * BLOCK_SIZE + o_size, tl.sum(tl.where(m_x, b_x.to(tl.float32), 0.0), 0))


@triton.jit
def store_or_reduce(
    output, b_x, start, item, i_h, H,
    BLOCK: tl.constexpr, SIZE: tl.constexpr, BLOCK_SIZE: tl.constexpr, SPLIT: tl.constexpr, SCALED: tl.constexpr,
):  # fmt: skip
    """Writes the tile, or, where it is split, its part: the part that arrives last adds all parts in their order.

    The order of the sum does not depend on the order of arrival, so the result is the same bits every time.  `start`:
    of the sequence in the output.
    """
    slot = item.home * H + i_h
    if SPLIT:
        if item.parts == 1:
            store_rows(output, b_x, slot, i_h, start, item.first, item.last, BLOCK, SIZE, BLOCK_SIZE, SCALED)
        else:
            o_tile = tl.arange(0, BLOCK)[:, None] * BLOCK_SIZE + tl.arange(0, BLOCK_SIZE)[None, :]
            p_tile = output.partials + slot.to(tl.int64) * (BLOCK * BLOCK_SIZE) + o_tile
            stride_part = H.to(tl.int64) * (BLOCK * BLOCK_SIZE)
            tl.store(p_tile + item.part * stride_part, b_x)
            # All threads' partial sums must be written before one thread announces them.
            tl.debug_barrier()
            arrived = tl.atomic_add(output.arrivals + slot, 1, sem="acq_rel")
            if arrived == item.parts - 1:
                tl.debug_barrier()
                # The next launch counts from 0.
                tl.store(output.arrivals + slot, 0)
                b_sum = tl.zeros([BLOCK, BLOCK_SIZE], tl.float32)
                for i in range(item.parts):
                    # Other processors wrote them: read past the first-level cache.
                    b_sum += tl.load(p_tile + i * stride_part, cache_modifier=".cg")
                store_rows(output, b_sum, slot, i_h, start, item.first, item.last, BLOCK, SIZE, BLOCK_SIZE, SCALED)
    else:
        store_rows(output, b_x, slot, i_h, start, item.first, item.last, BLOCK, SIZE, BLOCK_SIZE, SCALED)


@triton.jit
def product(b_a, b_b, b_sum, PRECISION: tl.constexpr):
    """b_sum + b_a b_b in float32; a PRECISION of "upcast" is for the interpreter, which cannot multiply bfloat16."""
    if PRECISION == "upcast":
        b_product = tl.dot(b_a.to(tl.float32), b_b.to(tl.float32), b_sum)
    else:
        b_product = tl.dot(b_a, b_b, b_sum, input_precision=PRECISION)
    return b_product


@triton.jit
def group_keys(row, row_last, partners, bounds, BLOCK: tl.constexpr, HAS_LOCAL: tl.constexpr):
    """(begin, end): of a tile's live key tiles, those that its rows row..row_last-1 need; none where it has no rows."""
    num_0, num_1, num_2, _, start_1, _ = partners
    _, u, c, g, s, _, _, local = bounds
    num_tiles = num_0 + num_1 + num_2
    begin = 0
    end = num_tiles
    if row >= row_last:
        end = 0
    elif (row >= c) & (row_last <= u):
        end = num_0 + tl.minimum(tl.cdiv(row_last - start_1, BLOCK), num_1)
        if HAS_LOCAL:
            if (num_0 == 0) & (s <= start_1) & (row_last <= g):
                begin = tl.maximum(row - local - start_1, 0) // BLOCK
    return begin, end


@triton.jit
def group_rows(key, key_last, partners, bounds, BLOCK: tl.constexpr):
    """(begin, end): of a tile's live row tiles, those that its keys key..key_last-1 need; none where it has no keys.

    Only without a window.
    """
    num_0, num_1, num_2, _, start_1, _ = partners
    c = bounds.c
    num_tiles = num_0 + num_1 + num_2
    begin = 0
    end = num_tiles
    if key >= key_last:
        end = 0
    elif start_1 >= c:
        if (num_0 == 0) & (key >= c):
            begin = tl.minimum(tl.maximum(key - start_1, 0) // BLOCK, num_1)
    return begin, end


@triton.jit
def part_range(partners, part, parts, SPLIT: tl.constexpr):
    """(begin, end): which of a tile's live partners this item walks."""
    num_tiles = count_partners(partners)
    begin = 0
    end = num_tiles
    if SPLIT:
        if parts > 1:
            begin = num_tiles * part // parts
            end = num_tiles * (part + 1) // parts
    return begin, end
