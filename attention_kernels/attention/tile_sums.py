"""Sums of gradients over positions: attention's backward writes a row for each tile; here they are added, in order."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from attention_kernels.attention.items import load_parts
from attention_kernels.attention.plan import Schedule
from attention_kernels.launcher import launch
from attention_kernels.rows import cdiv, pad_size

_COLUMNS = 16
_ROWS = 512


def allocate(
    rows: Schedule,
    keys: Schedule,
    gradients: tuple[Tensor, Tensor, Tensor],
    *,
    row_groups: int = 1,
    key_groups: int = 1,
) -> tuple[Tensor, Tensor, Tensor]:
    """Room for each tile's sums of q's, k's and v's gradients over its rows, in so many parts of them:
    [items, H, groups, padded size] each."""
    q, k, v = (
        torch.empty(schedule.max_items, x.shape[1], groups, pad_size(x.shape[2]), dtype=torch.float32, device=x.device)
        for x, schedule, groups in zip(gradients, (rows, keys, keys), (row_groups, key_groups, key_groups), strict=True)
    )
    return q, k, v


def add(
    rows: Schedule, keys: Schedule, sums: tuple[Tensor, Tensor, Tensor], gradients: tuple[Tensor, Tensor, Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """The sums of q's, k's and v's gradients, [H, size] each."""
    q, k, v = (torch.empty(x.shape[1:], dtype=torch.float32, device=x.device) for x in gradients)
    q_sums, k_sums, v_sums = sums
    launch(
        add_tiles_kernel,
        (q.shape[0], cdiv(max(k_sums.shape[3], v_sums.shape[3]), _COLUMNS), 3),
        *(rows.table, keys.table, *sums, q, k, v, q.shape[0]),
        Q_GROUPS=q_sums.shape[2],
        K_GROUPS=k_sums.shape[2],
        K=k.shape[1],
        V=v.shape[1],
        BLOCK_K=k_sums.shape[3],
        BLOCK_V=v_sums.shape[3],
        ROWS=_ROWS,
        COLUMNS=_COLUMNS,
        num_warps=8,
    )
    return q, k, v


@triton.jit
def add_tiles(
    table, sums, x, H, GROUPS: tl.constexpr, SIZE: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Some columns of a head's sums: all items that hold one, which are those with part 0."""
    i_h = tl.program_id(0)
    o_size = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    num_rows = tl.load(table) * GROUPS
    b_sum = tl.zeros([ROWS, COLUMNS], tl.float32)
    for first in range(0, num_rows, ROWS):
        o_row = first + tl.arange(0, ROWS)
        i_item = o_row // GROUPS
        part = load_parts(table, i_item, o_row < num_rows)
        slot = (i_item * H + i_h) * GROUPS + o_row % GROUPS
        p_sum = sums + slot.to(tl.int64)[:, None] * BLOCK_SIZE + o_size[None, :]
        b_row = tl.load(p_sum, mask=(o_row < num_rows)[:, None] & (o_size < SIZE)[None, :], other=0.0)
        # Not in the mask of the load, which would wait for `part`.
        b_sum += tl.where((part == 0)[:, None], b_row, 0.0)
    tl.store(x + i_h * SIZE + o_size, tl.sum(b_sum, 0), mask=o_size < SIZE)


@triton.jit(do_not_specialize=["H"])
def add_tiles_kernel(
    row_table, key_table, q_sums, k_sums, v_sums, q, k, v, H, Q_GROUPS: tl.constexpr, K_GROUPS: tl.constexpr,
    K: tl.constexpr, V: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Programs (head, columns, which of q, k and v)."""
    if tl.program_id(2) == 0:
        add_tiles(row_table, q_sums, q, H, Q_GROUPS, K, BLOCK_K, ROWS, COLUMNS)
    elif tl.program_id(2) == 1:
        add_tiles(key_table, k_sums, k, H, K_GROUPS, K, BLOCK_K, ROWS, COLUMNS)
    else:
        add_tiles(key_table, v_sums, v, H, K_GROUPS, V, BLOCK_V, ROWS, COLUMNS)
