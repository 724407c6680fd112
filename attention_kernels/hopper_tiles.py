"""What the warp-specialised kernels share: rings of tiles in shared memory, loaders, the order of items.

A program holds a tile of 128 rows (or keys), 64 a warp group, and streams its live partner tiles.  (The forward without
a window has three groups, 192 rows, at head sizes up to 128.)  Loaders, a warp each, walk the same loops as the groups
and fill rings of buffers ahead of them:

    loader   wait until a buffer is free -> start the TMA load, which announces its own arrival
    groups   wait until the buffer is full -> multiply -> release it (streamed: free when all groups released it)

One loader streams the partner tiles and another fetches what is held, so that neither waits for the other.  Programs
persist, one a multiprocessor: the streaming loader draws the next item from a counter on the device and passes its
number on, one item ahead, and items are loaded while the groups finish the one before.  Which tiles are live is decided
by `tiles.py`, as for the other kernels.

Letters as in `tiles.py`.
"""

import functools
from typing import NamedTuple

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma

from attention_kernels.tiles import (
    group_keys,
    group_rows,
    live_keys,
    live_rows,
    load_item,
    part_range,
    partner_start,
)

GROUP_SIZE = gl.constexpr(64)
"""Rows (or keys) that a warp group holds: what one Hopper matrix instruction multiplies."""
_NUMBERS_AHEAD = gl.constexpr(2)
"""Item numbers that may lie between the loader that draws them and those who use them."""

_GLUON_TYPES = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16, torch.float8_e4m3fn: gl.float8e4nv}


@functools.cache
def block_layout(rows: int, columns: int, dtype: torch.dtype) -> gl.NVMMASharedLayout:
    """Of blocks [1, rows, columns] in shared memory."""
    return gl.NVMMASharedLayout.get_default_for([1, rows, columns], _GLUON_TYPES[dtype])


def thread_registers(groups: int) -> int:
    """A thread's on average: 65,536 over the groups' threads and as many for the loaders as a group has."""
    return 65536 // (128 * (groups + 1)) // 8 * 8


class Ring(NamedTuple):
    """Buffers that a loader fills and one or all groups empty, in turn."""

    buffers: gl.shared_memory_descriptor
    full: gl.shared_memory_descriptor
    empty: gl.shared_memory_descriptor


@gluon.jit
def make_barriers(STAGES: gl.constexpr, READERS: gl.constexpr):
    """(full, empty) of a ring: announced by its one writer, and by each of its readers."""
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=READERS)
    return full, empty


@gluon.jit
def make_ring(descriptor, STAGES: gl.constexpr, READERS: gl.constexpr):
    """A ring of STAGES blocks of the descriptor's, each read by READERS groups."""
    shape: gl.constexpr = descriptor.block_shape
    buffers = gl.allocate_shared_memory(descriptor.dtype, [STAGES, 1, shape[1], shape[2]], descriptor.layout)
    full, empty = make_barriers(STAGES, READERS)
    return Ring(buffers, full, empty)


@gluon.jit
def make_held_rings(first, second, STAGES: gl.constexpr):
    """For each group its own rings of what it holds: blocks of two tensors."""
    return (
        (make_ring(first, STAGES, 1), make_ring(second, STAGES, 1)),
        (make_ring(first, STAGES, 1), make_ring(second, STAGES, 1)),
    )


