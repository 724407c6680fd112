"""A matrix product in Triton whose epilogue does what would otherwise be a pass of its own.  Validates nothing.

out = act(A B * scales + bias) + residual, written once, where every part but the product is optional: SiLU on the first
`active` columns with U split off into a tensor of its own, the values before SiLU as a second result, a residual tile
by tile, and row and column scales for FP8 operands.  Tiles are moved by the tensor memory accelerator, so rows must
start at multiples of 16 bytes.
"""

import os
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
"""Whether Triton runs its interpreter, which has no inline assembly."""


@triton.jit
def _silu(x, APPROXIMATE: tl.constexpr):
    """x sigmoid(x) = h + h tanh(h), h = x / 2: one special-function instruction instead of two."""
    if APPROXIMATE:
        h = 0.5 * x
        t = tl.inline_asm_elementwise("tanh.approx.f32 $0, $1;", "=f,f", [h], dtype=tl.float32, is_pure=True, pack=1)
        return h + h * t
    return x / (1.0 + tl.exp(-x))


@triton.jit
def _matmul_kernel(
    a_desc,
    b_desc,
    out_desc,
    u_desc,
    raw_desc,
    residual_desc,
    p_bias,
    p_row_scale,
    p_column_scale,
    M,
    N: tl.constexpr,
    K: tl.constexpr,
    U_WIDTH: tl.constexpr,
    STORE_U: tl.constexpr,
    ACTIVE: tl.constexpr,
    BIAS: tl.constexpr,
    RESIDUAL: tl.constexpr,
    RAW: tl.constexpr,
    SCALED: tl.constexpr,
    B_IS_NK: tl.constexpr,
    APPROXIMATE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    # Neighbouring programs share rows of A, so that A is read from memory about once.
    tiles_n: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    first_m = (tl.program_id(0) // tiles_n) * BLOCK_M
    first_n = (tl.program_id(0) % tiles_n) * BLOCK_N
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for k in range(0, K, BLOCK_K):
        a = a_desc.load([first_m, k])
        b = b_desc.load([first_n, k]).T if B_IS_NK else b_desc.load([k, first_n])
        acc = tl.dot(a, b, acc)
    columns = first_n + tl.arange(0, BLOCK_N)
    if SCALED:
        rows = first_m + tl.arange(0, BLOCK_M)
        row_scale = tl.load(p_row_scale + rows, mask=rows < M, other=0.0)
        column_scale = tl.load(p_column_scale + columns, mask=columns < N, other=0.0)
        acc = acc * row_scale[:, None] * column_scale[None, :]
    if BIAS:
        acc += tl.load(p_bias + columns, mask=columns < N, other=0.0).to(tl.float32)[None, :]
    if RESIDUAL:
        acc += residual_desc.load([first_m, first_n]).to(tl.float32)
    if RAW:
        raw_desc.store([first_m, first_n], acc.to(out_desc.dtype))
    if ACTIVE > 0:
        # Where values before SiLU are kept, SiLU sees them as they are kept.
        rounded = acc.to(out_desc.dtype).to(tl.float32)
        if first_n < ACTIVE:
            acc = _silu(rounded, APPROXIMATE)
    if U_WIDTH > 0:
        if first_n < U_WIDTH:
            if STORE_U:
                u_desc.store([first_m, first_n], acc.to(out_desc.dtype))
        else:
            out_desc.store([first_m, first_n - U_WIDTH], acc.to(out_desc.dtype))
    else:
        out_desc.store([first_m, first_n], acc.to(out_desc.dtype))


def tiles(N: int, *, fp8: bool) -> dict[str, int]:
    """Tile sizes: two programs fit a multiprocessor, so that one's epilogue hides behind the other's products.

    Chosen from `benchmarks.layer_products` on one NVIDIA H200.
    """
    if INTERPRETED:
        return {"BLOCK_M": 32, "BLOCK_N": 16, "BLOCK_K": 32, "num_warps": 4, "num_stages": 1}
    return {
        "BLOCK_M": 128,
        "BLOCK_N": 128,
        "BLOCK_K": 128 if fp8 else 64,
        "num_warps": 4 if fp8 else 8,
        "num_stages": 3,
    }


def launch(
    a: Tensor,
    b: Tensor,
    out: Tensor,
    *,
    b_is_nk: bool = False,
    u: Tensor | None = None,
    u_width: int = 0,
    raw: Tensor | None = None,
    active: int = 0,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    row_scale: Tensor | None = None,
    column_scale: Tensor | None = None,
    config: dict[str, int] | None = None,
) -> None:
    """Writes `out` [M, N], or with `u_width` the columns behind U into `out` [M, N - U], and U into `u` if given.

    One program a tile of BLOCK_M x BLOCK_N, accumulated in float32.  `active` and U's width must be multiples of
    BLOCK_N (or `active` at least N).
    """
    M, K = a.shape
    N = b.shape[0] if b_is_nk else b.shape[1]
    chosen = dict(config or tiles(N, fp8=row_scale is not None))
    block_m, block_n, block_k = chosen["BLOCK_M"], chosen["BLOCK_N"], chosen["BLOCK_K"]
    tile = [block_m, block_n]
    if M == 0:
        return

    out_descriptor = TensorDescriptor.from_tensor(out, tile)

    def descriptor(x: Tensor | None, block: list[int]) -> Any:
        # What the kernel does not touch needs some descriptor all the same.
        return out_descriptor if x is None else TensorDescriptor.from_tensor(x, block)

    _matmul_kernel[(triton.cdiv(M, block_m) * triton.cdiv(N, block_n),)](
        descriptor(a, [block_m, block_k]),
        descriptor(b, [block_n, block_k] if b_is_nk else [block_k, block_n]),
        out_descriptor,
        descriptor(u, tile),
        descriptor(raw, tile),
        descriptor(residual, tile),
        bias,
        row_scale,
        column_scale,
        M,
        N=N,
        K=K,
        U_WIDTH=u_width,
        STORE_U=u is not None,
        ACTIVE=active,
        BIAS=bias is not None,
        RESIDUAL=residual is not None,
        RAW=raw is not None,
        SCALED=row_scale is not None,
        B_IS_NK=b_is_nk,
        APPROXIMATE=out.dtype != torch.float32 and not INTERPRETED,
        **chosen,
    )


def fits(*tensors: Tensor) -> bool:
    """Whether the kernel takes these: 16-bit values (float32 would lose bits to TF32) in rows that the tensor memory
    accelerator can move, contiguous and starting at multiples of 16 bytes."""
    return all(
        x.element_size() <= 2
        and x.stride(1) == 1
        and x.stride(0) * x.element_size() % 16 == 0
        and x.data_ptr() % 16 == 0
        and x.numel() > 0
        for x in tensors
    )
