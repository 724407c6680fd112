"""`linear_kernel.product` for Hopper GPUs: two groups multiply 128 rows each by columns that they share.

Programs persist, each walks over tiles of the result.  A loader streams the operands of one tile after the other
through rings of buffers, and fills them for the next tile while the groups store this one.  A residual is loaded into
the buffers from which its tile is stored.  The definition is `linear_kernel.py`, which computes the same on any GPU.
"""

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from attention_kernels.attention.hopper.groups import (
    matrix_layout,
    tanh,
)
from attention_kernels.attention.hopper.rings import (
    Ring,
    block_layout,
    load_block,
    make_buffers,
    make_ring,
    release,
    thread_registers,
    wait_block,
)
from attention_kernels.launcher import Blocks, launch
from attention_kernels.layer.linear_kernel import Epilogue, Finish
from attention_kernels.rows import cdiv, multiprocessors

_ROWS = 128
"""Rows of the result that one group computes."""
_COLUMNS = gl.constexpr(128)
"""Columns of a tile of the result."""
_STEP_BYTES = 128
"""Bytes of a row of the left operand that one step multiplies."""


@gluon.jit
def load_operands(a, b, finish, a_rings, b_ring, results, num_tiles, TILES_N: gl.constexpr, STEPS: gl.constexpr):
    """Loader: blocks of both operands for every tile of this program, in the order in which they are multiplied."""
    ROWS: gl.constexpr = a.block_shape[1]
    STEP: gl.constexpr = a.block_shape[2]
    i_use = 0
    for tile in range(gl.program_id(0), num_tiles, gl.num_programs(0)):
        i_tile = i_use // STEPS
        # Neighbouring programs share rows of a, so that a is read from memory about once.
        first_m = tile // TILES_N * (2 * ROWS)
        first_n = tile % TILES_N * _COLUMNS
        for k in range(STEPS):
            load_block(a_rings[0], a, i_use, [0, first_m, k * STEP])
            if finish.row_scale is not None:
                load_block(b_ring, b, i_use, [0, first_n, k * STEP])
            else:
                load_block(b_ring, b, i_use, [0, k * STEP, first_n])
            load_block(a_rings[1], a, i_use, [0, first_m + ROWS, k * STEP])
            i_use += 1
        if finish.residual is not None:
            for group in gl.static_range(2):
                load_block(results[group], finish.residual, i_tile, [0, first_m + group * ROWS, first_n])


@gluon.jit
def store_part(x, buffer, b_x, first_m, first_n):
    """Group: writes a part of a tile by way of its buffer in shared memory."""
    tma.store_wait(0)
    gl.thread_barrier()
    buffer.reshape([b_x.shape[0], b_x.shape[1]]).store(b_x.to(buffer.dtype))
    fence_async_shared()
    gl.thread_barrier()
    tma.async_copy_shared_to_global(x, [0, first_m, first_n], buffer)


@gluon.jit
def split_columns(b_x):
    """The left and the right half of the columns of a result of matrix products, which stay where they are."""
    HALF: gl.constexpr = b_x.shape[1] // 2
    b_left, b_right = gl.split(b_x.reshape([b_x.shape[0], 2, HALF]).permute([0, 2, 1]))
    return gl.convert_layout(b_left, matrix_layout(HALF)), gl.convert_layout(b_right, matrix_layout(HALF))


