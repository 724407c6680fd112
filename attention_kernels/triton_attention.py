"""Launchers of the Triton kernels: grids, tiles, scratch.  Validates nothing (see `interface.py`).

Grids follow from the number of positions and sequences alone, so no launch waits for a length on the device.
"""

from typing import Any

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from attention_kernels import schedule
from attention_kernels.backward import dkdv_kernel, dq_kernel
from attention_kernels.forward import forward_kernel
from attention_kernels.mask import SemiLocalMask
from attention_kernels.tuning import AttentionConfig, TileConfig, choose_config


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
    tile = (config or _config(mask, q_THK, v_THV, offsets)).forward
    table, _ = _schedule(mask, q_THK, offsets, num_targets, row_tile=tile, key_tile=None)
    partials, counters = _scratch(mask, q_THK, tile.rows, v_THV.shape[2])
    tma = _use_tma(q_THK, k_THK, v_THV)
    _launch(
        forward_kernel,
        table,
        q_THK.shape[1],
        *_rows(tma, (q_THK, tile.rows), (k_THK, tile.keys), (v_THV, tile.keys)),
        *(out, table, partials, counters, q_THK.shape[1], scale / 2, 1 / max_len),
        *_strides(q_THK, k_THK, v_THV, out),
        **_options(mask, q_THK, v_THV, num_targets, tile, tma),
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
    deterministic: bool,
    out: tuple[Tensor, Tensor, Tensor],
    config: AttentionConfig | None = None,
) -> None:
    """Writes the gradients of q, k and v into `out`.  Grids: row tiles x heads, key tiles x heads; sums in float32."""
    if q_THK.numel() == 0:
        return
    dq, dk, dv = out
    tiles = config or _config(mask, q_THK, v_THV, offsets)
    row_table, key_table = _schedule(mask, q_THK, offsets, num_targets, row_tile=tiles.dq, key_tile=tiles.dkdv)
    inputs = (dout_THV, q_THK, k_THK, v_THV)
    scales = {"scale": scale, "max_len": max_len}
    backward_keys(inputs, (dk, dv), mask, num_targets, key_table, tiles.dkdv, **scales)
    backward_rows(inputs, dq, mask, num_targets, row_table, tiles.dq, **scales)


def backward_keys(
    inputs: tuple[Tensor, Tensor, Tensor, Tensor],
    out: tuple[Tensor, Tensor],
    mask: SemiLocalMask,
    num_targets: Tensor | None,
    table: Tensor,
    tile: TileConfig,
    *,
    scale: float,
    max_len: int,
) -> None:
    """Gradients of k and v from (dout, q, k, v), one program a key tile and head."""
    dout, q, k, v = inputs
    tma = _use_tma(*inputs)
    k_partials, k_counters = _scratch(mask, q, tile.keys, q.shape[2])
    v_partials, v_counters = _scratch(mask, q, tile.keys, v.shape[2])
    _launch(
        dkdv_kernel,
        table,
        q.shape[1],
        *_rows(tma, (dout, tile.rows), (q, tile.rows), (k, tile.keys), (v, tile.keys)),
        *(*out, table, k_partials, v_partials, k_counters, v_counters, q.shape[1]),
        *(scale / 2, scale / (2 * max_len), 1 / max_len),
        *_strides(*inputs, *out),
        **_options(mask, q, v, num_targets, tile, tma),
    )


def backward_rows(
    inputs: tuple[Tensor, Tensor, Tensor, Tensor],
    dq: Tensor,
    mask: SemiLocalMask,
    num_targets: Tensor | None,
    table: Tensor,
    tile: TileConfig,
    *,
    scale: float,
    max_len: int,
) -> None:
    """Gradient of q from (dout, q, k, v), one program a row tile and head."""
    dout, q, k, v = inputs
    tma = _use_tma(*inputs)
    partials, counters = _scratch(mask, q, tile.rows, q.shape[2])
    _launch(
        dq_kernel,
        table,
        q.shape[1],
        *_rows(tma, (dout, tile.rows), (q, tile.rows), (k, tile.keys), (v, tile.keys)),
        *(dq, table, partials, counters, q.shape[1], scale / 2, scale / (2 * max_len)),
        *_strides(*inputs, dq),
        **_options(mask, q, v, num_targets, tile, tma),
    )


