"""Sharding plans as files: readable, versioned JSON.  A file states a choice; its estimates are never believed.

    {"version": 5,
     "machine": {...}, "load": {...}, "reservation": {...}, "exchange": {...}, "cached_part": 0.2,
     "sent_bytes": ...,
     "tables": {"item": {"num_embeddings": 1000, "embedding_dim": 64, "dtype": "float32",
                         "optimizer": "rowwise_adagrad", "sharding_type": "row_wise", "kernel": "fused",
                         "pooled": null, "ranks": [], "candidates": [...]}},
     "ranks": [{"first": 0, "last": 7, "weight_bytes": ..., "optimizer_bytes": ..., "step_ms": ...}, ...]}

A table's `ranks` are those of its blocks, where its sharding type leaves a choice; a row-wise or replicated table has
its blocks on all ranks.  `candidates` (what else was considered), `ranks` (the estimates of ranks first to last) and
`sent_bytes` may be left out of a file that somebody writes or changes: they are computed anew.  Where they are there
they must be what the rest of the file implies.
"""

import dataclasses
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from embeddings.config import ExchangeConfig
from embeddings.hardware import read_object
from embeddings.kinds.registry import KINDS, kind_named
from embeddings.machine import Machine
from embeddings.plan import Plan, RankEstimate, TablePlacement, size_text
from embeddings.planning.advice import check_room
from embeddings.planning.problem import BatchLoad, Problem, Reservation
from embeddings.planning.solver import evaluate
from embeddings.records import from_dict

VERSION = 5
"""Raised when an older reader could misread a newer file."""


def write_plan(path: Path, plan: Plan) -> None:
    """Write `plan` to `path`; a reader never sees half a file.

    Raises:
        ValueError: the file cannot be written.
    """
    head = {
        "version": VERSION,
        "machine": dataclasses.asdict(plan.machine),
        "load": dataclasses.asdict(plan.load),
        "reservation": dataclasses.asdict(plan.reservation),
        "exchange": dataclasses.asdict(plan.exchange),
        "cached_part": plan.cached_part,
        "sent_bytes": plan.sent_bytes,
    }
    lines = [f'"{key}": {json.dumps(value)}' for key, value in head.items()]
    tables = [f"{json.dumps(name)}: {_table_text(table)}" for name, table in plan.tables.items()]
    lines.append('"tables": {\n' + ",\n".join(tables) + "\n}")
    lines.append('"ranks": [\n' + ",\n".join(json.dumps(run) for run in _runs(plan.ranks)) + "\n]")
    partial = path.with_name(path.name + ".partial")
    try:
        partial.write_text("{" + ",\n".join(lines) + "}\n", encoding="utf-8")
        partial.replace(path)
    except OSError as error:
        raise ValueError(f"cannot write plan {path}: {error.strerror}") from error


def read_plan(path: Path, problem: Problem) -> Plan:
    """The placement of a file with the estimates of `problem`, whose machine may differ in all but the world size.

    Raises:
        ValueError: the file is unreadable, of another version, contradicts itself, or does not serve the problem; one
            line.
    """
    stored = parse_plan(path)
    try:
        _check_tables(stored, problem)
        as_stored = evaluate(
            dataclasses.replace(
                problem,
                machine=stored.machine,
                load=stored.load,
                reservation=stored.reservation,
                placement=dataclasses.replace(
                    problem.placement, exchange=stored.exchange, cached_part=stored.cached_part
                ),
            ),
            stored.tables,
        )
        _check_estimates(stored, as_stored)
        tables = stored.tables
        if stored.machine.compute_device != problem.machine.compute_device:
            # The alternatives were considered for another machine, and may not exist on this one.
            tables = {name: dataclasses.replace(table, candidates=()) for name, table in tables.items()}
        plan = evaluate(problem, tables)
        _check_fit(plan, problem)
    except ValueError as error:
        raise ValueError(f"plan {path}: {error}") from error
    return plan


def parse_plan(path: Path) -> Plan:
    """The plan of a file as it stands there, for people to read, whatever tables and machine it is for.

    Raises:
        ValueError: the file is unreadable or of another version; one line.
    """
    values = read_object(path)
    version = values.get("version")
    if version is None:
        raise ValueError(
            f"{path} is no plan, as it states no version: name a file that `python -m trainer plan --out` wrote; "
            "tables and lookups are for `python -m embeddings plan`"
        )
    if version != VERSION:
        raise ValueError(f"plan {path} has version {version!r}, this code reads version {VERSION}: plan again")
    try:
        return _plan(values)
    except (KeyError, TypeError, IndexError, AttributeError, ValueError) as error:
        problem = f"misses the key {error}" if isinstance(error, KeyError) else f"is malformed ({error})"
        raise ValueError(f"plan {path} {problem}: write it with `plan --out`") from error


