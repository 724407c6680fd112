"""The product of V, Q and K with SiLU for Hopper GPUs: two groups take turns, one multiplies while the other stores.

Programs persist.  Each walks over tiles of the result, the groups over every second one; a loader streams the operands
of one tile after the other through rings of buffers.  A group passes its turn on when it has all of its operands: one
that waited for a buffer two fillings ahead could not tell it from the one before.  The definition is
`linear_kernel.py`, which computes the same on any GPU.
"""

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from attention_kernels.hopper_tiles import (
    REGISTERS,
    block_layout,
    load_block,
    make_ring,
    matrix_layout,
    release,
    tanh,
    wait_block,
)
from attention_kernels.launcher import Blocks, launch
from attention_kernels.rows import cdiv, multiprocessors

_BLOCK_M = 128
_BLOCK_N = 128
_BLOCK_K = 64
_STAGES = 5


@gluon.jit
def load_operands(a, b, a_ring, b_ring, num_tiles, TILES_N: gl.constexpr, STEPS: gl.constexpr):
    """Loader: blocks of both operands for every tile of this program, in the order in which they are multiplied."""
    BLOCK_M: gl.constexpr = a.block_shape[1]
    BLOCK_K: gl.constexpr = a.block_shape[2]
    BLOCK_N: gl.constexpr = b.block_shape[2]
    i_use = 0
    for tile in range(gl.program_id(0), num_tiles, gl.num_programs(0)):
        for k in range(STEPS):
            load_block(a_ring, a, i_use, [0, tile // TILES_N * BLOCK_M, k * BLOCK_K])
            load_block(b_ring, b, i_use, [0, k * BLOCK_K, tile % TILES_N * BLOCK_N])
            i_use += 1


@gluon.jit
def store_tile(x, buffer, b_x, first_m, first_n):
    """Group: writes a tile of the result by way of its buffer in shared memory."""
    tma.store_wait(0)
    gl.thread_barrier()
    buffer.reshape([b_x.shape[0], b_x.shape[1]]).store(b_x)
    fence_async_shared()
    gl.thread_barrier()
    tma.async_copy_shared_to_global(x, [0, first_m, first_n], buffer)


@gluon.jit
def multiply_tiles(
    work, GROUP: gl.constexpr, N: gl.constexpr, TILES_N: gl.constexpr, STEPS: gl.constexpr, SLOPES: gl.constexpr
):
    """A group: every second tile of this program."""
    a_ring, b_ring, turns, out, slopes, buffers, bias, num_tiles = work
    BLOCK_M: gl.constexpr = a_ring.buffers.shape[2]
    BLOCK_N: gl.constexpr = b_ring.buffers.shape[3]
    LAYOUT: gl.constexpr = matrix_layout(BLOCK_N)
    dtype: gl.constexpr = a_ring.buffers.dtype
    i_use = GROUP * STEPS
    for tile in range(gl.program_id(0) + GROUP * gl.num_programs(0), num_tiles, 2 * gl.num_programs(0)):
        b_x = gl.zeros([BLOCK_M, BLOCK_N], gl.float32, LAYOUT)
        # The first turn is group 0's.
        mbarrier.wait(turns.index(GROUP), (i_use // (2 * STEPS) + 1 - GROUP) & 1)
        for k in range(STEPS):
            b_a = wait_block(a_ring, i_use + k)
            b_b = wait_block(b_ring, i_use + k)
            b_x = warpgroup_mma(b_a, b_b, b_x, is_async=True)
            b_x = warpgroup_mma_wait(1, deps=(b_x,))
            if k > 0:
                release(a_ring, i_use + k - 1)
                release(b_ring, i_use + k - 1)
        mbarrier.arrive(turns.index(1 - GROUP))
        b_x = warpgroup_mma_wait(0, deps=(b_x,))
        release(a_ring, i_use + STEPS - 1)
        release(b_ring, i_use + STEPS - 1)
        # The other group's tile lies between.
        i_use += 2 * STEPS
        first_m = tile // TILES_N * BLOCK_M
        first_n = tile % TILES_N * BLOCK_N
        o_n = first_n + gl.arange(0, BLOCK_N, gl.SliceLayout(0, LAYOUT))
        b_x += gl.load(bias + o_n, mask=o_n < N, other=0.0).to(gl.float32)[None, :]
        b_gate = 0.5 + 0.5 * tanh(0.5 * b_x)
        b_x *= b_gate
        store_tile(out, buffers.index(GROUP), b_x.to(dtype), first_m, first_n)
        if SLOPES:
            b_slope = b_gate + b_x * (1.0 - b_gate)
            store_tile(slopes, buffers.index(GROUP), b_slope.to(dtype), first_m, first_n)
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["num_tiles"])
def hopper_silu_kernel(
    a, b, out, slopes, bias, num_tiles,
    N: gl.constexpr, TILES_N: gl.constexpr, STEPS: gl.constexpr, SLOPES: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """out = silu(a b + bias), and SiLU's slopes there.  Grid: one program a processor."""
    a_ring = make_ring(a, STAGES, 1)
    b_ring = make_ring(b, STAGES, 1)
    shape: gl.constexpr = out.block_shape
    buffers = gl.allocate_shared_memory(out.dtype, [2, shape[0], shape[1], shape[2]], out.layout)
    turns = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(2):
        mbarrier.init(turns.index(i), count=1)
    work = (a_ring, b_ring, turns, out, slopes, buffers, bias, num_tiles)
    gl.warp_specialize(
        [
            (multiply_tiles, (work, 0, N, TILES_N, STEPS, SLOPES)),
            (multiply_tiles, (work, 1, N, TILES_N, STEPS, SLOPES)),
            (load_operands, (a, b, a_ring, b_ring, num_tiles, TILES_N, STEPS)),
        ],
        [4, 1],
        [240, 24],
    )


def silu_product(a: Tensor, b: Tensor, out: Tensor, *, bias: Tensor, slopes: Tensor | None) -> None:
    """Writes `out` [M, N] = silu(a b + bias), and SiLU's slopes into `slopes` if given; accumulates in float32."""
    (M, K), N = a.shape, b.shape[1]
    tiles_n = cdiv(N, _BLOCK_N)
    num_tiles = cdiv(M, _BLOCK_M) * tiles_n
    out_blocks = _matrix(out, _BLOCK_M, _BLOCK_N)
    launch(
        hopper_silu_kernel,
        (min(multiprocessors(a.device), num_tiles),),
        _matrix(a, _BLOCK_M, _BLOCK_K),
        _matrix(b, _BLOCK_K, _BLOCK_N),
        out_blocks,
        out_blocks if slopes is None else _matrix(slopes, _BLOCK_M, _BLOCK_N),
        bias,
        num_tiles,
        N=N,
        TILES_N=tiles_n,
        STEPS=cdiv(K, _BLOCK_K),
        SLOPES=slopes is not None,
        STAGES=_STAGES,
        num_warps=4,
        maxnreg=REGISTERS,
    )


def _matrix(x: Tensor, rows: int, columns: int) -> Blocks:
    """Blocks of a matrix, seen as one of a batch of one."""
    (height, width), (stride, _) = x.shape, x.stride()
    return Blocks(
        x, (1, rows, columns), (1, height, width), (height * stride, stride, 1), block_layout(rows, columns, x.dtype)
    )
