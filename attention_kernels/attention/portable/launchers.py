"""Launchers of the portable kernels: grids, tiles, scratch.  Validates nothing (see `interface.py`).

Grids follow from the number of positions and sequences alone, so no launch waits for a length on the device.
"""

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from triton.experimental.gluon.language import NVMMASharedLayout

from attention_kernels.attention import pair_biases, tile_sums
from attention_kernels.attention.plan import AttentionPlan, Schedule
from attention_kernels.attention.portable.backward import dkdv_kernel, dq_kernel
from attention_kernels.attention.portable.forward import forward_kernel
from attention_kernels.attention.portable.tuning import AttentionConfig, TileConfig, choose_config
from attention_kernels.attention.schedule import Shape, schedules
from attention_kernels.launcher import Blocks, launch
from attention_kernels.relative_bias import RelativeBiases
from attention_kernels.rows import pad_size

# Parts that long tiles are split into, over all heads: a few waves of a large GPU.
_SPLIT_PROGRAMS = 1024


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Backward:
    """One call of a backward: what it reads, and what it writes."""

    dout: Tensor
    q: Tensor
    k: Tensor
    v: Tensor
    plan: AttentionPlan
    dq: Tensor
    dk: Tensor
    dv: Tensor
    scaled: bool = False
    """Whether gradients are multiplied by what dq, dk and dv hold before they are written over it."""
    biases: RelativeBiases | None = None
    """The layer's biases, for a plan with times."""

    @property
    def inputs(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """dout, q, k, v."""
        return self.dout, self.q, self.k, self.v

    @property
    def gradients(self) -> tuple[Tensor, Tensor, Tensor]:
        """dq, dk, dv."""
        return self.dq, self.dk, self.dv


def forward(
    q_RHK: Tensor,
    k_THK: Tensor,
    v_THV: Tensor,
    plan: AttentionPlan,
    biases: RelativeBiases | None = None,
    *,
    config: AttentionConfig | None = None,
) -> Tensor:
    """Attention output [R, H, V] in v's dtype.  Grid: (items of row tiles x heads); accumulates in float32."""
    out = torch.empty((q_RHK.shape[0], *v_THV.shape[1:]), dtype=v_THV.dtype, device=v_THV.device)
    if out.numel() == 0:
        return out
    biased = biases is not None
    tile = (config or _config(plan, q_RHK, v_THV, biased=biased)).forward
    heads = q_RHK.shape[1]
    rows, _ = schedules(plan, shape_of(q_RHK, k_THK, v_THV), row_block=tile.rows, key_block=None)
    assert rows is not None
    tma = _use_tma(q_RHK, k_THK, v_THV, biased=biased)
    launch(
        forward_kernel,
        (rows.max_items * heads,),
        *_rows(tma, (q_RHK, tile.rows), (k_THK, tile.keys), (v_THV, tile.keys)),
        *(out, rows.table, partials(rows, tile.rows, v_THV), rows.arrivals, heads),
        *(plan.scale_of(q_RHK) / 2, 1 / plan.max_len),
        *_strides(q_RHK, k_THK, v_THV, out),
        *pair_biases.arguments(plan, biases),
        BIASED=biased,
        **_options(plan, rows, q_RHK, v_THV, tile, tma),
    )
    return out


def backward(call: Backward, *, sums: bool, config: AttentionConfig | None = None) -> tuple[Tensor, ...] | None:
    """Writes the gradients.  Grids: row tiles x heads, key tiles x heads; sums in float32.  There must be a row.

    Returns the gradients' sums over positions, if asked for, as `interface.projection_backward`, and behind them the
    gradients of biases, where there are any.
    """
    tiles = config or _config(call.plan, call.q, call.v, biased=call.biases is not None)
    rows, keys = schedules(
        call.plan, shape_of(call.q, call.k, call.v), row_block=tiles.dq.rows, key_block=tiles.dkdv.keys
    )
    assert rows is not None and keys is not None
    total = tile_sums.allocate(rows, keys, call.gradients) if sums else None
    q_sums, k_sums, v_sums = total or (None, None, None)
    backward_keys(call, (k_sums, v_sums), keys, tiles.dkdv)
    dscore = None if call.biases is None else pair_biases.allocate_scores(call.q, call.plan)
    backward_rows(call, q_sums, rows, tiles.dq, dscore)
    added = total and tile_sums.add(rows, keys, total, call.gradients)
    if call.biases is None or dscore is None:
        return added
    return *(added or ()), *pair_biases.gradients(dscore, call.plan, call.biases)


def backward_keys(call: Backward, sums: tuple[Tensor | None, Tensor | None], keys: Schedule, tile: TileConfig) -> None:
    """Gradients of k and v, one program a key tile and head."""
    q, k, v, dk, dv = call.q, call.k, call.v, call.dk, call.dv
    tma = _use_tma(*call.inputs, biased=call.biases is not None)
    heads, scale, max_len = q.shape[1], call.plan.scale_of(q), call.plan.max_len
    launch(
        dkdv_kernel,
        (keys.max_items * heads,),
        *_rows(tma, (call.dout, tile.rows), (q, tile.rows), (k, tile.keys), (v, tile.keys)),
        *(dk, dv, *sums, keys.table, partials(keys, tile.keys, k), partials(keys, tile.keys, v)),
        *(keys.arrivals, keys.arrivals[keys.split_items * heads :], heads),
        *(scale / 2, scale / (2 * max_len), 1 / max_len),
        *_strides(*call.inputs, dk, dv),
        *pair_biases.arguments(call.plan, call.biases),
        SCALED=call.scaled,
        BIASED=call.biases is not None,
        **_options(call.plan, keys, q, v, tile, tma),
    )


def backward_rows(
    call: Backward, sums: Tensor | None, rows: Schedule, tile: TileConfig, dscore: Tensor | None = None
) -> None:
    """Gradient of q, one program a row tile and head; with biases also scores' (`pair_biases.allocate_scores`)."""
    q, k, v = call.q, call.k, call.v
    tma = _use_tma(*call.inputs, biased=call.biases is not None)
    heads, scale = q.shape[1], call.plan.scale_of(q)
    launch(
        dq_kernel,
        (rows.max_items * heads,),
        *_rows(tma, (call.dout, tile.rows), (q, tile.rows), (k, tile.keys), (v, tile.keys)),
        *(call.dq, sums, rows.table, partials(rows, tile.rows, q), rows.arrivals, heads),
        *(scale / 2, scale / (2 * call.plan.max_len)),
        *_strides(*call.inputs, call.dq),
        *pair_biases.arguments(call.plan, call.biases),
        *(dscore, 0 if dscore is None else dscore.stride(0)),
        SCALED=call.scaled,
        BIASED=call.biases is not None,
        **_options(call.plan, rows, q, v, tile, tma),
    )


def shape_of(q_RHK: Tensor, k_THK: Tensor, v_THV: Tensor, split_programs: int = _SPLIT_PROGRAMS) -> Shape:
    """What the schedules of these tensors depend on."""
    rows, heads, key_size = q_RHK.shape
    return Shape(
        num_rows=rows,
        num_positions=k_THK.shape[0],
        num_heads=heads,
        position_bytes=heads * (key_size + v_THV.shape[2]) * q_RHK.element_size(),
        split_programs=split_programs,
    )


def _config(plan: AttentionPlan, q: Tensor, v: Tensor, *, biased: bool) -> AttentionConfig:
    return choose_config(plan.mask, q.dtype, block_size(q, v), biased=biased)


def block_size(*tensors: Tensor) -> int:
    """The largest of the head sizes, padded."""
    return max(pad_size(x.shape[2]) for x in tensors)


def partials(schedule: Schedule, block: int, model: Tensor) -> Tensor | None:
    """Room for the partial sums of split tiles of `block` positions shaped like `model`'s; None where none is split."""
    if schedule.split_items == 0:
        return None
    shape = (schedule.split_items * model.shape[1], block, pad_size(model.shape[2]))
    return torch.empty(shape, dtype=torch.float32, device=model.device)


def _options(
    plan: AttentionPlan, schedule: Schedule, q: Tensor, v: Tensor, tile: TileConfig, tma: bool
) -> dict[str, Any]:
    """Compile-time arguments that the three kernels share."""
    flags = (plan.mask.local is not None, plan.num_targets is not None, schedule.split_items > 0, tma)
    return _compile_options(q.dtype, q.is_cuda, q.shape[2], v.shape[2], tile, *flags)


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
        # As `sigmoid.approximate` says.
        "APPROXIMATE": half and is_cuda,
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


def _use_tma(*tensors: Tensor, biased: bool) -> bool:
    """Whether the tensor memory accelerator reads these: all or none.

    Not float32 wider than 64, or beside biases: products in three parts, of blocks as it leaves them, overflow the
    registers.
    """
    large = tensors[0].dtype == torch.float32 and (biased or block_size(*tensors) > 64)
    return not large and _has_tma(tensors[0].device) and tma_aligned(*tensors)


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