def _check_tables(stored: Plan, problem: Problem) -> None:
    """Refuse a choice that cannot place exactly the problem's tables on so many ranks."""
    machine = problem.machine
    if stored.machine.world_size != machine.world_size:
        raise ValueError(
            f"made for {stored.machine.world_size} ranks, but this job has {machine.world_size}: "
            f"plan again with --world-size {machine.world_size}"
        )
    missing = sorted({table.name for table in problem.tables} - set(stored.tables))
    unknown = sorted(set(stored.tables) - {table.name for table in problem.tables})
    if missing:
        raise ValueError(f"has no table {missing[0]!r}, which the model has: plan again")
    if unknown:
        raise ValueError(f"places table {unknown[0]!r}, which the model does not have: plan again")
    for table in problem.tables:
        placed = stored.tables[table.name]
        for what, there, here in (
            ("rows", placed.num_embeddings, table.num_embeddings),
            ("columns", placed.embedding_dim, table.embedding_dim),
            ("dtype", placed.dtype, table.dtype),
            ("optimizer", placed.optimizer, problem.optimizer_of(table)),
            ("pooled", placed.pooled, table.pooled),
        ):
            if there != here:
                raise ValueError(f"table {table.name!r} has {what} {there} there, {here} in the model: plan again")
        # Whole nodes of this job's may be others than of the job that the plan was made for.
        _check_ranks(table.name, placed, machine)


def _check_ranks(name: str, placed: TablePlacement, machine: Machine) -> None:
    world_size = machine.world_size
    if KINDS[placed.sharding_type].everywhere and placed.ranks:
        raise ValueError(
            f"table {name!r} is {placed.sharding_type}, which has a block on every rank: leave its ranks empty"
        )
    if not KINDS[placed.sharding_type].everywhere and not placed.ranks:
        raise ValueError(f"table {name!r} is {placed.sharding_type}, which needs the ranks of its blocks: name them")
    stray = [rank for rank in placed.ranks if not 0 <= rank < world_size]
    if stray:
        raise ValueError(f"table {name!r} has a block on rank {stray[0]}, but ranks are 0 to {world_size - 1}")
    if len(set(placed.ranks)) < len(placed.ranks):
        raise ValueError(f"table {name!r} has two blocks on one of the ranks {list(placed.ranks)}: they must differ")
    size = machine.local_world_size
    nodes = [first + i for first in placed.ranks[::size] for i in range(size) if first % size == 0]
    if KINDS[placed.sharding_type].on_nodes and list(placed.ranks) != nodes:
        raise ValueError(
            f"table {name!r} is {placed.sharding_type} on ranks {list(placed.ranks)}: name whole nodes, "
            f"the {size} ranks of each in order"
        )


def _check_estimates(stored: Plan, computed: Plan) -> None:
    """Refuse estimates that the file's own choice, machine and load do not give."""
    fix = "leave the estimates out (`ranks` of the file, `candidates` of its tables), or plan again"
    if stored.ranks and len(stored.ranks) != len(computed.ranks):
        raise ValueError(f"estimates {len(stored.ranks)} ranks of {len(computed.ranks)}: {fix}")
    for rank, (there, here) in enumerate(zip(stored.ranks, computed.ranks, strict=False)):
        difference = _first_difference(there, here)
        if difference:
            raise ValueError(f"says of rank {rank} {difference}: {fix}")
    for name, table in stored.tables.items():
        for listed, candidate in zip(table.candidates, computed.tables[name].candidates, strict=False):
            difference = _first_difference(listed, candidate)
            if difference:
                raise ValueError(f"says of table {name!r} as {listed.sharding_type} {difference}: {fix}")
    if stored.ranks and stored.sent_bytes != computed.sent_bytes:
        raise ValueError(f"says that a rank sends {stored.sent_bytes} bytes, which is {computed.sent_bytes}: {fix}")


def _first_difference(there: object, here: object) -> str | None:
    """What two records of one type say differently, None if nothing."""
    for field in dataclasses.fields(there):  # type: ignore[arg-type]  # records of this package
        stored, computed = getattr(there, field.name), getattr(here, field.name)
        times = isinstance(stored, float) and isinstance(computed, float)
        same = math.isclose(stored, computed, rel_tol=1e-9) if times else stored == computed
        if not same:
            return f"{field.name} {stored}, which is {computed}"
    return None


