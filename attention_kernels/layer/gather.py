"""Sums of rows gathered from several tensors: what a token is made of.

    out[t] = sum over the gathers of source[rows[t]]          (a row of -1 adds nothing)

takes one pass over the result, where PyTorch takes one a gather and one an addition.  Backward, a source whose rows are
gathered at most once receives rows of the gradient, by the inverse gather.  A table whose rows are gathered often, some
by half of all tokens, receives sums of them: tokens are sorted by row, each row's summed in parts of bounded length,
and a row's parts added in their order.  No atomics, the same bits every time.

Shapes: T results, N rows of a source, D width.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from attention_kernels.attention.checks import check_first_order
from attention_kernels.launcher import launch
from attention_kernels.layer.operations import LayerBackend, layer_backend
from attention_kernels.rows import cdiv, power_of_two, row_blocks

MAX_GATHERS = 5
_PART_LEN = 512
"""Tokens that one program adds up."""
_PART_COLUMNS = 128
_PART_ROWS = 32
"""Tokens (or parts) that a program reads at once."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Gather:
    """One summand of a token: rows of a table, and which of them each token takes."""

    source: Tensor
    """[N, D], any float type."""
    rows: Tensor
    """[T] int64 from -1 (nothing) to N - 1."""
    once: bool
    """No row is gathered twice."""


# Opaque to torch.compile, which cannot look into launches.
@torch.compiler.disable
def gather_sum(gathers: Sequence[Gather], dtype: torch.dtype, *, backend: LayerBackend | None = None) -> Tensor:
    """The sum [T, D], added in float32 (on the reference, float64 for float64) and rounded to `dtype`.

    Differentiable (once) in the sources.  `backend` None: by device.  One to MAX_GATHERS.
    """
    if not 1 <= len(gathers) <= MAX_GATHERS:
        raise ValueError(f"{len(gathers)} gathers, expected 1 to {MAX_GATHERS}: add up smaller ones before")
    first = gathers[0]
    for gather in gathers:
        if gather.rows.dtype != torch.int64:
            raise ValueError(f"rows are {gather.rows.dtype}, expected int64")
        if gather.source.shape[1:] != first.source.shape[1:] or gather.rows.shape != first.rows.shape:
            raise ValueError(
                f"a source {tuple(gather.source.shape)} with rows {tuple(gather.rows.shape)} cannot be added to one "
                f"{tuple(first.source.shape)} with rows {tuple(first.rows.shape)}: expected [N, D] and [T] of all"
            )
    out: Tensor = _GatherSum.apply(
        dtype,
        backend or layer_backend(first.source),
        tuple(gather.rows for gather in gathers),
        tuple((id(gather.rows), gather.once, gather.source.shape[0], gather.source.dtype) for gather in gathers),
        *(gather.source for gather in gathers),
    )
    return out


class _GatherSum(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        dtype: torch.dtype,
        backend: LayerBackend,
        rows: tuple[Tensor, ...],
        kinds: tuple[tuple[Any, ...], ...],
        *sources: Tensor,
    ) -> Tensor:
        """`kinds`: (which rows, once, N, type) of each source."""
        ctx.save_for_backward(*rows)
        ctx.backend, ctx.kinds = backend, kinds
        return _sum_rows(sources, rows, dtype, backend)

    @staticmethod
    def backward(ctx: Any, dout_TD: Tensor) -> tuple[Tensor | None, ...]:
        check_first_order("gather_sum")
        gradients: list[Tensor | None] = []
        dout_TD = dout_TD.contiguous()
        # Sources of one kind have the same gradient.
        done: dict[tuple[Any, ...], Tensor] = {}
        for needed, rows_T, kind in zip(ctx.needs_input_grad[4:], ctx.saved_tensors, ctx.kinds, strict=True):
            if needed and kind not in done:
                _, once, count, dtype = kind
                if once:
                    done[kind] = _sum_rows((dout_TD,), (_inverse(rows_T, count),), dtype, ctx.backend)
                else:
                    done[kind] = _sum_by_row(dout_TD, rows_T, count, dtype, ctx.backend)
            gradients.append(done[kind] if needed else None)
        return (None, None, None, None, *gradients)


