"""A plan explained: where each table went and why, what every rank holds, and how two plans differ.  Text only."""

import math
from collections.abc import Sequence

from embeddings.kinds.registry import KINDS
from embeddings.plan import MAX_COMPARED_TABLES, Candidate, Plan, RankEstimate, TablePlacement, size_text

MAX_TABLES = 60
"""Tables listed, largest first; the file has them all."""

MAX_RANK_GROUPS = 20
"""Groups of alike ranks listed, fullest first."""


def plan_report(plan: Plan) -> str:
    """The plan as text for people: placement and, where it has estimates, reasons, memory of each rank, totals and
    balance."""
    parts = _placements(plan)
    if plan.ranks:
        parts += [_reasons(plan), _rank_table(plan), _totals(plan)]
    else:
        parts.append("the file leaves the estimates out: a run that takes the plan computes them")
    return "\n\n".join(parts)


def plan_summary(plan: Plan) -> str:
    """Where each table went, and what all take: what a run says of its plan."""
    return "\n\n".join([*_placements(plan), *([_totals(plan)] if plan.ranks else [])])


def _placements(plan: Plan) -> list[str]:
    return [
        f"sharding plan for {plan.machine.describe()}; {plan.load.samples_per_rank} samples a rank",
        _placement_table(plan),
    ]


def plan_differences(old: Plan, new: Plan) -> str:
    """What changes from one plan to another, one line a table, and the bytes of rows that change their rank."""
    lines = []
    moved_total = 0
    for name in sorted(set(old.tables) | set(new.tables)):
        before, after = old.tables.get(name), new.tables.get(name)
        if before is None or after is None:
            lines.append(f"{name}: {'added' if before is None else 'removed'}")
            continue
        if (before.num_embeddings, before.embedding_dim) != (after.num_embeddings, after.embedding_dim):
            lines.append(f"{name}: {_shape(before)} -> {_shape(after)}")
            continue
        moved = _moved_bytes(old, new, name)
        moved_total += moved
        places = (_where(old, name), _where(new, name))
        if places[0] != places[1] or moved:
            lines.append(f"{name}: {places[0]} -> {places[1]}, {size_text(moved)} of rows move")
    if old.machine.world_size != new.machine.world_size:
        lines.append(f"ranks: {old.machine.world_size} -> {new.machine.world_size}")
    if not lines:
        return "the plans place every row alike"
    steps = f"; step {old.step_ms:.3g} -> {new.step_ms:.3g} ms" if old.ranks and new.ranks else ""
    lines.append(f"in all {size_text(moved_total)} of rows move{steps}")
    return "\n".join(lines)


def _placement_table(plan: Plan) -> str:
    names = sorted(plan.tables, key=lambda name: (-plan.tables[name].weight_bytes, name))
    rows = [["table", "rows x dim", "size", "sharding", "kernel", "ranks", "ms a step"]]
    for name in names[:MAX_TABLES]:
        table = plan.tables[name]
        time = f"{table.candidates[0].table_ms:.3g}" if table.candidates else "-"
        size = size_text(table.weight_bytes)
        rows.append([name, _shape(table), size, table.sharding_type, table.kernel, _ranks(plan, name), time])
    return columns(rows) + _left_out(len(names) - MAX_TABLES, "tables")


def _reasons(plan: Plan) -> str:
    names = sorted(plan.tables, key=lambda name: (-plan.tables[name].weight_bytes, name))
    lines = [f"  {name}: {_why(plan.tables[name].candidates, plan)}" for name in names[:MAX_TABLES]]
    text = "why (estimated time of all tables on the busiest rank, a step, with everything else in place):\n"
    return text + "\n".join(lines) + _left_out(len(names) - MAX_TABLES, "tables")


def _why(candidates: Sequence[Candidate], plan: Plan) -> str:
    """The choice beside its alternatives, best first."""
    if not candidates:
        return "the plan file gives no reason"
    chosen, *others = candidates
    text = f"{_way(chosen)} {plan.step_ms:.3g} ms, {size_text(chosen.table_bytes)} a rank"
    if not others:
        few = len(plan.tables) <= MAX_COMPARED_TABLES
        return text + ("; nothing else is allowed" if few else "; others were not compared")
    return text + "; " + "; ".join(_alternative(other, plan) for other in others)


def _alternative(other: Candidate, plan: Plan) -> str:
    step_ms = plan.step_ms
    size = f"{size_text(other.table_bytes)} a rank"
    if other.plan_ms is None:
        return f"{_way(other)} does not fit ({size}, {other.table_ms:.3g} ms for the table alone)"
    if math.isclose(other.plan_ms, step_ms, rel_tol=1e-9):
        return f"{_way(other)} the same time, more work in all or more memory ({size})"
    return f"{_way(other)} {other.plan_ms:.3g} ms ({other.plan_ms / step_ms:.2f}x, {size})"


def _way(candidate: Candidate) -> str:
    way = candidate.sharding_type if candidate.kernel == "fused" else f"{candidate.sharding_type}/{candidate.kernel}"
    dealt = not KINDS[candidate.sharding_type].everywhere
    return f"{way} x {candidate.num_blocks}" if dealt and candidate.num_blocks > 1 else way


