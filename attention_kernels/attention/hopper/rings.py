"""What the warp-specialised kernels share: rings of tiles in shared memory, loaders, the walk over items.

A program holds a tile of 128 rows (or keys), 64 a warp group, and streams its live partner tiles.  (The forward without
a window has three groups, 192 rows, at head sizes up to 128.)  Loaders, a warp each, walk the same loops as the groups
and fill rings of buffers ahead of them:

    loader   wait until a buffer is free -> start the TMA load, which announces its own arrival
    groups   wait until the buffer is full -> multiply -> release it (streamed: free when all groups released it)

One loader streams the partner tiles and another fetches what is held, so that neither waits for the other.  Programs
persist, one a multiprocessor: the streaming loader draws the next item from a counter on the device and passes its
number on, one item ahead, and items are loaded while the groups finish the one before.  Which tiles are live is decided
by `tiles.py`, as for the other kernels.  A page on all of this: "Inside a Hopper kernel" in the package's README.

Letters as in `tiles.py`; i_item counts the items of a program, i_use the tiles that have streamed past.
"""

import functools
from typing import NamedTuple

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma

from attention_kernels.attention.items import load_item
from attention_kernels.attention.tiles import (
    Partners,
    group_keys,
    group_rows,
    live_keys,
    live_rows,
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
    """The layout in shared memory of blocks [1, rows, columns]."""
    return gl.NVMMASharedLayout.get_default_for([1, rows, columns], _GLUON_TYPES[dtype])


def thread_registers(groups: int) -> int:
    """A thread's on average: 65,536 over the groups' threads and as many for the loaders as a group has."""
    return 65536 // (128 * (groups + 1)) // 8 * 8


class Ring(NamedTuple):
    """Buffers that a loader fills and one or all groups empty, in turn."""

    buffers: gl.shared_memory_descriptor
    full: gl.shared_memory_descriptor
    empty: gl.shared_memory_descriptor


class Queue(NamedTuple):
    """The items of a launch, number by number: item number // H of the table, head number % H."""

    table: gl.tensor
    H: gl.tensor
    counters: gl.tensor
    """The first counts the numbers drawn."""
    order: Ring
    """Carries them to all but the one who draws."""


class Walk(NamedTuple):
    """The partner tiles of an item as one of its groups sees them.

    Tiles lo..hi-1 of `partners` stream past for this item, of which the group needs begin..end-1.
    """

    own: gl.tensor
    """The group's first row (or key)."""
    partners: Partners
    lo: gl.tensor
    begin: gl.tensor
    end: gl.tensor
    hi: gl.tensor


@gluon.jit
def make_barriers(STAGES: gl.constexpr, READERS: gl.constexpr):
    """(full, empty) of a ring: announced by its one writer, and by each of its readers.

    Only for a ring that is waited for.  The compiler gives the memory of barriers that nobody uses to buffers made
    later, and what a Hopper GPU does with memory that was set up as a barrier and is then written as data is
    undefined: where processes take turns on the GPU, it came back as NaN.
    """
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=READERS)
    return full, empty


@gluon.jit
def make_buffers(descriptor, STAGES: gl.constexpr):
    """STAGES blocks of the descriptor's."""
    shape: gl.constexpr = descriptor.block_shape
    return gl.allocate_shared_memory(descriptor.dtype, [STAGES, 1, shape[1], shape[2]], descriptor.layout)


@gluon.jit
def make_ring(descriptor, STAGES: gl.constexpr, READERS: gl.constexpr):
    """A ring of STAGES blocks of the descriptor's, each read by READERS groups."""
    full, empty = make_barriers(STAGES, READERS)
    return Ring(make_buffers(descriptor, STAGES), full, empty)


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
def make_queue(table, counters, H, GROUPS: gl.constexpr = 2):
    """The items of a launch; one loader draws their numbers, the other loader and the groups are told."""
    NUMBER_LAYOUT: gl.constexpr = gl.SwizzledSharedLayout(vec=1, per_phase=1, max_phase=1, order=[0])
    buffers = gl.allocate_shared_memory(gl.int32, [_NUMBERS_AHEAD, 1], NUMBER_LAYOUT)
    full, empty = make_barriers(_NUMBERS_AHEAD, GROUPS + 1)
    return Queue(table, H, counters, Ring(buffers, full, empty))


@gluon.jit
def draw_number(queue, num_numbers, i_item):
    """Streaming loader: the number of the next item, passed on.  The first items are the programs' own numbers."""
    NUMBER: gl.constexpr = gl.BlockedLayout([1], [32], [gl.num_warps()], [0])
    order = queue.order
    drawn = gl.atomic_add(queue.counters, 1, sem="relaxed")
    # Every item's program draws once, so this draw is the last one: the next launch finds a zero.
    if drawn == num_numbers - 1:
        gl.store(queue.counters, 0)
    number = gl.num_programs(0) + drawn
    stage = wait_empty(order, i_item)
    order.buffers.index(stage).store(gl.full([1], number, gl.int32, NUMBER))
    mbarrier.arrive(order.full.index(stage))
    return number


