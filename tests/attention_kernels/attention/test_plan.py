"""A plan serves many calls: its tables are written once, its counters are left at zero, its bits are those of a fresh
one; and a plan of some rows computes those, and no others."""

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from attention_kernels import (
    AttentionPlan,
    SemiLocalMask,
    attention_backward,
    attention_forward,
    make_plan,
    plan_of_newest,
    plan_of_targets,
    projection_backward,
)
from attention_kernels.attention import schedule

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
DTYPES = [torch.float32, torch.bfloat16]
SEMI_LOCAL = SemiLocalMask(local=17, global_rows=20, num_context=2)
# (history, targets) of each sequence, context not counted; None is an empty sequence.
SEQUENCES: tuple[tuple[int, int] | None, ...] = ((70, 3), None, (0, 5), (40, 0), (1, 1), (129, 20))

# (mask, newest): rows in front of the global ones; a gap of five rows behind the context; no window; fewer than global
# rows; no gap; columns that all see; one row.
NEWEST = [
    (SEMI_LOCAL, 30),
    (SEMI_LOCAL, 65),
    (SemiLocalMask(num_context=2), 30),
    (SEMI_LOCAL, 7),
    (SEMI_LOCAL, 70),
    (SemiLocalMask(local=17, global_columns=40, num_context=3), 25),
    (SemiLocalMask(), 1),
]


def problem(
    mask: SemiLocalMask, sequences: tuple[tuple[int, int] | None, ...], backend: Any = "triton"
) -> tuple[AttentionPlan, Tensor]:
    """A plan, and the rows of its targets."""
    pairs = [(0 if x is None else mask.num_context + x[0] + x[1], 0 if x is None else x[1]) for x in sequences]
    ends = list(itertools.accumulate(n for n, _ in pairs))
    rows = [end - t + i for end, (_, t) in zip(ends, pairs, strict=True) for i in range(t)]
    plan = make_plan(
        torch.tensor([0, *ends], device=DEVICE),
        mask,
        num_targets=torch.tensor([t for _, t in pairs], device=DEVICE),
        max_len=6000,
        backend=backend,
    )
    return plan, torch.tensor(rows, dtype=torch.long, device=DEVICE)


def of_newest(plan: AttentionPlan, newest: int) -> tuple[AttentionPlan, Tensor]:
    """The plan of context, the newest positions and targets; and those rows of all."""
    assert plan.num_targets is not None
    rows = []
    for start, end, t in zip(
        *(x.tolist() for x in (plan.offsets[:-1], plan.offsets[1:], plan.num_targets)), strict=True
    ):
        c = min(plan.mask.num_context, end - start - t)
        rows += [i for i in range(start, end) if i < start + c or i >= end - t - newest]
    return plan_of_newest(plan, newest), torch.tensor(rows, dtype=torch.long, device=DEVICE)


def tensors(plan: AttentionPlan, dtype: torch.dtype, size: int = 64, heads: int = 2) -> list[Tensor]:
    """q, k, v, dout."""
    torch.manual_seed(0)
    total = int(plan.offsets[-1])
    return [torch.randn(total, heads, size, device=DEVICE).to(dtype) for _ in range(4)]


def launched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the schedule's kernels as they are launched from now on."""
    names: list[str] = []
    launch = schedule.launch

    def recorded(kernel: Any, *arguments: Any, **constants: Any) -> None:
        names.append(kernel.__name__)
        launch(kernel, *arguments, **constants)

    monkeypatch.setattr(schedule, "launch", recorded)
    return names


