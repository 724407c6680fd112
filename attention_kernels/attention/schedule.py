"""The tile schedule: which tiles of rows or keys exist, in which order they start, and into how many parts they split.

A small kernel writes the schedule into a table on the device, so nothing waits for the host to learn a length.  The
forward and the dq kernel walk the table of row tiles, the dk/dv kernel the table of key tiles.  `items.py` says what an
item of a table is.

Long tiles (rows that see everything, keys that everyone sees) come first and are split into parts whose partial
sums are added in a fixed order; short tiles of the band follow.  Full causal: by falling length, in sections of as many
sequences as the second-level cache holds the partners of.  Where a sequence fills half of the cache, a section is about
16 sequences times heads, so that about eight programs of a large GPU read each partner at the same time.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from attention_kernels.attention.items import ITEM_SIZE, Bounds, store_header, store_items
from attention_kernels.attention.plan import AttentionPlan, Schedule
from attention_kernels.launcher import launch
from attention_kernels.rows import power_of_two

# Bytes of partner tiles that stay in the second-level cache while a section is worked on: half of a Hopper GPU's.
_SECTION_BYTES = 24 * 2**20
# Sequences times heads of a section whose sequences do not fit the cache.
_MAX_SHARING = tl.constexpr(16)
# Tiles that a program of the schedule's kernel writes at once, and most programs for one sequence.
_WRITER_TILES = 64
_MAX_WRITERS = 16
# A part walks at least about this many positions.
_MIN_PART_LEN = tl.constexpr(512)


@dataclass(frozen=True, kw_only=True, slots=True)
class Shape:
    """What decides a plan's tables beside the plan: sizes of the tensors and how kernels cut them."""

    num_rows: int
    num_positions: int
    num_heads: int
    position_bytes: int
    """What the partners of a tile take a position."""
    split_programs: int
    """While there are fewer long tiles, over all heads, they are split into about as many parts."""


def schedules(
    plan: AttentionPlan, shape: Shape, *, row_block: int | None, key_block: int | None
) -> tuple[Schedule | None, Schedule | None]:
    """The plan's schedules of row tiles and key tiles (None where no block is given).

    What the plan does not have yet is written by one launch.
    """
    row_name, key_name = (shape, "rows", row_block), (shape, "keys", key_block)
    rows, keys = plan.schedules.get(row_name), plan.schedules.get(key_name)
    new_rows = row_block if rows is None else None
    new_keys = key_block if keys is None else None
    if new_rows is not None or new_keys is not None:
        built_rows, built_keys = _build(plan, shape, new_rows, new_keys)
        if built_rows is not None:
            rows = plan.schedules[row_name] = built_rows
        if built_keys is not None:
            keys = plan.schedules[key_name] = built_keys
    return rows, keys