def _inverse(rows_T: Tensor, count: int) -> Tensor:
    """For each of `count` rows the place in `rows_T` where it stands, or -1."""
    # What stands for nothing goes to one row more, which is cut off.
    inverse = rows_T.new_full((count + 1,), -1)
    inverse.scatter_(0, torch.where(rows_T < 0, count, rows_T), torch.arange(rows_T.numel(), device=rows_T.device))
    return inverse[:count]


def _sum_rows(sources: Sequence[Tensor], rows: Sequence[Tensor], dtype: torch.dtype, backend: LayerBackend) -> Tensor:
    """`gather_sum` without its backward."""
    num_rows, width = rows[0].shape[0], sources[0].shape[1]
    if backend == "reference":
        wide = torch.promote_types(dtype, torch.float32)
        total = torch.zeros(num_rows, width, dtype=wide, device=rows[0].device)
        for source, rows_T in zip(sources, rows, strict=True):
            here = torch.nonzero(rows_T >= 0)[:, 0]
            if here.numel() == num_rows:
                total += source.index_select(0, rows_T)
            else:
                total.index_add_(0, here, source.index_select(0, rows_T[here]).to(wide))
        return total.to(dtype)
    out = torch.empty(num_rows, width, dtype=dtype, device=rows[0].device)
    block, columns, warps = row_blocks(width)
    if num_rows:
        pairs = [x for pair in zip(sources, rows, strict=True) for x in pair]
        launch(
            _gather_kernel,
            (cdiv(num_rows, block),),
            *(x.contiguous() for x in pairs),
            *[None] * (2 * MAX_GATHERS - len(pairs)),
            out,
            num_rows,
            D=width,
            ROWS=block,
            COLS=columns,
            num_warps=warps,
        )
    return out


