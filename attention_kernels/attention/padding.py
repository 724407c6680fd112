"""Zeros behind the last sequence of a padded problem: what no kernel writes would otherwise be whatever lay there.

The number of positions is on the device; programs read it there, so a launch has the same arguments for every batch
of a size.

Legend as in `interface.py`.
"""

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from attention_kernels.launcher import launch
from attention_kernels.rows import multiprocessors, warp_blocks

_MOST = 3
"""The most tensors that one launch fills."""


def zero(tensors: Sequence[tuple[Tensor, Tensor]], *, on_host: bool = False) -> None:
    """Write 0 to each tensor [T, H, size], up to three, from the last of its offsets on.

    Heads lie one behind another; rows may be slices of wider ones.  `on_host` reads the offsets there.
    """
    if on_host:
        for x, offsets in tensors:
            x[int(offsets[-1]) :] = 0
        return
    sizes = [x.shape[1] * x.shape[2] for x, _ in tensors]
    assert len(tensors) <= _MOST and all(x.stride(1) == x.shape[2] or x.shape[1] == 1 for x, _ in tensors)
    rows, columns, warps = warp_blocks(max(sizes))
    arguments: list[Tensor | int | None] = []
    for (x, offsets), size in zip(tensors, sizes, strict=True):
        arguments += [x, offsets, offsets.shape[0] - 1, x.shape[0], x.stride(0), size]
    launch(
        zero_kernel,
        (multiprocessors(tensors[0][0].device),),
        *arguments,
        *[None, None, 0, 0, 0, 0] * (_MOST - len(tensors)),
        ROWS=rows,
        COLS=columns,
        num_warps=warps,
    )


@triton.jit
def _zero(x, offsets, num_sequences, num_rows, stride, size, ROWS: tl.constexpr, COLS: tl.constexpr):
    if x is not None:
        o_column = tl.arange(0, COLS)
        first = tl.load(offsets + num_sequences).to(tl.int64) + tl.program_id(0) * ROWS
        # A while loop: with numpy 2.4, Triton's interpreter cannot use its tensors as bounds of a range.
        while first < num_rows:
            o_row = first + tl.arange(0, ROWS)
            mask = (o_row < num_rows)[:, None] & (o_column < size)[None, :]
            zeros = tl.zeros([ROWS, COLS], x.dtype.element_ty)
            tl.store(x + o_row[:, None] * stride + o_column[None, :], zeros, mask=mask)
            first += tl.num_programs(0) * ROWS


@triton.jit(do_not_specialize=["a_sequences", "b_sequences", "c_sequences", "a_rows", "b_rows", "c_rows"])
def zero_kernel(
    a, a_offsets, a_sequences, a_rows, a_stride, a_size,
    b, b_offsets, b_sequences, b_rows, b_stride, b_size,
    c, c_offsets, c_sequences, c_rows, c_stride, c_size,
    ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """Programs walk over the padding of one tensor after another, a block of rows at a time."""
    _zero(a, a_offsets, a_sequences, a_rows, a_stride, a_size, ROWS, COLS)
    _zero(b, b_offsets, b_sequences, b_rows, b_stride, b_size, ROWS, COLS)
    _zero(c, c_offsets, c_sequences, c_rows, c_stride, c_size, ROWS, COLS)
