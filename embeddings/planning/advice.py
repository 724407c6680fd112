"""What is missing where tables do not fit, and what would help: every fix is planned before it is named."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

from embeddings.config import KERNELS, ComputeKernel
from embeddings.machine import MOST_RANKS, Machine
from embeddings.plan import size_text
from embeddings.planning.options import Option, table_options
from embeddings.planning.packing import Packer, Packing, make_packer
from embeddings.planning.problem import DoesNotFit, Problem
from embeddings.planning.search import fits

Options = Sequence[Sequence[Option]]
"""The ways to place each table."""

MOST_TIMES = 64
"""A fix asks for at most so many times the ranks or the memory that there are."""


def check_room(problem: Problem) -> None:
    """That there is memory before there are tables.

    Raises:
        DoesNotFit: it is gone, and to what.
    """
    reservation, machine = problem.reservation, problem.machine
    maps = f"maps of unbounded ids {size_text(reservation.maps_bytes)}"
    if problem.available_bytes <= 0:
        on_cpu = f", {maps}" if machine.compute_device == "cpu" and reservation.maps_bytes else ""
        raise DoesNotFit(
            f"no memory is left for tables on {machine.describe()}: placement.reserved_fraction takes "
            f"{size_text(reservation.fraction_bytes)}, the dense model {size_text(reservation.dense_bytes)}, "
            f"activations {size_text(reservation.activation_bytes)}{on_cpu}; lower them, or take more memory"
        )
    if problem.host_bytes < 0:
        raise DoesNotFit(
            f"host memory is too small on {machine.describe()}: {maps} a rank, of {machine.ddr_gib:g} GiB; take fewer "
            "rows of unbounded ids, more ranks or nodes with more host memory"
        )


def does_not_fit(problem: Problem, packer: Packer, packing: Packing) -> DoesNotFit:
    """What lacks where, the tables behind it, and the fixes in order of effort."""
    chosen = [table[index] for table, index in zip(packer.options, packing.choice, strict=True)]
    needs = [sum(option.total_bytes) for option in chosen]
    largest = sorted(range(len(needs)), key=lambda i: (-needs[i], i))[:3]
    names = ", ".join(f"{problem.tables[i].name} {size_text(needs[i])} ({chosen[i].kind.name})" for i in largest)
    available, ranks = problem.available_bytes, problem.machine.world_size
    loads = packer.loads(packing)
    lacks = []
    for what, load, room in (("device", loads[1], available), ("host", loads[2], problem.host_bytes)):
        rank = int(load.argmax())
        if load[rank] > room:
            where = "memory" if problem.machine.compute_device == "cpu" else f"{what} memory"
            lacks.append(
                f"rank {rank} needs {size_text(int(load[rank]))} of {where}, {size_text(int(load[rank]) - room)} more "
                f"than the {size_text(room)} that are there for tables"
            )
    fixes = list(_fixes(problem, packer.options)) or [_no_single_fix(problem)]
    return DoesNotFit(
        f"the tables do not fit on {problem.machine.describe()}: {' and '.join(lacks)}; they need "
        f"{size_text(sum(needs))} in all, {size_text(available * ranks)} are there; largest: {names}; "
        f"fixes: {'; or '.join(fixes)}"
    )


def _fixes(problem: Problem, options: Options) -> Iterable[str]:
    """Single changes under which the tables fit, each planned.  `options` are the tables' on these ranks, however much
    memory they have."""
    machine, placement = problem.machine, problem.placement
    free = {name: replace(constraint, sharding_types=None) for name, constraint in placement.tables.items()}
    if free != placement.tables and _fits(problem.with_placement(replace(placement, tables=free))):
        held = [name for name, constraint in placement.tables.items() if constraint.sharding_types is not None]
        yield f"allow more sharding types for {', '.join(held[:3])} (placement.tables)"
    if placement.sharding_types is not None:
        anything = problem.with_placement(replace(placement, sharding_types=None))
        if _fits(anything):
            yield "allow more sharding types (placement.sharding_types=null)"
    ranks = _least(machine.node_ranks, machine.world_size, lambda n: problem.on(machine.larger(n)))
    if ranks is not None:
        yield f"use more ranks (at least {ranks})"
    gib = _least(1, math.floor(machine.memory_gib), lambda n: problem.on(_with_memory(problem, n)), options)
    if gib is not None:
        yield f"use ranks with more memory (at least {gib} GiB)"
    yield from _host_fixes(problem, options)
    lowered = _lowest_reservation(problem, options)
    if lowered is not None:
        yield f"lower placement.reserved_fraction (to {lowered:g})"


def _host_fixes(problem: Problem, options: Options) -> Iterable[str]:
    """Rows in host memory, or more of that."""
    machine, placement = problem.machine, problem.placement
    if machine.compute_device != "cuda":
        return
    for kernel in KERNELS[1:]:
        if kernel not in placement.compute_kernels:
            kernels = (*placement.compute_kernels, kernel)
            if _fits(problem.with_placement(replace(placement, compute_kernels=kernels))):
                yield f"keep cold rows in host memory (add {kernel} to placement.compute_kernels)"
                return
    if any(kernel != "fused" for kernel in placement.compute_kernels):
        gib = _least(1, math.floor(machine.ddr_gib), lambda n: problem.on(replace(machine, ddr_gib=float(n))), options)
        if gib is not None:
            yield f"use nodes with more host memory (at least {gib} GiB a rank)"


def _lowest_reservation(problem: Problem, options: Options) -> float | None:
    """The highest lower reserved fraction of 0.1, 0.05 and 0 with which the tables fit."""
    for fraction in (0.1, 0.05, 0.0):
        if fraction < problem.placement.reserved_fraction:
            changed = problem.with_placement(replace(problem.placement, reserved_fraction=fraction))
            if _fits(changed, options):
                return fraction
    return None


def _no_single_fix(problem: Problem) -> str:
    """Two changes together, for what no single one helps."""
    machine, placement = problem.machine, problem.placement
    free = {name: replace(constraint, sharding_types=None) for name, constraint in placement.tables.items()}
    cached: ComputeKernel = "fused_uvm_caching"
    kernels = tuple(dict.fromkeys((*placement.compute_kernels, cached)))
    settings = replace(placement, tables=free, sharding_types=None)
    if machine.compute_device == "cuda":
        settings = replace(settings, compute_kernels=kernels)
    wide = problem.with_placement(settings)
    ranks = _least(machine.node_ranks, machine.world_size, lambda n: wide.on(machine.larger(n)))
    if ranks is not None:
        return f"no single one was found; allow all sharding types and fused_uvm_caching, on at least {ranks} ranks"
    return (
        f"none was found with up to {MOST_TIMES} times the ranks or the memory: take fewer rows, narrower tables, "
        "float16 rows or fewer samples a rank"
    )


def _least(step: int, there: int, changed: Callable[[int], Problem], options: Options | None = None) -> int | None:
    """The least multiple of `step` above `there` with which the tables fit, as far as bisection finds it."""
    low, high = there // step, there // step + 1
    # More of either, ranks or GiB, would be no machine.
    most = min(MOST_TIMES * max(there, step), MOST_RANKS)
    while high * step <= most and not _fits(changed(high * step), options):
        low, high = high, high * 2
    if high * step > most:
        return None
    while low + 1 < high:
        middle = (low + high) // 2
        low, high = (low, middle) if _fits(changed(middle * step), options) else (middle, high)
    return high * step


def _with_memory(problem: Problem, gib: int) -> Machine:
    machine = problem.machine
    if machine.compute_device == "cpu":
        return replace(machine, ddr_gib=float(gib))
    return replace(machine, hbm_gib=float(gib))


def _fits(problem: Problem, options: Options | None = None) -> bool:
    """Whether the planner finds a plan; with the options of another machine's problem, if they are the same here."""
    if problem.available_bytes <= 0:
        return False
    return fits(make_packer(problem, table_options(problem) if options is None else options))
