"""A matrix product in Triton whose epilogue does what would otherwise be a pass of its own.  Validates nothing.

out = act(A B * scales + bias + residual), written once, where every part but the product is optional: SiLU, its slopes
as a second result, a residual tile by tile, and row and column scales for FP8 operands.  Tiles are moved by the tensor
memory accelerator, so rows must start at multiples of 16 bytes.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from attention_kernels.launcher import INTERPRETED, Blocks, launch
from attention_kernels.rows import cdiv, multiprocessors
from attention_kernels.sigmoid import approximate, sigmoid


class Finish(NamedTuple):
    """Where a kernel puts a product, and what happens to it before; None: not wanted."""

    out: tl.tensor_descriptor
    slopes: tl.tensor_descriptor
    """Slopes of SiLU go here."""
    residual: tl.tensor_descriptor
    bias: tl.tensor
    row_scale: tl.tensor
    """With `column_scale`: operands are in FP8, and the right one is transposed."""
    column_scale: tl.tensor


@triton.jit
def _store(
    finish, b_x, first_m, first_n, M,
    N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SILU: tl.constexpr, APPROXIMATE: tl.constexpr,
):  # fmt: skip
    """The epilogue of BLOCK_M x BLOCK_N products."""
    out, slopes, residual, bias, row_scale, column_scale = finish
    columns = first_n + tl.arange(0, BLOCK_N)
    if row_scale is not None:
        rows = first_m + tl.arange(0, BLOCK_M)
        of_row = tl.load(row_scale + rows, mask=rows < M, other=0.0)
        of_column = tl.load(column_scale + columns, mask=columns < N, other=0.0)
        b_x = b_x * of_row[:, None] * of_column[None, :]
    if bias is not None:
        b_x += tl.load(bias + columns, mask=columns < N, other=0.0).to(tl.float32)[None, :]
    if residual is not None:
        b_x += residual.load([first_m, first_n]).to(tl.float32)
    if SILU:
        gate = sigmoid(b_x, APPROXIMATE)
        b_x *= gate
        if slopes is not None:
            slopes.store([first_m, first_n], (gate + b_x * (1.0 - gate)).to(out.dtype))
    out.store([first_m, first_n], b_x.to(out.dtype))


@triton.jit
def _tile(
    tile, a, b, finish, M,
    N: tl.constexpr, K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    HALVES: tl.constexpr, SILU: tl.constexpr, APPROXIMATE: tl.constexpr,
):  # fmt: skip
    """One tile of the product.  In HALVES it takes half the shared memory to store: room for the next tile's loads, or
    for a second program."""
    # Neighbouring programs share rows of A, so that A is read from memory about once.
    tiles_n: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    first_m = (tile // tiles_n) * BLOCK_M
    first_n = (tile % tiles_n) * BLOCK_N
    b_x = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for k in range(0, K, BLOCK_K):
        b_a = a.load([first_m, k])
        if finish.row_scale is not None:
            b_b = b.load([first_n, k]).T
        else:
            b_b = b.load([k, first_n])
        b_x = tl.dot(b_a, b_b, b_x)
    if HALVES:
        HALF: tl.constexpr = BLOCK_N // 2
        left, right = tl.split(tl.permute(tl.reshape(b_x, (BLOCK_M, 2, HALF)), (0, 2, 1)))
        _store(finish, left, first_m, first_n, M, N, BLOCK_M, HALF, SILU, APPROXIMATE)
        _store(finish, right, first_m, first_n + HALF, M, N, BLOCK_M, HALF, SILU, APPROXIMATE)
    else:
        _store(finish, b_x, first_m, first_n, M, N, BLOCK_M, BLOCK_N, SILU, APPROXIMATE)


@triton.jit
def _matmul_kernel(
    a, b, out, slopes, residual, bias, row_scale, column_scale, M,
    N: tl.constexpr, K: tl.constexpr, SILU: tl.constexpr, APPROXIMATE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, HALVES: tl.constexpr, PROGRAMS: tl.constexpr,
):  # fmt: skip
    """A program a tile, or, unless that is 0, so many PROGRAMS that walk over tiles."""
    finish = Finish(out, slopes, residual, bias, row_scale, column_scale)
    if PROGRAMS == 0:
        _tile(tl.program_id(0), a, b, finish, M, N, K, BLOCK_M, BLOCK_N, BLOCK_K, HALVES, SILU, APPROXIMATE)
    else:
        num_tiles = tl.cdiv(M, BLOCK_M) * ((N + BLOCK_N - 1) // BLOCK_N)
        # Flattened, the loads of a program's next tile are on their way during the epilogue of this one.
        for tile in tl.range(tl.program_id(0), num_tiles, PROGRAMS, flatten=True):
            _tile(tile, a, b, finish, M, N, K, BLOCK_M, BLOCK_N, BLOCK_K, HALVES, SILU, APPROXIMATE)


def tiles(*, fp8: bool, silu: bool) -> dict[str, int]:
    """How a product is cut; `RESIDENT` programs a multiprocessor walk over tiles, with 0 there is a program a tile.

    Two programs fit a multiprocessor, so that one's epilogue hides behind the other's products.  Products with SiLU
    walk over tiles and store them in `HALVES`; a residual's loads would hold such a walk up.  Chosen from
    `benchmarks.one_off.layer_products` (`benchmarks/results/layer_products.json`).
    """
    if INTERPRETED:
        return {
            "BLOCK_M": 32,
            "BLOCK_N": 16,
            "BLOCK_K": 32,
            "HALVES": 0,
            "RESIDENT": 0,
            "num_warps": 4,
            "num_stages": 1,
        }
    return {
        "BLOCK_M": 128,
        "BLOCK_N": 128,
        "BLOCK_K": 128 if fp8 else 64,
        "HALVES": int(silu),
        "RESIDENT": 2 if silu else 0,
        "num_warps": 4 if fp8 or silu else 8,
        "num_stages": 3,
    }


@dataclass(frozen=True, kw_only=True, slots=True)
class Epilogue:
    """What happens to a product before it is stored; every part is optional."""

    silu: bool = False
    slopes: Tensor | None = None
    """Where the slopes of SiLU are written."""
    bias: Tensor | None = None
    residual: Tensor | None = None
    row_scale: Tensor | None = None
    """Scales of the rows of A, of FP8 operands, with `column_scale`; B is [N, K] then, as FP8 tensor cores read it."""
    column_scale: Tensor | None = None

    def arguments(self, out: Tensor, blocks: Callable[[Tensor], Blocks]) -> tuple[Any, ...]:
        """A kernel's arguments from the result on, in the order of `Finish`; `blocks` are those in which it stores."""
        tiles = (None if x is None else blocks(x) for x in (out, self.slopes, self.residual))
        return (*tiles, self.bias, self.row_scale, self.column_scale)


