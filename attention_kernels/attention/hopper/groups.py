"""What a warp group of the kernels for Hopper GPUs does with tiles: products, SiLU and its slopes, results to memory.

Letters as in `tiles.py`.  How tiles get there: `rings.py`.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, warpgroup_mma

from attention_kernels.attention.hopper.rings import GROUP_SIZE
from attention_kernels.attention.tiles import element_mask, is_full


@gluon.constexpr_function
def matrix_layout(N, bits=16):
    """Registers of a [64, N] result of a group's products of matrices whose elements have so many bits."""
    return gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, N, 256 // bits])


@gluon.jit
def zero_sum(SIZE: gl.constexpr):
    """Zeros for the sum of a group's products, [64, SIZE]."""
    return gl.zeros([GROUP_SIZE, SIZE], gl.float32, matrix_layout(SIZE))


@gluon.jit
def start_products(b_held, b_partner):
    """Group: starts the products <held row, partner>, [64, partners], of what it holds with a block that streams."""
    b_zero = zero_sum(b_partner.shape[0])
    return warpgroup_mma(b_held, b_partner.permute([1, 0]), b_zero, use_acc=False, is_async=True)


@gluon.jit
def left_operand(b_x, ring):
    """Group: a result [64, partners] of products, as the left operand of a sum over blocks of `ring`."""
    LAYOUT: gl.constexpr = gl.DotOperandLayout(0, matrix_layout(ring.buffers.shape[3]), 2)
    return gl.convert_layout(b_x.to(ring.buffers.dtype), LAYOUT)


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
    b_score, b_dweight, k_ring, half_scale, row, key, bounds, HAS_LOCAL: gl.constexpr, HAS_TARGETS: gl.constexpr
):
    """Twice the gradient of a group's scores, as the left operand of the sum over keys."""
    _, b_slope = weights_and_slopes(b_score, half_scale, row, key, bounds, False, HAS_LOCAL, HAS_TARGETS)
    return left_operand(b_dweight * b_slope, k_ring)


@gluon.jit
def write_group(p_x, m_x, b_x, sums, slot, buffer, SCALED: gl.constexpr, SUMS: gl.constexpr):
    """Writes a group's rows, and their sum, or with SUMS = 4 the sum of each warp's: see `tiles.store_rows`."""
    LAYOUT: gl.constexpr = p_x.type.layout
    BLOCK_SIZE: gl.constexpr = b_x.shape[1]
    dtype: gl.constexpr = p_x.dtype.element_ty
    # In the registers' own layout a warp holds 16 rows, and nothing has to be turned.
    DIRECT: gl.constexpr = b_x.type.layout == LAYOUT
    BUFFERED: gl.constexpr = buffer is not None and not DIRECT
    if BUFFERED:
        gl.thread_barrier()
        buffer.store(b_x.to(dtype))
    if SCALED:
        # Loaded before the barriers of the change of layout, so that it arrives while they are waited for.
        b_factor = gl.load(p_x, mask=m_x, other=0.0)
    if BUFFERED:
        gl.thread_barrier()
        b_x = buffer.load(LAYOUT)
        # The TMA writes into this shared memory next, and must not overtake what is read here.
        fence_async_shared()
    else:
        b_x = gl.convert_layout(b_x.to(dtype), LAYOUT)
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
                # Rows lie in bundles, of which a warp holds every fourth.
                BUNDLE: gl.constexpr = 256 // BLOCK_SIZE
                b_sum = gl.sum(gl.sum(b_row.reshape([GROUP_SIZE // (4 * BUNDLE), 4, BUNDLE, BLOCK_SIZE]), 0), 1)
            o_warp = gl.arange(0, 4, gl.SliceLayout(1, b_sum.type.layout))
            o_size = gl.arange(0, BLOCK_SIZE, gl.SliceLayout(0, b_sum.type.layout))
            gl.store(sums + (slot * 4 + o_warp)[:, None] * BLOCK_SIZE + o_size[None, :], b_sum)


@gluon.jit
def store_group(
    output, b_x, start, first, item, i_h, H,
    GROUP: gl.constexpr, SIZE: gl.constexpr, SPLIT: gl.constexpr, SCALED: gl.constexpr,
    GROUPS: gl.constexpr = 2, SUMS: gl.constexpr = 1, buffer=None,
):  # fmt: skip
    """Writes a group's rows, from `first` on, or its part of them: see `tiles.store_or_reduce`.

    Whole rows are written by way of shared memory: `buffer`, where large heads leave no room for another.  If that has
    another shape, because keys and values differ in size, rows leave as the registers hold them, which is slower.
    """
    x, stride_t, stride_h, sums, partials, arrivals = output
    BLOCK_SIZE: gl.constexpr = b_x.shape[1]
    LAYOUT: gl.constexpr = (
        gl.BlockedLayout([1, 8], [256 // BLOCK_SIZE, BLOCK_SIZE // 8], [4, 1], [1, 0])
        if buffer is None or buffer.shape[1] == BLOCK_SIZE
        else b_x.type.layout
    )
    o_tile = gl.arange(0, GROUP_SIZE, gl.SliceLayout(1, LAYOUT))
    o_size = gl.arange(0, BLOCK_SIZE, gl.SliceLayout(0, LAYOUT))
    p_x = x + i_h.to(gl.int64) * stride_h + (start + first + o_tile).to(gl.int64)[:, None] * stride_t + o_size[None, :]
    m_x = (first + o_tile < item.last)[:, None] & (o_size < SIZE)[None, :]
    slot = ((item.home * H + i_h) * GROUPS + GROUP).to(gl.int64)
    if SPLIT:
        if item.parts == 1:
            write_group(p_x, m_x, b_x, sums, slot, buffer, SCALED, SUMS)
        else:
            TILE: gl.constexpr = GROUP_SIZE * BLOCK_SIZE
            # Partial sums stay in the registers' own order: they are only ever added.
            S_LAYOUT: gl.constexpr = b_x.type.layout
            o_row = gl.arange(0, GROUP_SIZE, gl.SliceLayout(1, S_LAYOUT))
            o_column = gl.arange(0, BLOCK_SIZE, gl.SliceLayout(0, S_LAYOUT))
            p_part = partials + slot * TILE + o_row[:, None] * BLOCK_SIZE + o_column[None, :]
            stride_part = H.to(gl.int64) * (GROUPS * TILE)
            gl.store(p_part + item.part * stride_part, b_x)
            # All threads' partial sums must be written before one thread announces them.
            gl.thread_barrier()
            arrived = gl.atomic_add(arrivals + slot, 1, sem="acq_rel")
            if arrived == item.parts - 1:
                gl.thread_barrier()
                # The next launch counts from 0.
                gl.store(arrivals + slot, 0)
                b_sum = gl.zeros_like(b_x)
                for i in range(item.parts):
                    # Other processors wrote them: read past the first-level cache.
                    b_sum += gl.load(p_part + i * stride_part, cache_modifier=".cg")
                write_group(p_x, m_x, b_sum, sums, slot, buffer, SCALED, SUMS)
    else:
        write_group(p_x, m_x, b_x, sums, slot, buffer, SCALED, SUMS)