@pytest.mark.parametrize("mask", [SemiLocalMask(num_context=1), SEMI_LOCAL])
def test_tables_are_written_once_and_every_call_gives_the_same_bits(
    mask: SemiLocalMask, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Long enough for the rows that see everything to be split.
    sequences = ((1100, 2), (30, 1))
    size, dtype = (128, torch.bfloat16) if CUDA else (16, torch.float32)
    plan, _ = problem(mask, sequences)
    q, k, v, dout = tensors(plan, dtype, size, heads=1)
    names = launched(monkeypatch)
    results = [
        [attention_forward(q, k, v, plan), *attention_backward(dout, q, k, v, plan)] for _ in range(2 if CUDA else 1)
    ]
    repeated = attention_forward(q, k, v, plan)
    # One table for the forward, one launch for both of the backward.
    assert names == ["schedule_kernel"] * 2
    assert not any(bool(table.counters.any()) for table in plan.schedules.values())
    fresh, _ = problem(mask, sequences)
    assert torch.equal(repeated, results[0][0]) and torch.equal(repeated, attention_forward(q, k, v, fresh))
    assert all(torch.equal(a, b) for a, b in zip(results[0], results[-1], strict=True))


def check_rows(only: AttentionPlan, plan: AttentionPlan, rows: Tensor, inputs: list[Tensor], tolerance: float) -> None:
    """`only` computes these rows of `plan`: output and gradients, for a loss that depends on no other row."""
    q, k, v, dout = inputs
    found = [attention_forward(q[rows], k, v, only), *attention_backward(dout[rows], q[rows], k, v, only)]
    seen = torch.zeros_like(dout).index_copy_(0, rows, dout[rows])
    out, dq, dk, dv = attention_forward(q, k, v, plan), *attention_backward(seen, q, k, v, plan)
    for name, a, b in zip(("out", "dq", "dk", "dv"), found, (out[rows], dq[rows], dk, dv), strict=True):
        error = (a.double() - b.double()).norm() / b.double().norm()
        assert error <= tolerance, (name, float(error))


@pytest.mark.parametrize("dtype", DTYPES if CUDA else DTYPES[:1])
@pytest.mark.parametrize("size", [32, 64, 128, 256] if CUDA else [16])
@pytest.mark.parametrize("mask", [SemiLocalMask(num_context=2), SEMI_LOCAL, SemiLocalMask()])
@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_targets_alone_are_the_rows_of_all(backend: str, mask: SemiLocalMask, size: int, dtype: torch.dtype) -> None:
    """In float32 to sums in another order."""
    plan, rows = problem(mask, SEQUENCES if CUDA or backend == "reference" else SEQUENCES[:4], backend)
    check_rows(plan_of_targets(plan), plan, rows, tensors(plan, dtype, size), 1e-5 if dtype == torch.float32 else 2e-2)


@pytest.mark.parametrize("dtype", DTYPES if CUDA else DTYPES[:1])
@pytest.mark.parametrize("size", [32, 64, 128, 256] if CUDA else [16])
@pytest.mark.parametrize(
    ("backend", "mask", "newest"),
    # In the interpreter, seconds each: one of every kind of gap, and without a window.
    [("reference", *each) for each in NEWEST] + [("triton", *each) for each in (NEWEST if CUDA else NEWEST[:3])],
    ids=str,
)
def test_the_newest_alone_are_the_rows_of_all(
    backend: str, mask: SemiLocalMask, newest: int, size: int, dtype: torch.dtype
) -> None:
    """Context and targets too; where a gap behind the context is shorter than a tile, and where there is none."""
    few = SEQUENCES[:2] + SEQUENCES[4:5]
    plan, _ = problem(mask, SEQUENCES if CUDA or backend == "reference" else few, backend)
    only, rows = of_newest(plan, newest)
    check_rows(only, plan, rows, tensors(plan, dtype, size), 1e-5 if dtype == torch.float32 else 2e-2)


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="needs a GPU: the interpreter takes minutes")
@pytest.mark.parametrize("size", [64, 128, 256])
def test_long_histories_are_split_over_keys_for_few_targets(size: int) -> None:
    plan, rows = problem(SEMI_LOCAL, ((5000, 7), (900, 130), (0, 1)))
    q, k, v, dout = tensors(plan, torch.bfloat16, size)
    only = plan_of_targets(plan)
    outs = [x.clone() for x in (q[rows], k, v)]
    sums = projection_backward(dout[rows], q[rows], k, v, only, scaled=False, out=(outs[0], outs[1], outs[2]))
    seen = torch.zeros_like(dout).index_copy_(0, rows, dout[rows])
    wanted = attention_backward(seen.double(), q.double(), k.double(), v.double(), problem(SEMI_LOCAL, (
        (5000, 7), (900, 130), (0, 1)), "reference")[0])  # fmt: skip
    for a, b, total in zip(outs, (wanted[0][rows], wanted[1], wanted[2]), sums, strict=True):
        assert (a.double() - b).norm() / b.norm() < 1e-2
        assert (total.double() - b.sum(0)).norm() / b.sum(0).norm() < 2e-2


