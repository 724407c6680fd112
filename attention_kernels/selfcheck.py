"""Compares the attention kernels with the reference on a few small batches, and stops where they differ.

A miscompiling driver or compiler gives wrong numbers without an error; it has happened on this kind of kernel
(ptxas 12.8.93 on Hopper).  Run: python -m attention_kernels.selfcheck.  A trainer calls `check_attention` at its start,
for the head sizes and the type of its model.  It is not a test suite: it looks only for gross faults.
"""

import itertools
import sys
import time
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from attention_kernels.attention.checks import Backend
from attention_kernels.attention.interface import attention_forward, projection_backward
from attention_kernels.attention.plan import PairTimes, make_plan, plan_of_newest
from attention_kernels.launcher import compiling_together
from attention_kernels.mask import SemiLocalMask
from attention_kernels.relative_bias import RelativeBiases, bucket_starts

_SEMI_LOCAL = SemiLocalMask(local=40, global_rows=30, global_columns=5, num_context=2)


class _Case(NamedTuple):
    """What is computed."""

    mask: SemiLocalMask
    newest: int | None = None
    """Newest events that are rows; None: all."""
    biased: bool = False
    """Whether scores have biases for places and time."""


_CASES = (_Case(SemiLocalMask(num_context=2)), _Case(_SEMI_LOCAL), _Case(_SEMI_LOCAL, 70))
_BIASED_CASES = (_Case(SemiLocalMask(), biased=True),)
_SIZES = (64, 128, 256)
"""Head sizes that a call from the command line checks, each in both types."""
_NAMES = ("output", "dq", "dk", "dv", "sum of dq", "sum of dk", "sum of dv")
_NAMES_OF_BIASES = ("d(places)", "d(times)")
# The last is long enough for global rows to be split over keys.
_LENGTHS = (0, 3, 64, 129, 1100)
_TARGETS = (0, 1, 3, 17, 60)
_BIASED_LENGTHS = (0, 3, 64, 129, 200)
_PLACES, _TIMES = 190, 64
# Largest relative error (Frobenius norm): rounding of the type, several times over.
_TOLERANCE = {torch.bfloat16: 2e-2, torch.float32: 1e-4}


class KernelMismatchError(RuntimeError):
    """The kernels disagree with the reference on this machine."""


def check_attention(
    device: torch.device | str, dtype: torch.dtype, key_size: int, value_size: int, *, biased: bool = False
) -> None:
    """Runs every case forward and backward, in bfloat16 or float32; `biased`: those with biases for places and time.

    Raises:
        KernelMismatchError: one is wrong; names the versions.
    """
    cases = _BIASED_CASES if biased else _CASES
    names = (*_NAMES, *_NAMES_OF_BIASES) if biased else _NAMES
    with compiling_together():
        for case in cases:
            _run(case, dtype, device, key_size, value_size, "triton")
    for case in cases:
        actual, expected = (_run(case, dtype, device, key_size, value_size, x) for x in ("triton", "reference"))
        for name, a, b in zip(names, actual, expected, strict=True):
            error = ((a.double() - b.double()).norm() / b.double().norm()).item()
            if not error <= _TOLERANCE[dtype]:
                raise KernelMismatchError(
                    f"attention kernel self-check failed: {name} of {case}, in {dtype}, heads of "
                    f"{key_size} and {value_size}, differs from the reference by {error:.1e}, more than "
                    f"{_TOLERANCE[dtype]:.0e}. Training would give wrong results. {versions()}. "
                    "Try other versions of the driver or of Triton, or attention backend='reference'"
                )


def versions() -> str:
    """What compiles and runs the kernels here."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU (Triton's interpreter)"
    ptxas = triton.knobs.nvidia.ptxas.version if torch.cuda.is_available() else "none"
    return (
        f"GPU: {gpu}; torch {torch.__version__} (CUDA {torch.version.cuda}); Triton {triton.__version__}; ptxas {ptxas}"
    )


def _run(
    case: _Case,
    dtype: torch.dtype,
    device: torch.device | str,
    key_size: int,
    value_size: int,
    backend: Backend,
) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    lengths = _BIASED_LENGTHS if case.biased else _LENGTHS
    bounds = [0, *itertools.accumulate(lengths)]
    q, k, dq, dk, v, dv, dout = (
        torch.randn(bounds[-1], 2, size, generator=generator).to(device, dtype)
        for size in (key_size,) * 4 + (value_size,) * 3
    )
    offsets, targets = (torch.tensor(x, device=device) for x in (bounds, _TARGETS))
    times = biases = None
    if case.biased:
        happened, asked = (torch.randint(10**6, (bounds[-1],), generator=generator).to(device) for _ in range(2))
        times = PairTimes(
            happened=happened, asked=asked, bucket_starts=bucket_starts(_TIMES).to(device), longest=max(lengths)
        )
        biases = RelativeBiases(*(torch.randn(2, x, generator=generator).to(device) for x in (_PLACES, _TIMES)))
    plan = make_plan(
        offsets,
        case.mask,
        num_targets=None if case.biased else targets,
        max_len=max(lengths),
        backend=backend,
        times=times,
    )
    if case.newest is not None:
        plan = plan_of_newest(plan, case.newest)
        q, dq, dout = (x[: int(plan.row_offsets[-1])] for x in (q, dq, dout))
    # As a layer trains: random numbers stand for the slopes of SiLU at q, k and v.
    sums = projection_backward(dout, q, k, v, plan, biases, scaled=True, out=(dq, dk, dv))
    return [attention_forward(q, k, v, plan, biases), dq, dk, dv, *sums]


def main() -> int:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    print(versions())
    for dtype, size in itertools.product(_TOLERANCE, _SIZES):
        start = time.perf_counter()
        try:
            for biased in (False, True):
                check_attention(device, dtype, size, size, biased=biased)
        except (KernelMismatchError, ValueError) as error:
            print(f"error: {error}", file=sys.stderr)
            return 1
        print(f"{dtype}, heads of {size}: the reference's numbers ({time.perf_counter() - start:.1f} s)", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
