"""The items of a schedule as kernels store and load them: a tile, the sequence that it belongs to, its part.

Letters: i_ index, o_ offsets, p_ pointer, m_ mask.
"""

from typing import NamedTuple

import triton
import triton.language as tl

ITEM_SIZE = tl.constexpr(16)
"""Width of the header and of an item, in int32.  Header: number of items, local."""


class Bounds(NamedTuple):
    """Where the parts of a sequence end, from its first token on, and its window."""

    n: tl.tensor
    """Length of the sequence."""
    u: tl.tensor
    """Where its history ends."""
    c: tl.tensor
    """Where its context ends."""
    g: tl.tensor
    """First unrestricted history row."""
    s: tl.tensor
    """End of the columns that everyone sees."""
    r: tl.tensor
    """First row behind the context that is computed: c, or later."""
    e: tl.tensor
    """End of the context rows that are computed: c, or 0."""
    local: tl.tensor
    """Width of the band; -1: full causal."""


class Item(NamedTuple):
    """A tile of rows (or of keys), or a part of its work."""

    start: tl.tensor
    """First position of the sequence among keys and values."""
    row_start: tl.tensor
    """As `start`, among rows: row i of the sequence lies at row_start + i.  It differs where not all
    positions are rows; context rows then lie before the others, r - e further on (`row_range`)."""
    bounds: Bounds
    first: tl.tensor
    last: tl.tensor
    """Rows (or keys) first..last-1 of the sequence, at most one block."""
    part: tl.tensor
    parts: tl.tensor
    """Which share of the tile's live partners this item walks, of how many."""
    home: tl.tensor
    """Index of the item with part 0, where the arrivals of the parts are counted."""


@triton.jit
def store_items(table, o_i, m_i, start, row_start, bounds, first, last, part, parts):
    """A block of items of one sequence; what is the same for all of them is spread over the block by `o_i * 0`."""
    p_i = table + (1 + o_i) * ITEM_SIZE
    tl.store(p_i, o_i * 0 + start, mask=m_i)
    tl.store(p_i + 1, o_i * 0 + row_start, mask=m_i)
    tl.store(p_i + 2, o_i * 0 + bounds.n, mask=m_i)
    tl.store(p_i + 3, o_i * 0 + bounds.u, mask=m_i)
    tl.store(p_i + 4, o_i * 0 + bounds.c, mask=m_i)
    tl.store(p_i + 5, o_i * 0 + bounds.g, mask=m_i)
    tl.store(p_i + 6, o_i * 0 + bounds.s, mask=m_i)
    tl.store(p_i + 7, o_i * 0 + bounds.r, mask=m_i)
    tl.store(p_i + 8, first, mask=m_i)
    tl.store(p_i + 9, last, mask=m_i)
    tl.store(p_i + 10, o_i * 0 + part, mask=m_i)
    tl.store(p_i + 11, o_i * 0 + parts, mask=m_i)
    tl.store(p_i + 12, o_i - part, mask=m_i)
    tl.store(p_i + 13, o_i * 0 + bounds.e, mask=m_i)


@triton.jit
def load_item(table, i_item):
    """The item of that index; beyond the table's end it is rubbish."""
    p_i = table + (1 + i_item) * ITEM_SIZE
    bounds = Bounds(
        tl.load(p_i + 2), tl.load(p_i + 3), tl.load(p_i + 4), tl.load(p_i + 5), tl.load(p_i + 6), tl.load(p_i + 7),
        tl.load(p_i + 13), tl.load(table + 1),
    )  # fmt: skip
    return Item(
        tl.load(p_i), tl.load(p_i + 1), bounds,
        tl.load(p_i + 8), tl.load(p_i + 9), tl.load(p_i + 10), tl.load(p_i + 11), tl.load(p_i + 12),
    )  # fmt: skip


@triton.jit
def item_of_program(table, H):
    """(whether there is one, the item, its head) of a program of a grid of items times heads, as many as can be."""
    i_item = tl.program_id(0) // H
    # Loaded beside the number of items, not after it.
    item = load_item(table, i_item)
    return i_item < tl.load(table), item, tl.program_id(0) % H


@triton.jit
def load_parts(table, o_i, m_i):
    """Which share of its tile's work each item walks; 1 where `m_i` is not set."""
    return tl.load(table + (1 + o_i) * ITEM_SIZE + 10, mask=m_i, other=1)


@triton.jit
def store_header(table, num_items, LOCAL):
    if (tl.program_id(0) == 0) & (tl.program_id(1) == 0):
        tl.store(table, num_items)
        tl.store(table + 1, LOCAL)