def product(a: Tensor, b: Tensor, out: Tensor, epilogue: Epilogue, *, config: dict[str, int] | None = None) -> None:
    """Writes `out` [M, N], and the slopes of SiLU if the epilogue has any; accumulates in float32."""
    (M, K), N = a.shape, out.shape[1]
    fp8 = epilogue.row_scale is not None
    chosen = dict(config or tiles(fp8=fp8, silu=epilogue.silu))
    resident = chosen.pop("RESIDENT")
    block_m, block_n, block_k = chosen["BLOCK_M"], chosen["BLOCK_N"], chosen["BLOCK_K"]
    stored = [block_m, block_n // 2 if chosen["HALVES"] else block_n]
    if M == 0:
        return

    # Also where there are fewer tiles: what a kernel is compiled for must not follow a batch's number of rows.
    programs = resident * multiprocessors(a.device)
    launch(
        _matmul_kernel,
        (programs or cdiv(M, block_m) * cdiv(N, block_n),),
        Blocks(a, [block_m, block_k]),
        Blocks(b, [block_n, block_k] if fp8 else [block_k, block_n]),
        *epilogue.arguments(out, lambda x: Blocks(x, stored)),
        M,
        N=N,
        K=K,
        SILU=epilogue.silu,
        APPROXIMATE=approximate(out),
        PROGRAMS=programs,
        **chosen,
    )


def fits(*tensors: Tensor) -> bool:
    """Whether the kernel takes these: 16-bit values (float32 would lose bits to TF32) in rows that the tensor memory
    accelerator can move."""
    return aligned(*tensors) and all(x.element_size() <= 2 and x.numel() > 0 for x in tensors)


def aligned(*tensors: Tensor) -> bool:
    """Whether rows are contiguous and start at multiples of 16 bytes."""
    return all(
        x.stride(1) == 1 and x.stride(0) * x.element_size() % 16 == 0 and x.data_ptr() % 16 == 0 for x in tensors
    )
