"""Launchers of the Triton kernels: grids, tiles, scratch.  Validates nothing (see `interface.py`).

Grids follow from the number of positions and sequences alone, so no launch waits for a length on the device.
"""

import functools
from typing import Any

import torch
from torch import Tensor
from triton.experimental.gluon.language import NVMMASharedLayout

from attention_kernels import schedule, tile_sums
from attention_kernels.backward import dkdv_kernel, dq_kernel
from attention_kernels.forward import forward_kernel
from attention_kernels.launcher import Blocks, launch
from attention_kernels.mask import SemiLocalMask
from attention_kernels.rows import pad_size
from attention_kernels.schedule import Schedule
from attention_kernels.tuning import AttentionConfig, TileConfig, choose_config

# Parts that long tiles are split into, over all heads: a few waves of a large GPU.
_SPLIT_PROGRAMS = 1024


def forward(
    q_THK: Tensor,
    k_THK: Tensor,
    v_THV: Tensor,
    offsets: Tensor,
    mask: SemiLocalMask,
    *,
    num_targets: Tensor | None,
    scale: float,
    max_len: int,
    config: AttentionConfig | None = None,
) -> Tensor:
    """Attention output [T, H, V] in v's dtype.  Grid: (items of row tiles x heads); accumulates in float32."""
    out = torch.empty(v_THV.shape, dtype=v_THV.dtype, device=v_THV.device)
    if out.numel() == 0:
        return out
    tile = (config or _config(mask, q_THK, v_THV)).forward
    heads = q_THK.shape[1]
    plan, _ = build_schedule(mask, offsets, num_targets, q_THK, v_THV, tile.rows, None)
    assert plan is not None
    tma = _use_tma(q_THK, k_THK, v_THV)
    launch(
        forward_kernel,
        (plan.max_items * heads,),
        *_rows(tma, (q_THK, tile.rows), (k_THK, tile.keys), (v_THV, tile.keys)),
        *(out, plan.table, partials(plan, q_THK, tile.rows, v_THV), plan.counters, heads, scale / 2, 1 / max_len),
        *_strides(q_THK, k_THK, v_THV, out),
        **_options(mask, plan, q_THK, v_THV, num_targets, tile, tma),
    )
    return out


def backward(
    dout_THV: Tensor,
    q_THK: Tensor,
    k_THK: Tensor,
    v_THV: Tensor,
    offsets: Tensor,
    mask: SemiLocalMask,
    *,
    num_targets: Tensor | None,
    scale: float,
    max_len: int,
    out: tuple[Tensor, Tensor, Tensor],
    scaled: bool = False,
    sums: bool = False,
    config: AttentionConfig | None = None,
) -> tuple[Tensor, ...] | None:
    """Writes the gradients of q, k and v into `out`.  Grids: row tiles x heads, key tiles x heads; sums in float32.

    There must be a position.  `scaled` and `sums` as in `interface.hstu_projection_backward`.
    """
    dq, dk, dv = out
    tiles = config or _config(mask, q_THK, v_THV)
    rows, keys = build_schedule(mask, offsets, num_targets, q_THK, v_THV, tiles.dq.rows, tiles.dkdv.keys)
    assert rows is not None and keys is not None
    inputs = (dout_THV, q_THK, k_THK, v_THV)
    options: dict[str, Any] = {"scale": scale, "max_len": max_len, "scaled": scaled}
    total = tile_sums.allocate(rows, keys, out) if sums else None
    q_sums, k_sums, v_sums = total or (None, None, None)
    backward_keys(inputs, (dk, dv), (k_sums, v_sums), mask, num_targets, keys, tiles.dkdv, **options)
    backward_rows(inputs, dq, q_sums, mask, num_targets, rows, tiles.dq, **options)
    return total and tile_sums.add(rows, keys, total, out)


def backward_keys(
    inputs: tuple[Tensor, Tensor, Tensor, Tensor],
    out: tuple[Tensor, Tensor],
    sums: tuple[Tensor | None, Tensor | None],
    mask: SemiLocalMask,
    num_targets: Tensor | None,
    plan: Schedule,
    tile: TileConfig,
    *,
    scale: float,
    max_len: int,
    scaled: bool,
) -> None:
    """Gradients of k and v from (dout, q, k, v), one program a key tile and head."""
    dout, q, k, v = inputs
    tma = _use_tma(*inputs)
    heads = q.shape[1]
    launch(
        dkdv_kernel,
        (plan.max_items * heads,),
        *_rows(tma, (dout, tile.rows), (q, tile.rows), (k, tile.keys), (v, tile.keys)),
        *(*out, *sums, plan.table, partials(plan, q, tile.keys, q), partials(plan, q, tile.keys, v)),
        *(plan.counters, plan.counters[plan.split_items * heads :], heads),
        *(scale / 2, scale / (2 * max_len), 1 / max_len),
        *_strides(*inputs, *out),
        SCALED=scaled,
        **_options(mask, plan, q, v, num_targets, tile, tma),
    )


