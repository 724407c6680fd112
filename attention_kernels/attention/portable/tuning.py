"""Tile sizes by shape: a small table chosen by measurement, looked up, never searched at run time."""

import functools
from dataclasses import dataclass

import torch

from attention_kernels.mask import SemiLocalMask


@dataclass(frozen=True, kw_only=True, slots=True)
class TileConfig:
    """How one kernel tiles its work."""

    rows: int
    """Query rows of a tile."""

    keys: int
    """Keys of a tile."""

    warps: int
    """Warps of 32 threads a program."""

    stages: int
    """Loads in flight: iterations of the loop that are prefetched, the current one included."""

    registers: int | None = None
    """Most registers a thread, so that more programs fit a multiprocessor; None: as many as the compiler likes."""


@dataclass(frozen=True, kw_only=True, slots=True)
class AttentionConfig:
    """The tiles of the three kernels."""

    forward: TileConfig
    """Holds rows, walks keys."""

    dq: TileConfig
    """Holds rows, walks keys."""

    dkdv: TileConfig
    """Holds keys, walks rows."""


@functools.cache
def choose_config(mask: SemiLocalMask, dtype: torch.dtype, head_size: int, *, biased: bool = False) -> AttentionConfig:
    """The tiles for a mask, a dtype and the larger padded head size; `biased`: of attention with biases."""
    if (biased or dtype == torch.float32) and head_size > 64:
        # Split into three tf32 products, or beside biases: registers, not speed, decide.  Tiles too small for wgmma:
        # where its operands overflow the registers, ptxas 12.8 compiles it wrongly.
        tile = TileConfig(rows=16, keys=32, warps=8, stages=1)
        return AttentionConfig(forward=tile, dq=tile, dkdv=TileConfig(rows=32, keys=16, warps=8, stages=1))
    if biased:
        # Biases are looked up in the loop: prefetched like keys they would overflow the registers.
        middle = TileConfig(rows=32, keys=32, warps=4, stages=1)
        few_keys = TileConfig(rows=32, keys=16, warps=4, stages=1)
        if dtype != torch.float32:
            return AttentionConfig(forward=TileConfig(rows=64, keys=32, warps=4, stages=1), dq=middle, dkdv=few_keys)
        if head_size > 32:
            return AttentionConfig(forward=middle, dq=middle, dkdv=middle)
        few_rows = TileConfig(rows=16, keys=32, warps=4, stages=1)
        return AttentionConfig(forward=few_rows, dq=few_rows, dkdv=few_keys)
    if dtype == torch.float32:
        tile = TileConfig(rows=64, keys=32, warps=4, stages=2)
        return AttentionConfig(forward=tile, dq=tile, dkdv=TileConfig(rows=32, keys=32, warps=4, stages=1))
    if head_size > 128:
        return AttentionConfig(
            forward=TileConfig(rows=128, keys=64, warps=8, stages=2),
            dq=TileConfig(rows=128, keys=32, warps=8, stages=2),
            dkdv=TileConfig(rows=32, keys=64, warps=8, stages=2),
        )
    if mask.local is None:
        return AttentionConfig(
            forward=TileConfig(rows=128, keys=64, warps=4, stages=2),
            dq=TileConfig(rows=128, keys=64, warps=8, stages=3),
            dkdv=TileConfig(rows=64, keys=128, warps=8, stages=3),
        )
    # Short rows of tiles: a larger block covers more positions that the band does not need.
    return AttentionConfig(
        forward=TileConfig(rows=64, keys=64, warps=4, stages=3),
        dq=TileConfig(rows=64, keys=64, warps=4, stages=2),
        dkdv=TileConfig(rows=32, keys=64, warps=4, stages=3),
    )
