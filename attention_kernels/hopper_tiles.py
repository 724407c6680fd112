"""What the warp-specialised kernels share: rings of tiles in shared memory, loaders, the order of items.

A program holds a tile of 128 rows (or keys), 64 a warp group, and streams its live partner tiles.  (The forward without
a window has three groups, 192 rows.)  Loaders, a warp each, walk the same loops as the groups and fill rings of buffers
ahead of them:

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
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma

from attention_kernels.tiles import (
    element_mask,
    group_keys,
    group_rows,
    is_full,
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
def load_block(ring, descriptor, i_use, start):
    """Loader: the i_use-th filling of a ring, the descriptor's block that starts at `start`."""
    STAGES: gl.constexpr = ring.full.shape[0]
    stage = i_use % STAGES
    mbarrier.wait(ring.empty.index(stage), (i_use // STAGES + 1) & 1)
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
    stage = i_use % _NUMBERS_AHEAD
    mbarrier.wait(order.empty.index(stage), (i_use // _NUMBERS_AHEAD + 1) & 1)
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


@gluon.constexpr_function
def matrix_layout(N, bits=16):
    """Registers of a [64, N] result of a group's products of matrices whose elements have so many bits."""
    return gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, N, 256 // bits])


@gluon.jit
def tanh(b_half):
    """The hardware's tanh, exact to about 11 bits: enough for the 16-bit inputs that these kernels take."""
    return gl.inline_asm_elementwise(
        "tanh.approx.f32 $0, $1;", "=f,f", [b_half], dtype=gl.float32, is_pure=True, pack=1
    )


@gluon.jit
def twice_slope(b_weight, b_tanh):
    """Twice the slope of SiLU where its value is b_weight and the tanh of half of its argument b_tanh."""
    return b_weight * (1.0 - b_tanh) + (1.0 + b_tanh)


@gluon.jit
def half_scores(
    b_score, half_scale, row, key, bounds,
    KEYS_FIRST: gl.constexpr, HAS_LOCAL: gl.constexpr, HAS_TARGETS: gl.constexpr,
):  # fmt: skip
    """Half of each allowed score; of a forbidden one, a number so low that SiLU and its slope are exactly 0.

    The scores are [rows, keys], or [keys, rows] with KEYS_FIRST.
    """
    ROWS: gl.constexpr = b_score.shape[1 if KEYS_FIRST else 0]
    KEYS: gl.constexpr = b_score.shape[0 if KEYS_FIRST else 1]
    b_half = b_score * half_scale
    if not is_full(row, row + ROWS, key, key + KEYS, bounds, HAS_LOCAL):
        if KEYS_FIRST:
            o_row = row + gl.arange(0, ROWS, gl.SliceLayout(0, b_score.type.layout))[None, :]
            o_key = key + gl.arange(0, KEYS, gl.SliceLayout(1, b_score.type.layout))[:, None]
        else:
            o_row = row + gl.arange(0, ROWS, gl.SliceLayout(1, b_score.type.layout))[:, None]
            o_key = key + gl.arange(0, KEYS, gl.SliceLayout(0, b_score.type.layout))[None, :]
        m = element_mask(o_row, o_key, bounds, HAS_LOCAL, HAS_TARGETS)
        b_half = gl.where(m, b_half, -32.0)
    return b_half


@gluon.jit
def weights_and_slopes(
    b_score, half_scale, row, key, bounds,
    KEYS_FIRST: gl.constexpr, HAS_LOCAL: gl.constexpr, HAS_TARGETS: gl.constexpr,
):  # fmt: skip
    """SiLU of a group's scores and twice its slopes there, laid out as `half_scores` takes them."""
    b_half = half_scores(b_score, half_scale, row, key, bounds, KEYS_FIRST, HAS_LOCAL, HAS_TARGETS)
    b_tanh = tanh(b_half)
    b_weight = b_half * b_tanh + b_half
    return b_weight, twice_slope(b_weight, b_tanh)


@gluon.jit
def score_slopes(
    b_score, b_dweight, half_scale, row, key, bounds, LAYOUT: gl.constexpr, dtype: gl.constexpr,
    HAS_LOCAL: gl.constexpr, HAS_TARGETS: gl.constexpr,
):  # fmt: skip
    """Twice the gradient of a group's scores, as the left operand of the sum over keys."""
    _, b_slope = weights_and_slopes(b_score, half_scale, row, key, bounds, False, HAS_LOCAL, HAS_TARGETS)
    return gl.convert_layout((b_dweight * b_slope).to(dtype), LAYOUT)


@gluon.jit
def write_group(p_x, m_x, b_x, sums, slot, buffer, SCALED: gl.constexpr, SUMS: gl.constexpr, DIRECT: gl.constexpr):
    """Writes a group's rows, and their sum, or with SUMS = 4 the sum of each warp's: see `tiles.store_rows`.

    DIRECT: from the registers' own layout, in which a warp holds 16 rows.
    """
    LAYOUT: gl.constexpr = p_x.type.layout
    BLOCK_SIZE: gl.constexpr = b_x.shape[1]
    dtype: gl.constexpr = p_x.dtype.element_ty
    if buffer is not None:
        gl.thread_barrier()
        buffer.store(b_x.to(dtype))
    if SCALED:
        # Asked for before the barriers of the change of layout.
        b_factor = gl.load(p_x, mask=m_x, other=0.0)
    if buffer is None:
        b_x = gl.convert_layout(b_x.to(dtype), LAYOUT)
    else:
        gl.thread_barrier()
        b_x = buffer.load(LAYOUT)
        # The TMA writes here next.
        fence_async_shared()
    if SCALED:
        b_x = (b_x.to(gl.float32) * b_factor.to(gl.float32)).to(dtype)
    gl.store(p_x, b_x, mask=m_x)
    if sums is not None:
        b_row = gl.where(m_x, b_x.to(gl.float32), 0.0)
        if SUMS == 1:
            o_size = gl.arange(0, BLOCK_SIZE, gl.SliceLayout(0, LAYOUT))
            gl.store(sums + slot * BLOCK_SIZE + o_size, gl.sum(b_row, 0))
        else:
            # A warp's sums need no shared memory.
            if DIRECT:
                b_sum = gl.sum(b_row.reshape([4, GROUP_SIZE // 4, BLOCK_SIZE]), 1)
            else:
                # It holds every fourth bundle of so many rows.
                BUNDLE: gl.constexpr = 256 // BLOCK_SIZE
                b_sum = gl.sum(gl.sum(b_row.reshape([GROUP_SIZE // (4 * BUNDLE), 4, BUNDLE, BLOCK_SIZE]), 0), 1)
            o_warp = gl.arange(0, 4, gl.SliceLayout(1, b_sum.type.layout))
            o_size = gl.arange(0, BLOCK_SIZE, gl.SliceLayout(0, b_sum.type.layout))
            gl.store(sums + (slot * 4 + o_warp)[:, None] * BLOCK_SIZE + o_size[None, :], b_sum)


@gluon.jit
def store_group(
    x, b_x, sums, stride_t, stride_h, i_h, H, start, first, last, part, parts, home, partials, counters,
    GROUP: gl.constexpr, SIZE: gl.constexpr, SPLIT: gl.constexpr, SCALED: gl.constexpr,
    GROUPS: gl.constexpr = 2, SUMS: gl.constexpr = 1, DIRECT: gl.constexpr = False, buffer=None,
):  # fmt: skip
    """Writes a group's rows first..last-1, or its part of them: see `tiles.store_or_reduce`.

    Whole rows are written by way of shared memory: `buffer`, where large heads leave no room for another.
    DIRECT: without, which is slower.
    """
    BLOCK_SIZE: gl.constexpr = b_x.shape[1]
    LAYOUT: gl.constexpr = (
        b_x.type.layout if DIRECT else gl.BlockedLayout([1, 8], [256 // BLOCK_SIZE, BLOCK_SIZE // 8], [4, 1], [1, 0])
    )
    o_tile = gl.arange(0, GROUP_SIZE, gl.SliceLayout(1, LAYOUT))
    o_size = gl.arange(0, BLOCK_SIZE, gl.SliceLayout(0, LAYOUT))
    p_x = x + i_h.to(gl.int64) * stride_h + (start + first + o_tile).to(gl.int64)[:, None] * stride_t + o_size[None, :]
    m_x = (first + o_tile < last)[:, None] & (o_size < SIZE)[None, :]
    slot = ((home * H + i_h) * GROUPS + GROUP).to(gl.int64)
    if SPLIT:
        if parts == 1:
            write_group(p_x, m_x, b_x, sums, slot, buffer, SCALED, SUMS, DIRECT)
        else:
            TILE: gl.constexpr = GROUP_SIZE * BLOCK_SIZE
            # Partial sums stay in the registers' own order: they are only ever added.
            S_LAYOUT: gl.constexpr = b_x.type.layout
            o_row = gl.arange(0, GROUP_SIZE, gl.SliceLayout(1, S_LAYOUT))
            o_column = gl.arange(0, BLOCK_SIZE, gl.SliceLayout(0, S_LAYOUT))
            p_part = partials + slot * TILE + o_row[:, None] * BLOCK_SIZE + o_column[None, :]
            stride_part = H.to(gl.int64) * (GROUPS * TILE)
            gl.store(p_part + part * stride_part, b_x)
            # All threads' partial sums must be written before one thread announces them.
            gl.thread_barrier()
            arrived = gl.atomic_add(counters + slot, 1, sem="acq_rel")
            if arrived == parts - 1:
                gl.thread_barrier()
                b_sum = gl.zeros_like(b_x)
                for i in range(parts):
                    # Other processors wrote them: read past the first-level cache.
                    b_sum += gl.load(p_part + i * stride_part, cache_modifier=".cg")
                write_group(p_x, m_x, b_sum, sums, slot, buffer, SCALED, SUMS, DIRECT)
    else:
        write_group(p_x, m_x, b_x, sums, slot, buffer, SCALED, SUMS, DIRECT)