def _launch(kernel: Any, table: Tensor, heads: int, *arguments: Any, **options: Any) -> None:
    kernel[((table.shape[0] - 1) * heads,)](*arguments, **options)


def _config(mask: SemiLocalMask, q_THK: Tensor, v_THV: Tensor, offsets: Tensor) -> AttentionConfig:
    head_size = max(_block_size(q_THK), _block_size(v_THV))
    return choose_config(mask, q_THK.dtype, head_size, q_THK.shape[0] // (offsets.shape[0] - 1))


def _schedule(
    mask: SemiLocalMask,
    q_THK: Tensor,
    offsets: Tensor,
    num_targets: Tensor | None,
    *,
    row_tile: TileConfig,
    key_tile: TileConfig | None,
) -> tuple[Tensor, Tensor]:
    """Tables of row tiles and, where asked for, of key tiles."""
    row_table, key_table = schedule.build(
        mask,
        offsets,
        num_targets,
        num_positions=q_THK.shape[0],
        num_heads=q_THK.shape[1],
        row_block=row_tile.rows,
        key_block=None if key_tile is None else key_tile.keys,
    )
    assert row_table is not None
    return row_table, row_table if key_table is None else key_table


def _scratch(mask: SemiLocalMask, q_THK: Tensor, block: int, size: int) -> tuple[Tensor | None, Tensor | None]:
    """Room for the parts of split tiles, and one arrival counter a tile and head; None where nothing is split."""
    items = schedule.split_items(mask, q_THK.shape[1])
    if items == 0:
        return None, None
    slots = items * q_THK.shape[1]
    partials = torch.empty((slots, block, _pad(size)), dtype=torch.float32, device=q_THK.device)
    return partials, torch.zeros(slots, dtype=torch.int32, device=q_THK.device)


def _options(
    mask: SemiLocalMask, q_THK: Tensor, v_THV: Tensor, num_targets: Tensor | None, tile: TileConfig, tma: bool
) -> dict[str, Any]:
    """Compile-time arguments that the three kernels share."""
    half = q_THK.dtype != torch.float32
    return {
        "K": q_THK.shape[2],
        "V": v_THV.shape[2],
        "BLOCK_K": _block_size(q_THK),
        "BLOCK_V": _block_size(v_THV),
        "BLOCK_M": tile.rows,
        "BLOCK_N": tile.keys,
        "HAS_LOCAL": mask.local is not None,
        "HAS_TARGETS": num_targets is not None,
        "SPLIT": schedule.split_items(mask, q_THK.shape[1]) > 0,
        "TMA": tma,
        # tanh.approx is exact to about 11 bits: enough for 16-bit inputs only.
        "FAST_TANH": half and q_THK.is_cuda,
        "PRECISION": "tf32x3" if not half else "tf32" if q_THK.is_cuda else "upcast",
        "STAGES": tile.stages,
        "num_warps": tile.warps,
        "num_stages": tile.stages,
    }


def _rows(tma: bool, *tensors: tuple[Tensor, int]) -> list[Tensor | TensorDescriptor]:
    """Kernel arguments for loading blocks of rows: the tensors, or TMA descriptors seen as [H, T, size]."""
    if not tma:
        return [x for x, _ in tensors]
    descriptors = []
    for x, block in tensors:
        view = x.transpose(0, 1)
        descriptors.append(TensorDescriptor(view, view.shape, view.stride(), [1, block, _block_size(x)]))
    return descriptors


def _use_tma(*tensors: Tensor) -> bool:
    """Whether the tensor memory accelerator can read all of these: 16-byte alignment, and hardware that has one."""
    if tensors[0].is_cuda and torch.cuda.get_device_capability(tensors[0].device)[0] < 9:
        return False
    return all(
        x.data_ptr() % 16 == 0 and x.stride(0) * x.element_size() % 16 == 0 and x.stride(1) * x.element_size() % 16 == 0
        for x in tensors
    )


def _strides(*tensors: Tensor) -> list[int]:
    return [stride for x in tensors for stride in x.stride()[:2]]


def _block_size(x: Tensor) -> int:
    return _pad(x.shape[2])


def _pad(size: int) -> int:
    """Head sizes are padded to a power of two; products need at least 16."""
    return max(16, triton.next_power_of_2(size))