def _check_fit(plan: Plan, problem: Problem) -> None:
    """Refuse a placement for which this machine has no room."""
    check_room(problem)
    for what, needs, room in (
        ("memory", [rank.memory_bytes for rank in plan.ranks], plan.available_bytes),
        ("host memory", [rank.host_bytes for rank in plan.ranks], problem.host_bytes),
    ):
        rank = max(range(len(needs)), key=needs.__getitem__)
        if needs[rank] > room:
            raise ValueError(
                f"needs {size_text(needs[rank])} of {what} for tables on rank {rank}, but {size_text(max(room, 0))} "
                f"are there on {problem.machine.describe()}, without what is reserved: plan again for this machine"
            )


def _table_text(table: TablePlacement) -> str:
    """JSON of one table: a line of facts, then one line a candidate."""
    facts = {
        "num_embeddings": table.num_embeddings,
        "embedding_dim": table.embedding_dim,
        "dtype": table.dtype,
        "optimizer": table.optimizer,
        "sharding_type": table.sharding_type,
        "kernel": table.kernel,
        "pooled": table.pooled,
        "ranks": table.ranks,
    }
    candidates = [json.dumps(dataclasses.asdict(candidate)) for candidate in table.candidates]
    return json.dumps(facts)[:-1] + ', "candidates": [\n    ' + ",\n    ".join(candidates) + "]}"


def _runs(ranks: Sequence[RankEstimate]) -> list[dict[str, Any]]:
    """Neighbouring ranks with the same estimate as one entry."""
    runs: list[dict[str, Any]] = []
    for rank, estimate in enumerate(ranks):
        if rank and estimate == ranks[rank - 1]:
            runs[-1]["last"] = rank
        else:
            runs.append({"first": rank, "last": rank} | dataclasses.asdict(estimate))
    return runs


def _plan(values: dict[str, Any]) -> Plan:
    known = {"version", "machine", "load", "reservation", "exchange", "cached_part", "sent_bytes", "tables", "ranks"}
    unknown = sorted(set(values) - known)
    if unknown:
        raise ValueError(f"unknown key {unknown[0]!r}")
    machine = from_dict(Machine, values["machine"], "machine.")
    ranks: list[RankEstimate] = []
    for run in values.get("ranks", []):
        estimate = from_dict(RankEstimate, {k: v for k, v in run.items() if k not in ("first", "last")}, "ranks.")
        if run["first"] != len(ranks) or not run["first"] <= run["last"] < machine.world_size:
            raise ValueError(f"ranks {run['first']} to {run['last']} follow {len(ranks)} of {machine.world_size} ranks")
        ranks += [estimate] * (run["last"] - run["first"] + 1)
    tables = {name: _table(name, table, machine) for name, table in values["tables"].items()}
    head = from_dict(_Head, {key: values[key] for key in ("cached_part", "sent_bytes") if key in values})
    plan = Plan(
        machine=machine,
        load=from_dict(BatchLoad, values["load"], "load."),
        reservation=from_dict(Reservation, values["reservation"], "reservation."),
        exchange=from_dict(ExchangeConfig, values["exchange"], "exchange."),
        cached_part=head.cached_part,
        sent_bytes=head.sent_bytes,
        tables=tables,
        ranks=tuple(ranks),
    )
    if plan.available_bytes <= 0:
        raise ValueError(f"reserves {size_text(plan.reservation.total_bytes)} of {machine.memory_gib:g} GiB")
    return plan


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Head:
    cached_part: float
    sent_bytes: int = 0


def _table(name: str, values: dict[str, Any], machine: Machine) -> TablePlacement:
    try:
        placed = from_dict(TablePlacement, values)
        placed.config(name)
        for sharding_type in (placed.sharding_type, *(candidate.sharding_type for candidate in placed.candidates)):
            kind_named(sharding_type)
    except ValueError as error:
        raise ValueError(f"table {name!r}: {error}") from error
    chosen = placed.candidates[:1]
    if chosen and (chosen[0].sharding_type, chosen[0].kernel) != (placed.sharding_type, placed.kernel):
        raise ValueError(
            f"table {name!r} is {placed.sharding_type}/{placed.kernel}, but its first candidate, which must be the "
            f"choice, is {chosen[0].sharding_type}/{chosen[0].kernel}"
        )
    _check_ranks(name, placed, machine)
    return placed