@gluon.jit
def multiply_tiles(
    work, finish, GROUP: gl.constexpr, N: gl.constexpr, TILES_N: gl.constexpr, STEPS: gl.constexpr, SILU: gl.constexpr
):
    """A group: its rows of every tile of this program."""
    a_rings, b_ring, results, M, num_tiles = work
    out, slopes, residual, bias, row_scale, column_scale = finish
    RESIDUAL: gl.constexpr = residual is not None
    SCALED: gl.constexpr = row_scale is not None
    a_ring = a_rings[GROUP]
    result = results[GROUP]
    buffer = result.buffers.index(0)
    ROWS: gl.constexpr = buffer.shape[1]
    # Columns that are stored at a time.
    WIDTH: gl.constexpr = buffer.shape[2]
    LAYOUT: gl.constexpr = matrix_layout(_COLUMNS, a_ring.buffers.dtype.primitive_bitwidth)
    i_use = 0
    for tile in range(gl.program_id(0), num_tiles, gl.num_programs(0)):
        i_tile = i_use // STEPS
        if RESIDUAL:
            if i_tile > 0:
                tma.store_wait(0)
                release(result, i_tile - 1)
        b_x = gl.zeros([ROWS, _COLUMNS], gl.float32, LAYOUT)
        for k in range(STEPS):
            b_a = wait_block(a_ring, i_use + k)
            b_b = wait_block(b_ring, i_use + k)
            b_x = warpgroup_mma(b_a, b_b.permute([1, 0]) if SCALED else b_b, b_x, is_async=True)
            b_x = warpgroup_mma_wait(1, deps=(b_x,))
            if k > 0:
                release(a_ring, i_use + k - 1)
                release(b_ring, i_use + k - 1)
        b_x = warpgroup_mma_wait(0, deps=(b_x,))
        release(a_ring, i_use + STEPS - 1)
        release(b_ring, i_use + STEPS - 1)
        i_use += STEPS
        first_m = (tile // TILES_N * 2 + GROUP) * ROWS
        parts = (b_x,) if WIDTH == _COLUMNS else split_columns(b_x)
        for i in gl.static_range(len(parts)):
            b_part = parts[i]
            first_n = tile % TILES_N * _COLUMNS + i * WIDTH
            o_n = first_n + gl.arange(0, WIDTH, gl.SliceLayout(0, b_part.type.layout))
            if SCALED:
                o_m = first_m + gl.arange(0, ROWS, gl.SliceLayout(1, b_part.type.layout))
                b_part *= gl.load(row_scale + o_m, mask=o_m < M, other=0.0)[:, None]
                b_part *= gl.load(column_scale + o_n, mask=o_n < N, other=0.0)[None, :]
            if bias is not None:
                b_part += gl.load(bias + o_n, mask=o_n < N, other=0.0).to(gl.float32)[None, :]
            if RESIDUAL:
                b_part += wait_block(result, i_tile).load(b_part.type.layout).to(gl.float32)
            if SILU:
                b_gate = 0.5 + 0.5 * tanh(0.5 * b_part)
                b_part *= b_gate
                if slopes is not None:
                    store_part(slopes, buffer, b_gate + b_part * (1.0 - b_gate), first_m, first_n)
            store_part(out, buffer, b_part, first_m, first_n)
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["M", "num_tiles"])
def hopper_matmul_kernel(
    a, b, out, slopes, residual, bias, row_scale, column_scale, M, num_tiles,
    N: gl.constexpr, TILES_N: gl.constexpr, STEPS: gl.constexpr, SILU: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """See `product`.  Grid: one program a processor."""
    a_rings = (make_ring(a, STAGES, 1), make_ring(a, STAGES, 1))
    b_ring = make_ring(b, STAGES, 2)
    if residual is None:
        # Nothing is loaded into these, so nobody would wait for their barriers.
        results = (Ring(make_buffers(out, 1), None, None), Ring(make_buffers(out, 1), None, None))
    else:
        results = (make_ring(out, 1, 1), make_ring(out, 1, 1))
    work = (a_rings, b_ring, results, M, num_tiles)
    finish = Finish(out, slopes, residual, bias, row_scale, column_scale)
    gl.warp_specialize(
        [
            (multiply_tiles, (work, finish, 0, N, TILES_N, STEPS, SILU)),
            (multiply_tiles, (work, finish, 1, N, TILES_N, STEPS, SILU)),
            (load_operands, (a, b, finish, a_rings, b_ring, results, num_tiles, TILES_N, STEPS)),
        ],
        [4, 1],
        [240, 24],
    )


def product(a: Tensor, b: Tensor, out: Tensor, epilogue: Epilogue) -> None:
    """`linear_kernel.product`.

    Tiles are stored in halves, which leaves room for a fourth stage of operands and needs fewer registers; with a
    residual whole, as the second half would have to wait for the first one's buffer.
    """
    (M, K), N = a.shape, out.shape[1]
    if M == 0:
        return
    fp8, whole = epilogue.row_scale is not None, epilogue.residual is not None
    step = _STEP_BYTES // a.element_size()
    columns = _COLUMNS.value
    width = columns if whole else columns // 2
    tiles_n = cdiv(N, columns)
    num_tiles = cdiv(M, 2 * _ROWS) * tiles_n
    launch(
        hopper_matmul_kernel,
        (min(multiprocessors(a.device), num_tiles),),
        _matrix(a, _ROWS, step),
        _matrix(b, columns, step) if fp8 else _matrix(b, step, columns),
        *epilogue.arguments(out, lambda x: _matrix(x, _ROWS, width)),
        M,
        num_tiles,
        N=N,
        TILES_N=tiles_n,
        STEPS=cdiv(K, step),
        SILU=epilogue.silu,
        STAGES=3 if whole else 4,
        num_warps=4,
        maxnreg=thread_registers(groups=2),
    )


def _matrix(x: Tensor, rows: int, columns: int) -> Blocks:
    """Blocks of a matrix, seen as one of a batch of one."""
    (height, width), (stride, _) = x.shape, x.stride()
    return Blocks(
        x, (1, rows, columns), (1, height, width), (height * stride, stride, 1), block_layout(rows, columns, x.dtype)
    )