@gluon.jit
def wait_empty(ring, i_use):
    """Writer of a ring: the stage of the i_use-th filling, once its readers have released what was there."""
    STAGES: gl.constexpr = ring.full.shape[0]
    stage = i_use % STAGES
    mbarrier.wait(ring.empty.index(stage), (i_use // STAGES + 1) & 1)
    return stage


@gluon.jit
def load_block(ring, descriptor, i_use, start):
    """Loader: the i_use-th filling of a ring, the descriptor's block that starts at `start`."""
    stage = wait_empty(ring, i_use)
    mbarrier.expect(ring.full.index(stage), descriptor.block_type.nbytes)
    tma.async_copy_global_to_shared(descriptor, start, ring.full.index(stage), ring.buffers.index(stage))


@gluon.jit
def wait_block(ring, i_use):
    """Group: the block [rows, size] of the i_use-th filling, once it is there."""
    STAGES: gl.constexpr = ring.full.shape[0]
    stage = i_use % STAGES
    mbarrier.wait(ring.full.index(stage), (i_use // STAGES) & 1)
    return ring.buffers.index(stage).reshape([ring.buffers.shape[2], ring.buffers.shape[3]])


@gluon.jit
def release(ring, i_use):
    """Group: done with the i_use-th filling."""
    mbarrier.arrive(ring.empty.index(i_use % ring.full.shape[0]))


@gluon.jit
def pass_by(rings, first, last):
    """Group: leaves the fillings first..last-1 of streaming rings to the other groups."""
    for i_use in range(first, last):
        for i in gl.static_range(len(rings)):
            wait_block(rings[i], i_use)
            release(rings[i], i_use)


@gluon.jit
def make_order(GROUPS: gl.constexpr = 2):
    """The ring that carries item numbers from the loader that draws them to the other loader and the groups."""
    NUMBER_LAYOUT: gl.constexpr = gl.SwizzledSharedLayout(vec=1, per_phase=1, max_phase=1, order=[0])
    buffers = gl.allocate_shared_memory(gl.int32, [_NUMBERS_AHEAD, 1], NUMBER_LAYOUT)
    full, empty = make_barriers(_NUMBERS_AHEAD, GROUPS + 1)
    return Ring(buffers, full, empty)


@gluon.jit
def draw_number(order, table, i_use):
    """Streaming loader: the number of the next item, passed on.  The first items are the programs' own numbers."""
    NUMBER: gl.constexpr = gl.BlockedLayout([1], [32], [gl.num_warps()], [0])
    number = gl.num_programs(0) + gl.atomic_add(table + 2, 1, sem="relaxed")
    stage = wait_empty(order, i_use)
    order.buffers.index(stage).store(gl.full([1], number, gl.int32, NUMBER))
    mbarrier.arrive(order.full.index(stage))
    return number


@gluon.jit
def next_number(order, i_use):
    """Everyone else: the number of the next item."""
    NUMBER: gl.constexpr = gl.BlockedLayout([1], [32], [gl.num_warps()], [0])
    stage = i_use % _NUMBERS_AHEAD
    mbarrier.wait(order.full.index(stage), (i_use // _NUMBERS_AHEAD) & 1)
    number = gl.max(order.buffers.index(stage).load(NUMBER), 0)
    mbarrier.arrive(order.empty.index(stage))
    return number


@gluon.jit
def load_held_tiles(descriptors, rings, order, table, H):
    """Loader of what a program holds of each item: for each tuple of `rings`, GROUP_SIZE rows of each tensor."""
    num_items = gl.load(table) * H
    number = gl.program_id(0)
    i_item = 0
    while number < num_items:
        start, _, first, _, _, _, _ = load_item(table, number // H)
        for group in gl.static_range(len(rings)):
            for i in gl.static_range(len(rings[group])):
                position = start + first + group * GROUP_SIZE
                load_block(rings[group][i], descriptors[i], i_item, [number % H, position, 0])
        number = next_number(order, i_item)
        i_item += 1


@gluon.jit
def live_partners(first, last, bounds, BLOCK: gl.constexpr, BY_ROWS: gl.constexpr, HAS_LOCAL: gl.constexpr):
    """The live tiles of keys of a row tile first..last-1 (BY_ROWS), or of rows of a key tile."""
    if BY_ROWS:
        partners = live_keys(first, last, bounds, BLOCK, HAS_LOCAL)
    else:
        partners = live_rows(first, last, bounds, BLOCK, HAS_LOCAL)
    return partners


@gluon.jit
def load_partner_tiles(
    descriptors, rings, order, table, H,
    BLOCK: gl.constexpr, BY_ROWS: gl.constexpr, HAS_LOCAL: gl.constexpr, SPLIT: gl.constexpr,
):  # fmt: skip
    """Loader of what streams: keys and values of row tiles (BY_ROWS), rows and their gradients of key tiles."""
    num_items = gl.load(table) * H
    number = gl.program_id(0)
    i_item = 0
    i_use = 0
    while number < num_items:
        start, bounds, first, last, part, parts, _ = load_item(table, number // H)
        next_item = draw_number(order, table, i_item)
        partners = live_partners(first, last, bounds, BLOCK, BY_ROWS, HAS_LOCAL)
        lo, hi = part_range(partners, part, parts, SPLIT)
        for j in range(lo, hi):
            position = start + partner_start(j, partners, BLOCK)
            for i in gl.static_range(len(rings)):
                load_block(rings[i], descriptors[i], i_use, [number % H, position, 0])
            i_use += 1
        number = next_item
        i_item += 1


@gluon.jit
def partners_of_group(
    first, last, part, parts, bounds,
    GROUP: gl.constexpr, BLOCK: gl.constexpr, BY_ROWS: gl.constexpr, HAS_LOCAL: gl.constexpr, SPLIT: gl.constexpr,
):  # fmt: skip
    """A group's first row (or key) of a tile first..last-1, the tile's partners, and (lo, begin, end, hi).

    Of the partners lo..hi-1 stream past for this item, and the group needs begin..end-1.
    """
    partners = live_partners(first, last, bounds, BLOCK, BY_ROWS, HAS_LOCAL)
    lo, hi = part_range(partners, part, parts, SPLIT)
    own = first + GROUP * GROUP_SIZE
    own_last = gl.minimum(own + GROUP_SIZE, last)
    if BY_ROWS:
        front, back = group_keys(own, own_last, partners, bounds, BLOCK, HAS_LOCAL)
    else:
        front, back = group_rows(own, own_last, partners, bounds, BLOCK, HAS_LOCAL)
    begin = gl.minimum(gl.maximum(lo, front), hi)
    end = gl.maximum(gl.minimum(hi, back), begin)
    return own, partners, lo, begin, end, hi