def _sum_by_row(values_TD: Tensor, rows_T: Tensor, count: int, dtype: torch.dtype, backend: LayerBackend) -> Tensor:
    """[count, D]: for each row the sum of the values at its places in `rows_T`."""
    num_values, width = values_TD.shape
    device = values_TD.device
    if backend == "reference":
        wide = values_TD.to(torch.promote_types(dtype, torch.float32))
        # What stands for nothing goes to one row more, which is cut off.
        places = torch.where(rows_T < 0, count, rows_T)
        sums: Tensor = torch.ops.aten.embedding_dense_backward(wide, places, count + 1, -1, False)
        return sums[:count].to(dtype)
    # int32 instead of int64: half as many bits are sorted in half the time.
    sorted_T, order_T = torch.sort(rows_T.int(), stable=True)
    ends = torch.searchsorted(sorted_T, torch.arange(count + 1, dtype=torch.int32, device=device))
    part_ends = torch.nn.functional.pad(torch.cumsum((ends.diff() + _PART_LEN - 1) // _PART_LEN, 0), (1, 0))
    # A bound that needs no lengths; rows of parts beyond the last are `count`.
    num_parts = num_values // _PART_LEN + min(count, num_values)
    row_of_part = torch.searchsorted(part_ends, torch.arange(num_parts, device=device), right=True) - 1
    partial = torch.empty(num_parts, width, dtype=torch.float32, device=device)
    total = torch.empty(count, width, dtype=dtype, device=device)
    columns = min(_PART_COLUMNS, power_of_two(width))
    sizes = {"D": width, "ROWS": _PART_ROWS, "COLS": columns, "num_warps": 4}
    if num_parts:
        launch(
            _sum_parts_kernel,
            (num_parts, cdiv(width, columns)),
            *(values_TD, order_T, ends, part_ends, row_of_part, partial, count),
            PART_LEN=_PART_LEN,
            **sizes,
        )
    if count:
        launch(_add_parts_kernel, (count, cdiv(width, columns)), partial, part_ends, total, **sizes)
    return total


@triton.jit
def _add_gather(b_sum, x, rows, o_t, m_t, o_d, D: tl.constexpr):
    if x is not None:
        o_row = tl.load(rows + o_t, mask=m_t, other=-1)
        p_x = x + o_row[:, None] * D + o_d[None, :]
        b_sum += tl.load(p_x, mask=(o_row >= 0)[:, None] & (o_d < D)[None, :], other=0.0).to(tl.float32)
    return b_sum


@triton.jit(do_not_specialize=["num_rows"])
def _gather_kernel(
    x_0, rows_0, x_1, rows_1, x_2, rows_2, x_3, rows_3, x_4, rows_4, out, num_rows,
    D: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """A program for a block of results."""
    o_t = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    o_d = tl.arange(0, COLS)
    m_t = o_t < num_rows
    b_sum = tl.zeros([ROWS, COLS], tl.float32)
    b_sum = _add_gather(b_sum, x_0, rows_0, o_t, m_t, o_d, D)
    b_sum = _add_gather(b_sum, x_1, rows_1, o_t, m_t, o_d, D)
    b_sum = _add_gather(b_sum, x_2, rows_2, o_t, m_t, o_d, D)
    b_sum = _add_gather(b_sum, x_3, rows_3, o_t, m_t, o_d, D)
    b_sum = _add_gather(b_sum, x_4, rows_4, o_t, m_t, o_d, D)
    p_out = out + o_t[:, None] * D + o_d[None, :]
    tl.store(p_out, b_sum.to(out.dtype.element_ty), mask=m_t[:, None] & (o_d < D)[None, :])


@triton.jit(do_not_specialize=["count"])
def _sum_parts_kernel(
    values, order, ends, part_ends, row_of_part, partial, count,
    PART_LEN: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """Programs (part, columns): the sum of a part of a row's values."""
    i_part = tl.program_id(0).to(tl.int64)
    row = tl.load(row_of_part + i_part)
    if row < count:
        first = tl.load(ends + row) + (i_part - tl.load(part_ends + row)) * PART_LEN
        last = tl.minimum(first + PART_LEN, tl.load(ends + row + 1))
        o_d = tl.program_id(1) * COLS + tl.arange(0, COLS)
        b_sum = tl.zeros([ROWS, COLS], tl.float32)
        # A while loop: with numpy 2.4, Triton's interpreter cannot use its tensors as bounds of a range.
        while first < last:
            o_t = first + tl.arange(0, ROWS)
            m_t = o_t < last
            o_value = tl.load(order + o_t, mask=m_t, other=0)
            p_value = values + o_value[:, None] * D + o_d[None, :]
            b_sum += tl.load(p_value, mask=m_t[:, None] & (o_d < D)[None, :], other=0.0).to(tl.float32)
            first += ROWS
        tl.store(partial + i_part * D + o_d, tl.sum(b_sum, 0), mask=o_d < D)


@triton.jit
def _add_parts_kernel(partial, part_ends, total, D: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr):
    """Programs (row, columns): the sum of a row's parts."""
    row = tl.program_id(0).to(tl.int64)
    first = tl.load(part_ends + row)
    last = tl.load(part_ends + row + 1)
    o_d = tl.program_id(1) * COLS + tl.arange(0, COLS)
    b_sum = tl.zeros([ROWS, COLS], tl.float32)
    while first < last:
        o_part = first + tl.arange(0, ROWS)
        m_part = (o_part < last)[:, None] & (o_d < D)[None, :]
        b_sum += tl.load(partial + o_part[:, None] * D + o_d[None, :], mask=m_part, other=0.0)
        first += ROWS
    tl.store(total + row * D + o_d, tl.sum(b_sum, 0).to(total.dtype.element_ty), mask=o_d < D)
