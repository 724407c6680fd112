"""The tile schedule: which tiles of rows or keys exist, in which order they start, and into how many parts they split.

A small kernel writes the schedule into a table on the device, so nothing waits for the host to learn a length.  The
forward and the dq kernel walk the table of row tiles, the dk/dv kernel the table of key tiles.  An item of the table is

    start, n, u, c, g, s      the sequence: first position, length, end of history, end of context, first unrestricted
                              history row, end of the columns that everyone sees (the last five within the sequence)
    first, last               the tile: rows (or keys) first..last-1 of the sequence, at most one block
    part, parts               which share of the tile's live partners this item walks, of how many
    home                      index of the item with part 0 (where the arrivals of the parts are counted)

Long tiles (rows that see everything, keys that everyone sees) come first and are split into parts whose partial
sums are added in a fixed order; short tiles of the band follow.  Full causal: by falling length, in sections of as many
sequences as the second-level cache holds the partners of.  Where a sequence fills half of the cache, a section is about
16 sequences times heads, so that about eight programs of a large GPU read each partner at the same time.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from attention_kernels.launcher import launch
from attention_kernels.mask import SemiLocalMask
from attention_kernels.rows import power_of_two

# Width of the header and of an item, in int32.  Header: number of items, local, and a counter that starts at 0.
ITEM_SIZE = tl.constexpr(16)
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
class Schedule:
    """One table of tiles on the device, and how far its long tiles may be split."""

    table: Tensor
    """Header and items, [1 + max_items, ITEM_SIZE] int32."""

    split_items: int
    """Slots for the partial sums of split tiles, a head; 0 where no tile is ever split."""

    counters: Tensor
    """Zeros, int32: four arrival counters a slot and head."""

    max_items: int
    """Bound on the number of items that needs no lengths."""


def build(
    mask: SemiLocalMask,
    offsets: Tensor,
    num_targets: Tensor | None,
    *,
    num_positions: int,
    num_heads: int,
    row_block: int | None,
    key_block: int | None,
    split_programs: int,
    position_bytes: int,
) -> tuple[Schedule | None, Schedule | None]:
    """Schedules of row tiles and key tiles (None where no block is given), written by one launch.

    While there are fewer long tiles than `split_programs`, over all heads, they are split into about as many parts.
    `position_bytes` is what the partners of a tile take a position.
    """
    num_sequences = offsets.shape[0] - 1
    by_rows = mask.global_rows > 0 or mask.num_context > 0 or num_targets is not None
    by_keys = mask.global_columns > 0 or mask.num_context > 0
    rows, keys = (
        None
        if block is None
        else _allocate(mask, num_sequences, num_positions, num_heads, block, split_programs * split, offsets.device)
        for block, split in ((row_block, by_rows), (key_block, by_keys))
    )
    tiles = num_positions // min(block for block in (row_block, key_block) if block is not None)
    writers = max(1, min(_MAX_WRITERS, tiles // (_WRITER_TILES * max(1, num_sequences))))
    launch(
        schedule_kernel,
        (num_sequences, writers),
        offsets,
        offsets if num_targets is None else num_targets,
        None if rows is None else rows.table,
        None if keys is None else keys.table,
        None if rows is None else rows.counters,
        None if keys is None else keys.counters,
        num_sequences,
        -1 if mask.local is None else mask.local,
        mask.global_rows,
        mask.global_columns,
        mask.num_context,
        0 if rows is None else rows.split_items,
        0 if keys is None else keys.split_items,
        num_heads,
        max(1, _SECTION_BYTES // position_bytes),
        ROW_BLOCK=row_block,
        KEY_BLOCK=key_block,
        HAS_LOCAL=mask.local is not None,
        HAS_TARGETS=num_targets is not None,
        BLOCK_B=min(128, power_of_two(num_sequences)),
        BLOCK_J=_WRITER_TILES,
        num_warps=4,
    )
    return rows, keys


def _allocate(
    mask: SemiLocalMask,
    num_sequences: int,
    num_positions: int,
    num_heads: int,
    block: int,
    split_programs: int,
    device: torch.device,
) -> Schedule:
    """An unwritten schedule.  Each class of tiles of a sequence ends in a partial tile, hence the bound on items."""
    classes = 1 if mask.local is None else 3
    split_items = max(1, split_programs // num_heads) if split_programs and mask.local is not None else 0
    max_items = num_positions // block + classes * num_sequences + split_items
    end = (1 + max_items) * ITEM_SIZE.value
    table = torch.empty(end + 4 * split_items * num_heads, dtype=torch.int32, device=device)
    return Schedule(table=table, split_items=split_items, counters=table[end:], max_items=max_items)


@triton.jit
def sequence_bounds(
    offsets, num_targets, o_b, B, GLOBAL_ROWS, COLUMNS, CONTEXT, HAS_LOCAL: tl.constexpr, HAS_TARGETS: tl.constexpr
):
    """(start, n, u, c, g, s) of sequences `o_b`, a scalar or a block; an index beyond B is an empty sequence."""
    m_b = o_b < B
    start = tl.load(offsets + o_b, mask=m_b, other=0).to(tl.int32)
    n = tl.load(offsets + o_b + 1, mask=m_b, other=0).to(tl.int32) - start
    u = n
    if HAS_TARGETS:
        u = n - tl.load(num_targets + o_b, mask=m_b, other=0).to(tl.int32)
    c = tl.minimum(u, CONTEXT)
    g = c
    s = c
    if HAS_LOCAL:
        g = tl.maximum(c, u - GLOBAL_ROWS)
        # c + COLUMNS could overflow
        s = c + tl.minimum(u - c, COLUMNS)
    return start, n, u, c, g, s


@triton.jit
def count_tiles(n, c, g, s, BLOCK: tl.constexpr, KEYS: tl.constexpr):
    """(head, tail, short): long tiles at the start and at the end of a sequence, short tiles between or behind."""
    if KEYS:
        tiles = (tl.cdiv(s, BLOCK), n * 0, tl.cdiv(n - s, BLOCK))
    else:
        tiles = (tl.cdiv(c, BLOCK), tl.cdiv(n - g, BLOCK), tl.cdiv(g - c, BLOCK))
    return tiles


@triton.jit
def store_items(table, o_i, m_i, start, n, u, c, g, s, first, last, part, parts):
    p_i = table + (1 + o_i) * ITEM_SIZE
    tl.store(p_i, o_i * 0 + start, mask=m_i)
    tl.store(p_i + 1, o_i * 0 + n, mask=m_i)
    tl.store(p_i + 2, o_i * 0 + u, mask=m_i)
    tl.store(p_i + 3, o_i * 0 + c, mask=m_i)
    tl.store(p_i + 4, o_i * 0 + g, mask=m_i)
    tl.store(p_i + 5, o_i * 0 + s, mask=m_i)
    tl.store(p_i + 6, first, mask=m_i)
    tl.store(p_i + 7, last, mask=m_i)
    tl.store(p_i + 8, o_i * 0 + part, mask=m_i)
    tl.store(p_i + 9, o_i * 0 + parts, mask=m_i)
    tl.store(p_i + 10, o_i - part, mask=m_i)


@triton.jit
def store_header(table, num_items, LOCAL):
    if (tl.program_id(0) == 0) & (tl.program_id(1) == 0):
        tl.store(table, num_items)
        tl.store(table + 1, LOCAL)
        tl.store(table + 2, 0)


@triton.jit
def schedule_by_length(
    table, offsets, num_targets, B, GLOBAL_ROWS, COLUMNS, CONTEXT, LOCAL, SECTION, H,
    BLOCK: tl.constexpr, KEYS: tl.constexpr, HAS_TARGETS: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_J: tl.constexpr,
):  # fmt: skip
    """Full causal: tile j of a sequence has level j (row tiles) or its mirror (key tiles).

    Sections of SECTION positions follow each other; within one, high levels start first.
    """
    i_b = tl.program_id(0)
    start, n, u, c, g, s = sequence_bounds(
        offsets, num_targets, i_b, B, GLOBAL_ROWS, COLUMNS, CONTEXT, False, HAS_TARGETS
    )
    longest = 0
    for first_b in range(0, B, BLOCK_B):
        o_b = first_b + tl.arange(0, BLOCK_B)
        _, other_n, _, _, _, _ = sequence_bounds(
            offsets, num_targets, o_b, B, GLOBAL_ROWS, COLUMNS, CONTEXT, False, HAS_TARGETS
        )
        longest = tl.maximum(longest, tl.max(other_n))
    if longest > SECTION // 2:
        SECTION = tl.minimum(longest, 2**24) * tl.maximum(_MAX_SHARING // H, 1)
    num_tiles = tl.cdiv(n, BLOCK)
    section = start // SECTION
    # At least once, for the header's sake.
    for first_j in range(tl.program_id(1) * BLOCK_J, tl.maximum(num_tiles, 1), tl.num_programs(1) * BLOCK_J):
        o_j = first_j + tl.arange(0, BLOCK_J)
        level = o_j
        if KEYS:
            level = num_tiles - 1 - o_j
        elif CONTEXT > 0:
            # The first tile holds context rows, which see the whole history: it is the longest.
            level = tl.where(o_j == 0, num_tiles - 1, o_j - 1)
        rank = tl.zeros([BLOCK_J], tl.int32)
        total = 0
        for first_b in range(0, B, BLOCK_B):
            o_b = first_b + tl.arange(0, BLOCK_B)
            other_start, other_n, _, _, _, _ = sequence_bounds(
                offsets, num_targets, o_b, B, GLOBAL_ROWS, COLUMNS, CONTEXT, False, HAS_TARGETS
            )
            other_tiles = tl.cdiv(other_n, BLOCK)
            other_section = other_start // SECTION
            total += tl.sum(other_tiles)
            rank += tl.sum(tl.where(other_section < section, other_tiles, 0))
            other_tiles = tl.where(other_section == section, other_tiles, 0)
            higher = tl.maximum(other_tiles[None, :] - 1 - level[:, None], 0)
            equal_before = (o_b[None, :] < i_b) & (other_tiles[None, :] > level[:, None])
            rank += tl.sum(higher + equal_before.to(tl.int32), 1)
        first = o_j * BLOCK
        last = tl.minimum(first + BLOCK, n)
        store_items(table, rank, o_j < num_tiles, start, n, u, c, g, s, first, last, 0, 1)
        store_header(table, total, LOCAL)


@triton.jit
def schedule_long_then_short(
    table, offsets, num_targets, B, GLOBAL_ROWS, COLUMNS, CONTEXT, LOCAL, SPLIT_ITEMS,
    BLOCK: tl.constexpr, KEYS: tl.constexpr, HAS_TARGETS: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_J: tl.constexpr,
):  # fmt: skip
    """Semi-local: the long tiles of all sequences, split into parts while there are few, then the short ones."""
    i_b = tl.program_id(0)
    num_long = 0
    for first_b in range(0, B, BLOCK_B):
        o_b = first_b + tl.arange(0, BLOCK_B)
        _, n, _, c, g, s = sequence_bounds(
            offsets, num_targets, o_b, B, GLOBAL_ROWS, COLUMNS, CONTEXT, True, HAS_TARGETS
        )
        head, tail, _ = count_tiles(n, c, g, s, BLOCK, KEYS)
        num_long += tl.sum(head + tail)
    max_parts = tl.maximum(SPLIT_ITEMS // tl.maximum(num_long, 1), 1)
    # Second pass: where this sequence's long and short items begin.
    long_items, long_before, short_items, short_before = 0, 0, 0, 0
    for first_b in range(0, B, BLOCK_B):
        o_b = first_b + tl.arange(0, BLOCK_B)
        _, n, _, c, g, s = sequence_bounds(
            offsets, num_targets, o_b, B, GLOBAL_ROWS, COLUMNS, CONTEXT, True, HAS_TARGETS
        )
        head, tail, short = count_tiles(n, c, g, s, BLOCK, KEYS)
        items = (head + tail) * tl.minimum(tl.maximum(n // _MIN_PART_LEN, 1), max_parts)
        long_items += tl.sum(items)
        long_before += tl.sum(tl.where(o_b < i_b, items, 0))
        short_items += tl.sum(short)
        short_before += tl.sum(tl.where(o_b < i_b, short, 0))

    start, n, u, c, g, s = sequence_bounds(
        offsets, num_targets, i_b, B, GLOBAL_ROWS, COLUMNS, CONTEXT, True, HAS_TARGETS
    )
    head, tail, short = count_tiles(n, c, g, s, BLOCK, KEYS)
    parts = tl.minimum(tl.maximum(n // _MIN_PART_LEN, 1), max_parts)
    head_end = s if KEYS else c
    short_start = s if KEYS else c
    short_end = n if KEYS else g
    for first_j in range(tl.program_id(1) * BLOCK_J, head + tail, tl.num_programs(1) * BLOCK_J):
        o_j = first_j + tl.arange(0, BLOCK_J)
        first = tl.where(o_j < head, o_j * BLOCK, g + (o_j - head) * BLOCK)
        last = tl.minimum(first + BLOCK, tl.where(o_j < head, head_end, n))
        for part in range(parts):
            o_i = long_before + o_j * parts + part
            store_items(table, o_i, o_j < head + tail, start, n, u, c, g, s, first, last, part, parts)
    for first_j in range(tl.program_id(1) * BLOCK_J, short, tl.num_programs(1) * BLOCK_J):
        o_j = first_j + tl.arange(0, BLOCK_J)
        first = short_start + o_j * BLOCK
        last = tl.minimum(first + BLOCK, short_end)
        o_i = long_items + short_before + o_j
        store_items(table, o_i, o_j < short, start, n, u, c, g, s, first, last, 0, 1)
    store_header(table, long_items + short_items, LOCAL)


@triton.jit
def zero_counters(counters, num_counters, B, BLOCK: tl.constexpr):
    i_writer = tl.program_id(1) * B + tl.program_id(0)
    for first in range(i_writer * BLOCK, num_counters, tl.num_programs(1) * B * BLOCK):
        o_counter = first + tl.arange(0, BLOCK)
        tl.store(counters + o_counter, 0, mask=o_counter < num_counters)


@triton.jit(
    do_not_specialize=[
        *("B", "LOCAL", "GLOBAL_ROWS", "COLUMNS", "CONTEXT"),
        *("ROW_SPLIT_ITEMS", "KEY_SPLIT_ITEMS", "H", "SECTION"),
    ]
)
def schedule_kernel(
    offsets, num_targets, row_table, key_table, row_counters, key_counters, B, LOCAL, GLOBAL_ROWS, COLUMNS, CONTEXT,
    ROW_SPLIT_ITEMS, KEY_SPLIT_ITEMS, H, SECTION, ROW_BLOCK: tl.constexpr, KEY_BLOCK: tl.constexpr,
    HAS_LOCAL: tl.constexpr, HAS_TARGETS: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_J: tl.constexpr,
):  # fmt: skip
    """Programs (b, ...) write the items of sequence b; each reads all lengths to learn where its items belong."""
    if ROW_BLOCK is not None:
        if HAS_LOCAL:
            zero_counters(row_counters, 4 * ROW_SPLIT_ITEMS * H, B, 256)
            schedule_long_then_short(
                row_table, offsets, num_targets, B, GLOBAL_ROWS, COLUMNS, CONTEXT, LOCAL, ROW_SPLIT_ITEMS,
                ROW_BLOCK, False, HAS_TARGETS, BLOCK_B, BLOCK_J,
            )  # fmt: skip
        else:
            schedule_by_length(
                row_table, offsets, num_targets, B, GLOBAL_ROWS, COLUMNS, CONTEXT, LOCAL, SECTION, H,
                ROW_BLOCK, False, HAS_TARGETS, BLOCK_B, BLOCK_J,
            )  # fmt: skip
    if KEY_BLOCK is not None:
        if HAS_LOCAL:
            zero_counters(key_counters, 4 * KEY_SPLIT_ITEMS * H, B, 256)
            schedule_long_then_short(
                key_table, offsets, num_targets, B, GLOBAL_ROWS, COLUMNS, CONTEXT, LOCAL, KEY_SPLIT_ITEMS,
                KEY_BLOCK, True, HAS_TARGETS, BLOCK_B, BLOCK_J,
            )  # fmt: skip
        else:
            schedule_by_length(
                key_table, offsets, num_targets, B, GLOBAL_ROWS, COLUMNS, CONTEXT, LOCAL, SECTION, H,
                KEY_BLOCK, True, HAS_TARGETS, BLOCK_B, BLOCK_J,
            )  # fmt: skip