@gluon.jit
def next_number(queue, i_item):
    """Everyone else: the number of the next item."""
    NUMBER: gl.constexpr = gl.BlockedLayout([1], [32], [gl.num_warps()], [0])
    order = queue.order
    stage = i_item % _NUMBERS_AHEAD
    mbarrier.wait(order.full.index(stage), (i_item // _NUMBERS_AHEAD) & 1)
    number = gl.max(order.buffers.index(stage).load(NUMBER), 0)
    mbarrier.arrive(order.empty.index(stage))
    return number


@gluon.jit
def each_item(queue, role, arguments, DRAWS: gl.constexpr = False):
    """A role of a program: role(item, i_h, i_item, i_use, *arguments) for every item, which returns the next i_use.

    DRAWS: of the role whose warps draw the numbers.
    """
    num_numbers = gl.load(queue.table) * queue.H
    number = gl.program_id(0)
    i_item = 0
    i_use = 0
    while number < num_numbers:
        item = load_item(queue.table, number // queue.H)
        if DRAWS:
            following = draw_number(queue, num_numbers, i_item)
        i_use = role(item, number % queue.H, i_item, i_use, *arguments)
        if not DRAWS:
            following = next_number(queue, i_item)
        number = following
        i_item += 1


@gluon.jit
def load_held(item, i_h, i_item, i_use, descriptors, rings, HOLDS_ROWS: gl.constexpr):
    """Loader of what a program holds: for each tuple of `rings`, GROUP_SIZE rows (or keys) of each tensor."""
    start = item.row_start if HOLDS_ROWS else item.start
    for group in gl.static_range(len(rings)):
        for i in gl.static_range(len(rings[group])):
            position = start + item.first + group * GROUP_SIZE
            load_block(rings[group][i], descriptors[i], i_item, [i_h, position, 0])
    return i_use


@gluon.jit
def load_held_tiles(queue, descriptors, rings, HOLDS_ROWS: gl.constexpr):
    """`load_held` of all items."""
    each_item(queue, load_held, (descriptors, rings, HOLDS_ROWS))


@gluon.jit
def load_partners(
    item, i_h, i_item, i_use, descriptors, rings,
    BLOCK: gl.constexpr, HOLDS_ROWS: gl.constexpr, HAS_LOCAL: gl.constexpr, SPLIT: gl.constexpr,
):  # fmt: skip
    """Loader of what streams: keys and values past rows, or rows and their gradients past keys."""
    partners = live_partners(item, BLOCK, HOLDS_ROWS, HAS_LOCAL)
    lo, hi = part_range(partners, item.part, item.parts, SPLIT)
    start = item.start if HOLDS_ROWS else item.row_start
    for j in range(lo, hi):
        position = start + partner_start(j, partners, BLOCK)
        for i in gl.static_range(len(rings)):
            load_block(rings[i], descriptors[i], i_use, [i_h, position, 0])
        i_use += 1
    return i_use


@gluon.jit
def load_partner_tiles(
    queue, descriptors, rings,
    BLOCK: gl.constexpr, HOLDS_ROWS: gl.constexpr, HAS_LOCAL: gl.constexpr, SPLIT: gl.constexpr,
):  # fmt: skip
    """`load_partners` of all items, whose numbers it draws."""
    each_item(queue, load_partners, (descriptors, rings, BLOCK, HOLDS_ROWS, HAS_LOCAL, SPLIT), True)


@gluon.jit
def live_partners(item, BLOCK: gl.constexpr, HOLDS_ROWS: gl.constexpr, HAS_LOCAL: gl.constexpr):
    """The live tiles of keys of a row tile, or of rows of a key tile."""
    if HOLDS_ROWS:
        partners = live_keys(item.first, item.last, item.bounds, BLOCK, HAS_LOCAL)
    else:
        partners = live_rows(item.first, item.last, item.bounds, BLOCK, HAS_LOCAL)
    return partners


@gluon.jit
def walk_of_group(
    item, GROUP: gl.constexpr, BLOCK: gl.constexpr, HOLDS_ROWS: gl.constexpr,
    HAS_LOCAL: gl.constexpr, SPLIT: gl.constexpr,
):  # fmt: skip
    """The walk of a group of a tile of rows; of keys, only without a window."""
    partners = live_partners(item, BLOCK, HOLDS_ROWS, HAS_LOCAL)
    lo, hi = part_range(partners, item.part, item.parts, SPLIT)
    own = item.first + GROUP * GROUP_SIZE
    own_last = gl.minimum(own + GROUP_SIZE, item.last)
    if HOLDS_ROWS:
        front, back = group_keys(own, own_last, partners, item.bounds, BLOCK, HAS_LOCAL)
    else:
        front, back = group_rows(own, own_last, partners, item.bounds, BLOCK)
    begin = gl.minimum(gl.maximum(lo, front), hi)
    end = gl.maximum(gl.minimum(hi, back), begin)
    return Walk(own, partners, lo, begin, end, hi)
