"""From a problem to a plan, or from a placement that somebody chose to its estimates.  Needs no torch."""

from collections.abc import Collection, Mapping, Sequence
from itertools import accumulate
from typing import Any

from embeddings.config import TableConfig
from embeddings.kinds.kind import ShardCost
from embeddings.plan import MAX_COMPARED_TABLES, Candidate, Plan, RankEstimate, TablePlacement
from embeddings.planning.advice import check_room, does_not_fit
from embeddings.planning.options import Option, placed_option, table_options
from embeddings.planning.packing import Packer, Packing, make_packer
from embeddings.planning.problem import Problem
from embeddings.planning.search import best_packing, single_changes


def solve(problem: Problem) -> Plan:
    """The best placement found.

    Raises:
        DoesNotFit: with what is needed and what would help.
        ValueError: a wrong constraint.
    """
    check_room(problem)
    packer = make_packer(problem, table_options(problem))
    packing = best_packing(packer)
    if packing.rating[0]:
        raise does_not_fit(problem, packer, packing)
    return _plan(problem, packer, packing, {table.name for table in problem.tables})


def evaluate(problem: Problem, tables: Mapping[str, TablePlacement]) -> Plan:
    """The placements `tables`, as somebody chose them, with estimates of our own; whether they fit or not.

    Raises:
        ValueError: a table cannot be placed so.
    """
    options, ranks_of = [], {}
    for i, table in enumerate(problem.tables):
        placed = tables[table.name]
        chosen = placed_option(problem, table, placed.sharding_type, placed.kernel, len(placed.ranks))
        # What else was considered keeps its order; the choice comes first.
        others = [
            placed_option(problem, table, other.sharding_type, other.kernel, other.num_blocks)
            for other in placed.candidates[1:]
        ]
        options.append([chosen, *others])
        if chosen.pieces:
            ranks_of[i] = placed.ranks
    packer = make_packer(problem, options)
    packing = packer.estimate((0,) * len(options), ranks_of)
    explained = {name for name, placed in tables.items() if placed.candidates}
    return _plan(problem, packer, packing, explained)


def _plan(problem: Problem, packer: Packer, packing: Packing, explained: Collection[str]) -> Plan:
    placements = {}
    compare = len(problem.tables) <= MAX_COMPARED_TABLES
    chosen = [table[index] for table, index in zip(packer.options, packing.choice, strict=True)]
    ranks = rank_estimates(chosen, packing, problem.machine.world_size)
    for i, table in enumerate(problem.tables):
        option = packer.options[i][packing.choice[i]]
        placements[table.name] = TablePlacement(
            num_embeddings=table.num_embeddings,
            embedding_dim=table.embedding_dim,
            dtype=table.dtype,
            optimizer=problem.optimizer_of(table),
            sharding_type=option.kind.name,
            kernel=option.kernel,
            pooled=table.pooled,
            ranks=packing.ranks_of.get(i, ()),
            candidates=_candidates(packer, packing, i, compare=compare) if table.name in explained else (),
        )
    return Plan(
        machine=problem.machine,
        load=problem.load,
        reservation=problem.reservation,
        exchange=problem.placement.exchange,
        cached_part=problem.placement.cached_part,
        sent_bytes=round(sum(_sent_bytes(problem, *each) for each in zip(problem.tables, chosen, strict=True))),
        tables=placements,
        ranks=ranks,
    )


def _sent_bytes(problem: Problem, table: TableConfig, option: Option) -> float:
    return option.kind.sent_bytes(problem.work(table, option.kernel), max(1, len(option.pieces)))


def _candidates(packer: Packer, packing: Packing, table: int, *, compare: bool) -> tuple[Candidate, ...]:
    """The choice for `table` first, then its alternatives by the plan's time with them."""
    alternatives = {other.choice[table]: other for other in single_changes(packer, packing, table)} if compare else {}
    candidates = []
    for index, option in enumerate(packer.options[table]):
        if not compare and index != packing.choice[table]:
            continue
        other = packing if index == packing.choice[table] else alternatives.get(index)
        candidates.append(
            Candidate(
                sharding_type=option.kind.name,
                kernel=option.kernel,
                num_blocks=sum(count for count, _ in option.runs),
                table_ms=option.largest.ms,
                table_bytes=option.largest.memory_bytes,
                plan_ms=None if other is None or other.rating[0] else other.rating[1],
            )
        )
    chosen = candidates.pop(packing.choice[table] if compare else 0)
    # Candidates that do not fit, or were not tried, come last.
    order = sorted(candidates, key=lambda c: (c.plan_ms is None, c.plan_ms or 0.0, c.table_ms))
    return (chosen, *order)


def rank_estimates(chosen: Sequence[Option], packing: Packing, world_size: int) -> tuple[RankEstimate, ...]:
    """What every rank holds and does when each table has its chosen option."""
    sums: list[list[Any]] = [[0] * (world_size + 1) for _ in range(5)]
    for option in chosen:
        # Differences between neighbouring ranks: a table on all ranks touches as many as it has different blocks.
        first = 0
        for count, cost in option.runs if option.kind.everywhere else ():
            for total, part in zip(sums, _parts(cost), strict=True):
                total[first] += part
                total[first + count] -= part
            first += count
    sums = [list(accumulate(total[:-1])) for total in sums]
    for i, ranks in sorted(packing.ranks_of.items()):
        for rank, cost in zip(ranks, chosen[i].pieces, strict=True):
            for total, part in zip(sums, _parts(cost), strict=True):
                total[rank] += part
    return tuple(
        RankEstimate(weight_bytes=w, optimizer_bytes=o, io_bytes=io, host_bytes=host, step_ms=ms)
        for w, o, io, host, ms in zip(*sums, strict=True)
    )


def _parts(cost: ShardCost) -> tuple[float, ...]:
    return cost.weight_bytes, cost.optimizer_bytes, cost.io_bytes, cost.host_bytes, cost.ms
