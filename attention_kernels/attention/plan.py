"""One attention problem: which sequences, which mask, which constants; and the tile tables that its kernels share.

A plan is built once and serves every layer with the same sequences and mask, forward and backward: kernels look their
tables up in it (`schedule.py`), and the first that needs one writes it.  What launches change (`Schedule.counters`) is
left as it was found, so a table never has to be written again.  A plan belongs to one stream.

Legend: T packed positions, B users, R rows that are computed.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from attention_kernels.attention.checks import Backend, check_problem, check_times, check_values
from attention_kernels.mask import SemiLocalMask


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Schedule:
    """One table of tiles on the device, and how far its long tiles may be split."""

    table: Tensor
    """Header and items, [1 + max_items, size of an item] int32."""
    split_items: int
    """Slots for the partial sums of split tiles, a head; 0 where no tile is ever split."""
    counters: Tensor
    """Zeros, int32: how many items persistent programs have drawn, in the first of an item's size; then `arrivals`.
    Kernels count in them and leave zeros."""
    arrivals: Tensor
    """Four counters of arrivals a slot and head."""
    max_items: int
    """Bound on the number of items that needs no lengths."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class ComputedRows:
    """Which positions of a sequence are rows, where not all are: targets always; q and the output are then
    [R, heads, size], one sequence's rows after another's."""

    offsets: Tensor
    """[B + 1], where each sequence's rows start among the rows."""
    newest: int = 0
    """Newest history positions of each sequence that are rows."""
    context: bool = False
    """Whether context positions are rows."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class PairTimes:
    """When the positions of a batch happened, for attention with biases (`relative_bias.py`)."""

    happened: Tensor
    """[T] int64 seconds, the times of keys."""
    asked: Tensor
    """[T] likewise, the times of queries: each may be that of what is asked for, the next event."""
    bucket_starts: Tensor
    """[G] int64, the smallest distance of each time bucket (`relative_bias.bucket_starts`)."""
    longest: int
    """No sequence is longer."""
    made: dict[str, Any] = field(default_factory=dict, init=False, repr=False)
    """What the first layer makes of them for all."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class AttentionPlan:
    """What `hstu_attention` takes beside q, k and v.  Made by `make_plan`, `plan_of_targets` or `plan_of_newest`, which
    check it."""

    offsets: Tensor
    """[B + 1], where each sequence starts among keys and values."""
    mask: SemiLocalMask
    num_targets: Tensor | None = None
    """[B]; None: no sequence ends in targets."""
    rows: ComputedRows | None = None
    """None: all positions are rows, and start where keys do."""
    scale: float | None = None
    """Factor of the scores; None: 1 / sqrt(K)."""
    max_len: int
    padded: bool = False
    """Positions behind the last sequence are padding: nothing sees them, and their output and gradients are 0."""
    backend: Backend = "auto"
    times: PairTimes | None = None
    """What biases need; None: attention without."""
    schedules: dict[tuple[Any, ...], Schedule] = field(default_factory=dict, init=False, repr=False)
    """Tables of tiles, by what decides them."""

    @property
    def row_offsets(self) -> Tensor:
        """[B + 1], where each sequence's rows start among the rows."""
        return self.offsets if self.rows is None else self.rows.offsets

    def scale_of(self, q: Tensor) -> float:
        """The factor of these queries' scores."""
        return float(q.shape[2] ** -0.5 if self.scale is None else self.scale)


def make_plan(
    offsets: Tensor,
    mask: SemiLocalMask,
    *,
    num_targets: Tensor | None = None,
    scale: float | None = None,
    max_len: int = 16384,
    padded: bool = False,
    backend: Backend = "auto",
    times: PairTimes | None = None,
) -> AttentionPlan:
    """The plan of `hstu_attention`'s problem; arguments as there.

    `padded`: T may lie behind offsets[-1].  What the padding holds has to be finite: tiles of keys reach into it, and
    their weights of 0 multiply it.  `times`: for layers with biases, which see their whole past and nothing else.

    Raises:
        ValueError: naming the argument that is wrong; values are checked where they lie in host memory.
    """
    check_problem(offsets, mask, num_targets, scale, max_len, backend)
    check_values(offsets, num_targets, mask.num_context, max_len)
    if times is not None:
        if mask != SemiLocalMask() or num_targets is not None:
            raise ValueError(f"times are for mask=SemiLocalMask() without targets, got {mask}, targets {num_targets}")
        check_times(offsets, times.happened, times.asked, times.bucket_starts, times.longest)
    return AttentionPlan(
        offsets=offsets.contiguous(),
        mask=mask,
        num_targets=None if num_targets is None else num_targets.contiguous(),
        scale=scale,
        max_len=max_len,
        padded=padded,
        backend=backend,
        times=times,
    )


def plan_of_targets(plan: AttentionPlan) -> AttentionPlan:
    """The same problem with targets as the only rows: q and the output hold them alone, one sequence's after another's.

    A target sees context, history and itself whatever the mask, so the plan's mask is the narrowest.

    Raises:
        ValueError: the plan has no targets.
    """
    if plan.num_targets is None:
        raise ValueError("num_targets is None: only sequences with targets can be computed at their targets alone")
    mask = SemiLocalMask(local=0, num_context=plan.mask.num_context)
    return _plan_of_rows(plan, mask, plan.num_targets)


def plan_of_newest(plan: AttentionPlan, newest: int) -> AttentionPlan:
    """The same problem with context, the `newest` history positions of each sequence and targets as the only rows.

    Raises:
        ValueError: `newest` is below 1, or the plan does not compute all rows.
    """
    if newest < 1 or plan.rows is not None:
        raise ValueError(f"newest={newest} must be at least 1, of a plan that computes all rows")
    mask = plan.mask
    if mask.local is None:
        # Without a window each row sees its whole past, as global rows do.
        mask = SemiLocalMask(local=0, global_rows=newest, num_context=mask.num_context)
    lens = plan.offsets.diff()
    targets = torch.zeros_like(lens) if plan.num_targets is None else plan.num_targets
    # An empty sequence holds no context either.
    num_rows = (lens - targets).clamp(max=mask.num_context + newest) + targets
    return _plan_of_rows(plan, mask, num_rows, newest=newest, context=True)


def _plan_of_rows(
    plan: AttentionPlan, mask: SemiLocalMask, num_rows: Tensor, *, newest: int = 0, context: bool = False
) -> AttentionPlan:
    """The plan with that many rows of each sequence, [B], and tables of its own."""
    offsets = torch.nn.functional.pad(torch.cumsum(num_rows, 0), (1, 0))
    return AttentionPlan(
        offsets=plan.offsets,
        mask=mask,
        num_targets=plan.num_targets,
        rows=ComputedRows(offsets=offsets, newest=newest, context=context),
        scale=plan.scale,
        max_len=plan.max_len,
        padded=plan.padded,
        backend=plan.backend,
    )