def _build(
    plan: AttentionPlan, shape: Shape, row_block: int | None, key_block: int | None
) -> tuple[Schedule | None, Schedule | None]:
    """Schedules with these blocks, at least one of which is given."""
    mask, num_targets, computed = plan.mask, plan.num_targets, plan.rows
    num_sequences = plan.offsets.shape[0] - 1
    by_rows = mask.global_rows > 0 or mask.num_context > 0 or num_targets is not None
    # The rows that context is seen by are all; where not all are computed, they are few.
    by_keys = (mask.global_columns > 0 or mask.num_context > 0) and computed is None
    rows = row_block and _allocate(plan, shape, row_block, shape.num_rows, by_rows)
    keys = key_block and _allocate(plan, shape, key_block, shape.num_positions, by_keys)
    tiles = shape.num_positions // min(block for block in (row_block, key_block) if block is not None)
    writers = max(1, min(_MAX_WRITERS, tiles // (_WRITER_TILES * max(1, num_sequences))))
    launch(
        schedule_kernel,
        (num_sequences, writers),
        plan.offsets,
        plan.offsets if num_targets is None else num_targets,
        plan.row_offsets,
        rows.table if rows else None,
        keys.table if keys else None,
        rows.counters if rows else None,
        keys.counters if keys else None,
        num_sequences,
        -1 if mask.local is None else mask.local,
        mask.global_rows,
        mask.global_columns,
        mask.num_context,
        0 if computed is None else computed.newest,
        mask.num_context if computed is not None and computed.context else 0,
        rows.split_items if rows else 0,
        keys.split_items if keys else 0,
        shape.num_heads,
        max(1, _SECTION_BYTES // shape.position_bytes),
        ROW_BLOCK=row_block,
        KEY_BLOCK=key_block,
        HAS_LOCAL=mask.local is not None,
        HAS_TARGETS=num_targets is not None,
        SOME_ROWS=computed is not None,
        BLOCK_B=min(128, power_of_two(num_sequences)),
        BLOCK_J=_WRITER_TILES,
        num_warps=4,
    )
    return rows or None, keys or None


def _allocate(plan: AttentionPlan, shape: Shape, block: int, num_tiled: int, splits: bool) -> Schedule:
    """An unwritten schedule.  Each class of tiles of a sequence ends in a partial tile, hence the bound on items."""
    heads, num_sequences = shape.num_heads, plan.offsets.shape[0] - 1
    classes = 1 if plan.mask.local is None else 3
    split_items = max(1, shape.split_programs // heads) if splits and plan.mask.local is not None else 0
    max_items = num_tiled // block + classes * num_sequences + split_items
    end = (1 + max_items) * ITEM_SIZE.value
    size = end + ITEM_SIZE.value + 4 * split_items * heads
    table = torch.empty(size, dtype=torch.int32, device=plan.offsets.device)
    return Schedule(
        table=table[:end],
        split_items=split_items,
        counters=table[end:],
        arrivals=table[end + ITEM_SIZE.value :],
        max_items=max_items,
    )


class Limits(NamedTuple):
    """What holds for all sequences: the mask, and which rows are computed where not all are."""

    global_rows: tl.tensor
    columns: tl.tensor
    context: tl.tensor
    newest: tl.tensor
    """Newest history rows that are computed."""
    context_rows: tl.tensor
    """At most so many context rows."""
    local: tl.tensor


@triton.jit
def sequence_bounds(
    offsets, num_targets, o_b, B, limits,
    HAS_LOCAL: tl.constexpr, HAS_TARGETS: tl.constexpr, SOME_ROWS: tl.constexpr,
):  # fmt: skip
    """(start, bounds) of sequences `o_b`, a scalar or a block; an index beyond B is an empty sequence."""
    m_b = o_b < B
    start = tl.load(offsets + o_b, mask=m_b, other=0).to(tl.int32)
    n = tl.load(offsets + o_b + 1, mask=m_b, other=0).to(tl.int32) - start
    u = n
    if HAS_TARGETS:
        u = n - tl.load(num_targets + o_b, mask=m_b, other=0).to(tl.int32)
    c = tl.minimum(u, limits.context)
    g = c
    s = c
    if HAS_LOCAL:
        g = tl.maximum(c, u - limits.global_rows)
        # Not c + columns, which could overflow.
        s = c + tl.minimum(u - c, limits.columns)
    r = c
    e = c
    if SOME_ROWS:
        r = tl.maximum(c, u - limits.newest)
        e = tl.minimum(c, limits.context_rows)
    return start, Bounds(n, u, c, g, s, r, e, limits.local)


@triton.jit
def count_tiles(bounds, BLOCK: tl.constexpr, KEYS: tl.constexpr):
    """(head, tail, short): long tiles at the start and at the end of a sequence, short tiles between or behind.

    Of one sequence or of a block of them: `n * 0` is a 0 for each.
    """
    n, _, _, g, s, r, e, _ = bounds
    if KEYS:
        tiles = (tl.cdiv(s, BLOCK), n * 0, tl.cdiv(n - s, BLOCK))
    else:
        g = tl.maximum(g, r)
        tiles = (tl.cdiv(e, BLOCK), tl.cdiv(n - g, BLOCK), tl.cdiv(g - r, BLOCK))
    return tiles


@triton.jit
def schedule_by_length(
    table, offsets, num_targets, B, limits, SECTION, H,
    BLOCK: tl.constexpr, KEYS: tl.constexpr, HAS_TARGETS: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_J: tl.constexpr,
):  # fmt: skip
    """Full causal: tile j of a sequence has level j (row tiles) or its mirror (key tiles).

    Sections of SECTION positions follow each other; within one, high levels start first.
    """
    i_b = tl.program_id(0)
    start, bounds = sequence_bounds(offsets, num_targets, i_b, B, limits, False, HAS_TARGETS, False)
    longest = 0
    for first_b in range(0, B, BLOCK_B):
        o_b = first_b + tl.arange(0, BLOCK_B)
        _, other = sequence_bounds(offsets, num_targets, o_b, B, limits, False, HAS_TARGETS, False)
        longest = tl.maximum(longest, tl.max(other.n))
    if longest > SECTION // 2:
        SECTION = tl.minimum(longest, 2**24) * tl.maximum(_MAX_SHARING // H, 1)
    num_tiles = tl.cdiv(bounds.n, BLOCK)
    section = start // SECTION
    # At least one round, because the first program also writes the header.
    for first_j in range(tl.program_id(1) * BLOCK_J, tl.maximum(num_tiles, 1), tl.num_programs(1) * BLOCK_J):
        o_j = first_j + tl.arange(0, BLOCK_J)
        level = o_j
        if KEYS:
            level = num_tiles - 1 - o_j
        elif limits.context > 0:
            # The first tile holds context rows, which see the whole history: it is the longest.
            level = tl.where(o_j == 0, num_tiles - 1, o_j - 1)
        rank = tl.zeros([BLOCK_J], tl.int32)
        total = 0
        for first_b in range(0, B, BLOCK_B):
            o_b = first_b + tl.arange(0, BLOCK_B)
            other_start, other = sequence_bounds(offsets, num_targets, o_b, B, limits, False, HAS_TARGETS, False)
            other_tiles = tl.cdiv(other.n, BLOCK)
            other_section = other_start // SECTION
            total += tl.sum(other_tiles)
            rank += tl.sum(tl.where(other_section < section, other_tiles, 0))
            other_tiles = tl.where(other_section == section, other_tiles, 0)
            higher = tl.maximum(other_tiles[None, :] - 1 - level[:, None], 0)
            equal_before = (o_b[None, :] < i_b) & (other_tiles[None, :] > level[:, None])
            rank += tl.sum(higher + equal_before.to(tl.int32), 1)
        first = o_j * BLOCK
        last = tl.minimum(first + BLOCK, bounds.n)
        store_items(table, rank, o_j < num_tiles, start, start, bounds, first, last, 0, 1)
        store_header(table, total, limits.local)


@triton.jit
def schedule_long_then_short(
    table, offsets, num_targets, row_offsets, B, limits, SPLIT_ITEMS,
    BLOCK: tl.constexpr, KEYS: tl.constexpr, HAS_TARGETS: tl.constexpr, SOME_ROWS: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_J: tl.constexpr,
):  # fmt: skip
    """Semi-local: the long tiles of all sequences, split into parts while there are few, then the short ones."""
    i_b = tl.program_id(0)
    num_long = 0
    for first_b in range(0, B, BLOCK_B):
        o_b = first_b + tl.arange(0, BLOCK_B)
        _, bounds = sequence_bounds(offsets, num_targets, o_b, B, limits, True, HAS_TARGETS, SOME_ROWS)
        head, tail, _ = count_tiles(bounds, BLOCK, KEYS)
        num_long += tl.sum(head + tail)
    max_parts = tl.maximum(SPLIT_ITEMS // tl.maximum(num_long, 1), 1)
    # Second pass: where this sequence's long and short items begin.
    long_items, long_before, short_items, short_before = 0, 0, 0, 0
    for first_b in range(0, B, BLOCK_B):
        o_b = first_b + tl.arange(0, BLOCK_B)
        _, bounds = sequence_bounds(offsets, num_targets, o_b, B, limits, True, HAS_TARGETS, SOME_ROWS)
        head, tail, short = count_tiles(bounds, BLOCK, KEYS)
        items = (head + tail) * tl.minimum(tl.maximum(bounds.n // _MIN_PART_LEN, 1), max_parts)
        long_items += tl.sum(items)
        long_before += tl.sum(tl.where(o_b < i_b, items, 0))
        short_items += tl.sum(short)
        short_before += tl.sum(tl.where(o_b < i_b, short, 0))

    start, bounds = sequence_bounds(offsets, num_targets, i_b, B, limits, True, HAS_TARGETS, SOME_ROWS)
    n, _, _, g, s, r, e, _ = bounds
    # Context rows come first among a sequence's rows, the others right behind them.
    context_start = start
    row_start = start
    if SOME_ROWS:
        context_start = tl.load(row_offsets + i_b).to(tl.int32)
        row_start = context_start + e - r
    head, tail, short = count_tiles(bounds, BLOCK, KEYS)
    parts = tl.minimum(tl.maximum(n // _MIN_PART_LEN, 1), max_parts)
    head_end = s if KEYS else e
    head_start = row_start if KEYS else context_start
    short_start = s if KEYS else r
    short_end = n if KEYS else g
    tail_start = tl.maximum(g, r)
    for first_j in range(tl.program_id(1) * BLOCK_J, head + tail, tl.num_programs(1) * BLOCK_J):
        o_j = first_j + tl.arange(0, BLOCK_J)
        first = tl.where(o_j < head, o_j * BLOCK, tail_start + (o_j - head) * BLOCK)
        last = tl.minimum(first + BLOCK, tl.where(o_j < head, head_end, n))
        own_start = tl.where(o_j < head, head_start, row_start)
        for part in range(parts):
            o_i = long_before + o_j * parts + part
            store_items(table, o_i, o_j < head + tail, start, own_start, bounds, first, last, part, parts)
    for first_j in range(tl.program_id(1) * BLOCK_J, short, tl.num_programs(1) * BLOCK_J):
        o_j = first_j + tl.arange(0, BLOCK_J)
        first = short_start + o_j * BLOCK
        last = tl.minimum(first + BLOCK, short_end)
        o_i = long_items + short_before + o_j
        store_items(table, o_i, o_j < short, start, row_start, bounds, first, last, 0, 1)
    store_header(table, long_items + short_items, limits.local)


@triton.jit
def zero_counters(counters, num_counters, B, BLOCK: tl.constexpr):
    i_writer = tl.program_id(1) * B + tl.program_id(0)
    for first in range(i_writer * BLOCK, num_counters, tl.num_programs(1) * B * BLOCK):
        o_counter = first + tl.arange(0, BLOCK)
        tl.store(counters + o_counter, 0, mask=o_counter < num_counters)


@triton.jit
def write_schedule(
    table, counters, offsets, num_targets, row_offsets, B, limits, SPLIT_ITEMS, H, SECTION,
    BLOCK: tl.constexpr, KEYS: tl.constexpr, HAS_LOCAL: tl.constexpr, HAS_TARGETS: tl.constexpr,
    SOME_ROWS: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_J: tl.constexpr,
):  # fmt: skip
    """One table, and zeros to count in."""
    zero_counters(counters, 4 * SPLIT_ITEMS * H + ITEM_SIZE, B, 256)
    if HAS_LOCAL:
        schedule_long_then_short(
            table, offsets, num_targets, row_offsets, B, limits, SPLIT_ITEMS,
            BLOCK, KEYS, HAS_TARGETS, SOME_ROWS, BLOCK_B, BLOCK_J,
        )  # fmt: skip
    else:
        schedule_by_length(
            table, offsets, num_targets, B, limits, SECTION, H,
            BLOCK, KEYS, HAS_TARGETS, BLOCK_B, BLOCK_J,
        )  # fmt: skip


@triton.jit(
    do_not_specialize=[
        *("B", "LOCAL", "GLOBAL_ROWS", "COLUMNS", "CONTEXT", "NEWEST", "CONTEXT_ROWS"),
        *("ROW_SPLIT_ITEMS", "KEY_SPLIT_ITEMS", "H", "SECTION"),
    ]
)
def schedule_kernel(
    offsets, num_targets, row_offsets, row_table, key_table, row_counters, key_counters,
    B, LOCAL, GLOBAL_ROWS, COLUMNS, CONTEXT, NEWEST, CONTEXT_ROWS, ROW_SPLIT_ITEMS, KEY_SPLIT_ITEMS, H, SECTION,
    ROW_BLOCK: tl.constexpr, KEY_BLOCK: tl.constexpr, HAS_LOCAL: tl.constexpr, HAS_TARGETS: tl.constexpr,
    SOME_ROWS: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_J: tl.constexpr,
):  # fmt: skip
    """Programs (b, ...) write the items of sequence b; each reads all lengths to learn where its items belong."""
    limits = Limits(GLOBAL_ROWS, COLUMNS, CONTEXT, NEWEST, CONTEXT_ROWS, LOCAL)
    if ROW_BLOCK is not None:
        write_schedule(
            row_table, row_counters, offsets, num_targets, row_offsets, B, limits, ROW_SPLIT_ITEMS, H, SECTION,
            ROW_BLOCK, False, HAS_LOCAL, HAS_TARGETS, SOME_ROWS, BLOCK_B, BLOCK_J,
        )  # fmt: skip
    if KEY_BLOCK is not None:
        write_schedule(
            key_table, key_counters, offsets, num_targets, row_offsets, B, limits, KEY_SPLIT_ITEMS, H, SECTION,
            KEY_BLOCK, True, HAS_LOCAL, HAS_TARGETS, SOME_ROWS, BLOCK_B, BLOCK_J,
        )  # fmt: skip