def test_no_targets_leave_zero_gradients() -> None:
    plan, rows = problem(SEMI_LOCAL, ((5, 0), (3, 0)))
    q, k, v, _ = tensors(plan, torch.float32, 16)
    only = plan_of_targets(plan)
    assert attention_forward(q[rows], k, v, only).shape == (0, 2, 16)
    out = tuple(torch.full_like(x, torch.nan) for x in (q[rows], k, v))
    sums = projection_backward(q[rows], q[rows], k, v, only, scaled=True, out=(out[0], out[1], out[2]))
    assert not any(bool(x.any()) for x in (*out, *sums))


def test_a_plan_without_targets_has_no_plan_of_them() -> None:
    plan = make_plan(torch.tensor([0, 3], device=DEVICE), SemiLocalMask())
    with pytest.raises(ValueError, match="num_targets is None"):
        plan_of_targets(plan)
    with pytest.raises(ValueError, match="newest=0 must be at least 1"):
        plan_of_newest(plan, 0)


@pytest.mark.parametrize(
    ("computed", "mask"),
    [("all", SemiLocalMask(num_context=2)), ("targets", SemiLocalMask(num_context=2)), ("newest", SEMI_LOCAL)]
    + [(computed, mask) for computed, mask in (("all", SEMI_LOCAL), ("targets", SEMI_LOCAL)) if CUDA],
)
@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_padding_is_seen_by_nothing_and_gets_zeros(mask: SemiLocalMask, computed: str, backend: str) -> None:
    """A padded problem's sequences have the bits of the same without padding; behind them is 0 where poison was."""
    extra, size = 37, 64 if CUDA else 16
    plan, rows = problem(mask, SEQUENCES, backend)
    assert plan.num_targets is not None
    padded = make_plan(
        plan.offsets, mask, num_targets=plan.num_targets, max_len=plan.max_len, padded=True, backend=plan.backend
    )
    wanted, plans = int(plan.offsets[-1]), (plan, padded)
    q, k, v, dout = tensors(plan, torch.bfloat16 if CUDA else torch.float32, size)
    if computed == "targets":
        plans = (plan_of_targets(plan), plan_of_targets(padded))
    elif computed == "newest":
        (narrow, rows), (wide_plan, _) = of_newest(plan, 7), of_newest(padded, 7)
        plans = (narrow, wide_plan)
    if computed != "all":
        q, dout, wanted = q[rows], dout[rows], rows.numel()
    # What no kernel may let through is finite, as a tower's padding is.
    wide = [torch.cat([x, torch.full_like(x[:1], 9.0).expand(extra, -1, -1)]) for x in (q, k, v, dout)]
    results = []
    for each, (a, b, c, d) in zip(plans, ((q, k, v, dout), wide), strict=True):
        gradients = attention_backward(
            d, a, b, c, each, out=(torch.full_like(a, 7.0), torch.full_like(b, 7.0), torch.full_like(c, 7.0))
        )
        results.append([attention_forward(a, b, c, each), *gradients])
    for expected, found in zip(*results, strict=True):
        assert torch.equal(found[: len(expected)], expected)
        assert len(found) == len(expected) + extra and not found[len(expected) :].any()
    assert len(results[0][0]) == wanted