def _rank_table(plan: Plan) -> str:
    """Ranks with the same numbers share a line."""
    groups: dict[RankEstimate, list[int]] = {}
    for rank, estimate in enumerate(plan.ranks):
        groups.setdefault(estimate, []).append(rank)
    order = sorted(groups, key=lambda estimate: (-estimate.memory_bytes, groups[estimate][0]))
    heads = ["ranks", "weights", "optimizer", "buffers", "tables", "reserved", "headroom", "host", "ms a step"]
    rows = [heads]
    for estimate in order[:MAX_RANK_GROUPS]:
        sizes = (
            estimate.weight_bytes,
            estimate.optimizer_bytes,
            estimate.io_bytes,
            estimate.memory_bytes,
            plan.reservation.total_bytes,
            plan.available_bytes - estimate.memory_bytes,
            estimate.host_bytes,
        )
        numbers = [size_text(size) for size in sizes]
        rows.append([rank_ranges(groups[estimate]), *numbers, f"{estimate.step_ms:.3g}"])
    return "memory of each rank:\n" + columns(rows) + _left_out(len(order) - MAX_RANK_GROUPS, "groups of ranks")


def _totals(plan: Plan) -> str:
    memory = [rank.memory_bytes for rank in plan.ranks]
    times = [rank.step_ms for rank in plan.ranks]
    reserved = plan.reservation
    lines = [
        f"tables in all: {size_text(sum(memory))} of {size_text(len(memory) * plan.available_bytes)} available; "
        f"fullest rank {size_text(max(memory))}, headroom {size_text(plan.available_bytes - max(memory))}",
        f"reserved a rank: {size_text(reserved.total_bytes)} = {size_text(reserved.fraction_bytes)} fraction "
        f"+ {size_text(reserved.dense_bytes)} dense model + {size_text(reserved.activation_bytes)} activations",
        *_maps(plan),
        *_caches(plan),
        f"imbalance (largest over mean): memory {_imbalance(memory):.2f}, time {_imbalance(times):.2f}; "
        f"estimated time of the tables a step: {plan.step_ms:.3g} ms on the busiest rank, of which "
        f"{plan.fixed_ms:.3g} ms are fixed costs of {len(plan.lookup_groups)} "
        f"lookup group{'s' if len(plan.lookup_groups) > 1 else ''}",
        *_exchange(plan),
    ]
    return "\n".join(lines)


def _exchange(plan: Plan) -> list[str]:
    """A line where ranks send each other something."""
    if plan.machine.world_size == 1:
        return []
    return [
        f"a rank sends {size_text(plan.sent_bytes)} of ids, rows and gradients a step in the mean, "
        f"{'each of its ids once' if plan.exchange.deduplicate else 'repeated ids as often as they come'}, rows as "
        f"{plan.exchange.rows}, gradients as {plan.exchange.gradients}",
    ]


def _maps(plan: Plan) -> list[str]:
    """A line where there are unbounded ids."""
    size = plan.reservation.maps_bytes
    return [f"maps of unbounded ids: {size_text(size)} of host memory a rank"] if size else []


def _caches(plan: Plan) -> list[str]:
    """A line where rows lie in host memory behind a cache."""
    cached = [name for name, table in plan.tables.items() if table.kernel == "fused_uvm_caching"]
    hits = {name: plan.load.hit_rate(name, plan.tables[name].num_embeddings, plan.cached_part) for name in cached}
    rates = [f"{name} {hits[name]:.0%}" for name in cached[:MAX_TABLES]]
    return [f"lookups that caches of {plan.cached_part:.0%} of the rows answer: {', '.join(rates)}"] if cached else []


def rank_ranges(ranks: Sequence[int]) -> str:
    """Sorted ranks, runs shortened.

    >>> rank_ranges([0, 1, 2, 5])
    '0-2,5'
    """
    runs: list[list[int]] = []
    for rank in ranks:
        if runs and rank == runs[-1][1] + 1:
            runs[-1][1] = rank
        else:
            runs.append([rank, rank])
    shown = [str(first) if first == last else f"{first}-{last}" for first, last in runs[:4]]
    return ",".join(shown) + (f",... ({len(ranks)})" if len(runs) > 4 else "")


def _moved_bytes(old: Plan, new: Plan, name: str) -> int:
    """Bytes of rows that some rank has under the new plan and not under the old one."""
    table = new.tables[name]
    held = {shard.rank: shard for shard in old.shards(name)}
    moved = 0
    for shard in new.shards(name):
        moved += len(shard.rows) * len(shard.columns)
        before = held.get(shard.rank)
        if before is not None:
            moved -= _overlap(before.rows, shard.rows) * _overlap(before.columns, shard.columns)
    return moved * table.row_bytes // table.embedding_dim


def _overlap(a: range, b: range) -> int:
    return max(0, min(a.stop, b.stop) - max(a.start, b.start))


def _where(plan: Plan, name: str) -> str:
    table = plan.tables[name]
    return f"{table.sharding_type}/{table.kernel} on {_ranks(plan, name)}"


def _ranks(plan: Plan, name: str) -> str:
    return rank_ranges(sorted(shard.rank for shard in plan.shards(name) if len(shard.rows)))


def _shape(table: TablePlacement) -> str:
    return f"{table.num_embeddings:,} x {table.embedding_dim}" + (" float16" if table.dtype == "float16" else "")


def _imbalance(values: Sequence[float]) -> float:
    total = sum(values)
    return max(values) * len(values) / total if total else 1.0


def _left_out(count: int, what: str) -> str:
    return f"\n  ... and {count} more {what}; the plan file has all" if count > 0 else ""


def columns(rows: Sequence[Sequence[str]]) -> str:
    """Aligned text: the first column to the left, the others to the right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  " + "  ".join(cells).rstrip())
    return "\n".join(lines)