def backward_rows(
    inputs: tuple[Tensor, Tensor, Tensor, Tensor],
    dq: Tensor,
    sums: Tensor | None,
    mask: SemiLocalMask,
    num_targets: Tensor | None,
    plan: Schedule,
    tile: TileConfig,
    *,
    scale: float,
    max_len: int,
    scaled: bool,
) -> None:
    """Gradient of q from (dout, q, k, v), one program a row tile and head."""
    dout, q, k, v = inputs
    tma = _use_tma(*inputs)
    heads = q.shape[1]
    launch(
        dq_kernel,
        (plan.max_items * heads,),
        *_rows(tma, (dout, tile.rows), (q, tile.rows), (k, tile.keys), (v, tile.keys)),
        *(dq, sums, plan.table, partials(plan, q, tile.rows, q), plan.counters, heads),
        *(scale / 2, scale / (2 * max_len)),
        *_strides(*inputs, dq),
        SCALED=scaled,
        **_options(mask, plan, q, v, num_targets, tile, tma),
    )


def build_schedule(
    mask: SemiLocalMask,
    offsets: Tensor,
    num_targets: Tensor | None,
    q_THK: Tensor,
    v_THV: Tensor,
    row_block: int | None,
    key_block: int | None,
    split_programs: int = _SPLIT_PROGRAMS,
) -> tuple[Schedule | None, Schedule | None]:
    """`schedule.build` for tensors."""
    positions, heads, key_size = q_THK.shape
    return schedule.build(
        mask,
        offsets,
        num_targets,
        num_positions=positions,
        num_heads=heads,
        row_block=row_block,
        key_block=key_block,
        split_programs=split_programs,
        position_bytes=heads * (key_size + v_THV.shape[2]) * q_THK.element_size(),
    )


def _config(mask: SemiLocalMask, q_THK: Tensor, v_THV: Tensor) -> AttentionConfig:
    return choose_config(mask, q_THK.dtype, block_size(q_THK, v_THV))


def block_size(*tensors: Tensor) -> int:
    """The largest of the head sizes, padded."""
    return max(pad_size(x.shape[2]) for x in tensors)


def partials(plan: Schedule, q_THK: Tensor, block: int, model: Tensor) -> Tensor | None:
    """Room for the partial sums of split tiles of `block` positions shaped like `model`'s; None where none is split."""
    if plan.split_items == 0:
        return None
    shape = (plan.split_items * q_THK.shape[1], block, pad_size(model.shape[2]))
    return torch.empty(shape, dtype=torch.float32, device=q_THK.device)


def _options(
    mask: SemiLocalMask,
    plan: Schedule,
    q_THK: Tensor,
    v_THV: Tensor,
    num_targets: Tensor | None,
    tile: TileConfig,
    tma: bool,
) -> dict[str, Any]:
    """Compile-time arguments that the three kernels share."""
    flags = (mask.local is not None, num_targets is not None, plan.split_items > 0, tma)
    return _compile_options(q_THK.dtype, q_THK.is_cuda, q_THK.shape[2], v_THV.shape[2], tile, *flags)


@functools.cache
def _compile_options(
    dtype: torch.dtype, is_cuda: bool, key_size: int, value_size: int, tile: TileConfig, *flags: bool
) -> dict[str, Any]:
    """Cached, because a launch takes the host as long as a short kernel takes the GPU."""
    half = dtype != torch.float32
    return {
        "K": key_size,
        "V": value_size,
        "BLOCK_K": pad_size(key_size),
        "BLOCK_V": pad_size(value_size),
        "BLOCK_M": tile.rows,
        "BLOCK_N": tile.keys,
        **dict(zip(("HAS_LOCAL", "HAS_TARGETS", "SPLIT", "TMA"), flags, strict=True)),
        # tanh.approx is exact to about 11 bits: enough for 16-bit inputs only.
        "FAST_TANH": half and is_cuda,
        "PRECISION": "tf32x3" if not half else "tf32" if is_cuda else "upcast",
        "STAGES": tile.stages,
        "num_warps": tile.warps,
        "num_stages": tile.stages,
        "maxnreg": tile.registers,
    }


def _rows(tma: bool, *tensors: tuple[Tensor, int]) -> list[Tensor] | list[Blocks]:
    """Kernel arguments for loading blocks of rows: the tensors, or what the TMA loads, seen as [H, T, size]."""
    if not tma:
        return [x for x, _ in tensors]
    return [head_rows(x, block) for x, block in tensors]


def head_rows(x: Tensor, block: int, layout: NVMMASharedLayout | None = None) -> Blocks:
    """Blocks of rows of one head, the tensor seen as [H, T, size]; `layout` as in `Blocks`."""
    (t, h, size), (stride_t, stride_h, _) = x.shape, x.stride()
    return Blocks(x, (1, block, pad_size(size)), (h, t, size), (stride_h, stride_t, 1), layout)


def _use_tma(*tensors: Tensor) -> bool:
    """Whether the tensor memory accelerator reads these: all or none.

    Not float32 wider than 64: products in three parts, of blocks as it leaves them, overflow the registers.
    """
    wide = tensors[0].dtype == torch.float32 and block_size(*tensors) > 64
    return not wide and _has_tma(tensors[0].device) and tma_aligned(*tensors)


def tma_aligned(*tensors: Tensor) -> bool:
    """Whether every row starts at a multiple of 16 bytes."""
    size = tensors[0].element_size()
    for x in tensors:
        stride_t, stride_h, _ = x.stride()
        if (x.data_ptr() | stride_t * size | stride_h * size) % 16 != 0:
            return False
    return True


@functools.cache
def _has_tma(device: torch.device) -> bool:
    """Hopper and later have it, and so does the interpreter."""
    return device.type != "cuda" or torch.cuda.get_device_capability(device)[0] >= 9


def _strides(*tensors: Tensor) -> list[int]:
    return [stride for x in tensors for stride in x.stride()[:2]]
