"""Sharding plans as files: readable, versioned JSON with one shard a line.

    {"version": 1,
     "machine": {...}, "load": {...}, "reservation": {...},
     "tables": {"item": {"num_embeddings": 1000, "embedding_dim": 64, "dtype": "float32",
                         "optimizer": "rowwise_adagrad", "sharding_type": "row_wise", "kernel": "fused",
                         "shards": [{"rank": 0, "offset": [0, 0], "size": [500, 64]}, ...],
                         "candidates": [...]}},
     "ranks": [{"rank": 0, "weight_bytes": ..., "optimizer_bytes": ..., "step_ms": ...}, ...]}

`candidates` (what else was considered) may be left out of a file written by hand.  A file is checked against the tables
and the machine it is to be used for before anything is allocated.
"""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

from embeddings.config import TableConfig
from embeddings.machine import Machine
from embeddings.plan import (
    GIB,
    BatchLoad,
    Candidate,
    Plan,
    RankEstimate,
    Reservation,
    Shard,
    TablePlacement,
    shards_of,
    size_text,
)

VERSION = 2
"""Raised when an older reader could misread a newer file."""

SHARDING_TYPES = ("table_wise", "row_wise")
KERNELS = ("fused", "fused_uvm_caching", "fused_uvm")

Record = TypeVar("Record")


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
    }
    lines = [f'"{key}": {json.dumps(value)}' for key, value in head.items()]
    tables = [f"{json.dumps(name)}: {_table_text(table)}" for name, table in plan.tables.items()]
    lines.append('"tables": {\n' + ",\n".join(tables) + "\n}")
    ranks = [json.dumps({"rank": rank} | dataclasses.asdict(estimate)) for rank, estimate in enumerate(plan.ranks)]
    lines.append('"ranks": [\n' + ",\n".join(ranks) + "\n]")
    partial = path.with_name(path.name + ".partial")
    try:
        partial.write_text("{" + ",\n".join(lines) + "}\n", encoding="utf-8")
        partial.replace(path)
    except OSError as error:
        raise ValueError(f"cannot write plan {path}: {error.strerror}") from error


def read_plan(path: Path, *, tables: Sequence[TableConfig], machine: Machine) -> Plan:
    """Read a plan, check it against `tables`, and adopt it for `machine`, which may differ in all but the world size.

    Raises:
        ValueError: the file is unreadable, of another version, or does not fit the tables or the machine; one line.
    """
    plan = parse_plan(path)
    try:
        check_plan(plan, tables=tables, machine=machine)
    except ValueError as error:
        raise ValueError(f"plan {path}: {error}") from error
    return dataclasses.replace(plan, machine=machine)


def parse_plan(path: Path) -> Plan:
    """The plan of a file, whatever tables and machine it is for.

    Raises:
        ValueError: the file is unreadable or of another version; one line.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"cannot read plan {path}: {error.strerror}") from error
    except ValueError as error:
        raise ValueError(f"plan {path} is not JSON ({error}): write it with `plan --out`") from error
    version = values.get("version") if isinstance(values, dict) else None
    if version != VERSION:
        raise ValueError(f"plan {path} has version {version!r}, this code reads version {VERSION}: plan again")
    try:
        return _plan(values)
    except (KeyError, TypeError, IndexError, AttributeError, ValueError) as error:
        problem = f"misses the key {error}" if isinstance(error, KeyError) else f"is malformed ({error})"
        raise ValueError(f"plan {path} {problem}: write it with `plan --out`") from error


def check_plan(plan: Plan, *, tables: Sequence[TableConfig], machine: Machine) -> None:
    """Refuse a plan that cannot place exactly `tables` on `machine`.

    Raises:
        ValueError: what does not fit, and what to do.
    """
    if plan.machine.world_size != machine.world_size:
        raise ValueError(
            f"made for {plan.machine.world_size} ranks, but this job has {machine.world_size}: "
            f"plan again with --world-size {machine.world_size}"
        )
    missing = sorted({table.name for table in tables} - set(plan.tables))
    unknown = sorted(set(plan.tables) - {table.name for table in tables})
    if missing:
        raise ValueError(f"has no table {missing[0]!r}, which the model has: plan again")
    if unknown:
        raise ValueError(f"places table {unknown[0]!r}, which the model does not have: plan again")
    for table in tables:
        _check_table(table, plan.tables[table.name], machine)
    if len(plan.ranks) != machine.world_size:
        raise ValueError(f"estimates {len(plan.ranks)} ranks of {machine.world_size}: plan again")
    _check_weights(plan)
    fullest = max(rank.memory_bytes for rank in plan.ranks)
    if fullest > machine.memory_gib * GIB:
        raise ValueError(
            f"needs {size_text(fullest)} on one rank, but {machine.describe()} are all there is: "
            "plan again for this machine"
        )
    host = max(rank.host_bytes for rank in plan.ranks)
    if host > machine.ddr_gib * GIB:
        raise ValueError(
            f"needs {size_text(host)} of host memory a rank, but {machine.ddr_gib:g} GiB are there: "
            "plan again for this machine"
        )


def _check_weights(plan: Plan) -> None:
    """Shards that somebody moved by hand take their estimate along."""
    held = [0] * len(plan.ranks)
    for table in plan.tables.values():
        if table.kernel == "fused":
            for shard in table.shards:
                held[shard.rank] += shard.num_rows * table.row_bytes
    for rank, (needed, estimate) in enumerate(zip(held, plan.ranks, strict=True)):
        if needed > estimate.weight_bytes:
            raise ValueError(
                f"puts {size_text(needed)} of rows on rank {rank}, but its weight_bytes say "
                f"{size_text(estimate.weight_bytes)}: set them to {needed}, or plan again"
            )


def _check_table(table: TableConfig, placed: TablePlacement, machine: Machine) -> None:
    shape = (table.num_embeddings, table.embedding_dim)
    if (placed.num_embeddings, placed.embedding_dim) != shape:
        raise ValueError(
            f"table {table.name!r} is {placed.num_embeddings} x {placed.embedding_dim} there, "
            f"{shape[0]} x {shape[1]} in the model: plan again"
        )
    if machine.compute_device == "cpu" and placed.kernel != "fused":
        raise ValueError(
            f"table {table.name!r} uses the kernel {placed.kernel}, a cpu has only fused: plan for the cpu"
        )
    ranks = [shard.rank for shard in placed.shards]
    stray = [rank for rank in ranks if not 0 <= rank < machine.world_size]
    if stray:
        raise ValueError(
            f"table {table.name!r} has a shard on rank {stray[0]}, but ranks are 0 to {machine.world_size - 1}"
        )
    next_row = 0
    for shard in placed.shards:
        if shard.first_row != next_row:
            problem = "twice" if shard.first_row < next_row else "nowhere"
            first, last = sorted((shard.first_row, next_row))
            raise ValueError(f"table {table.name!r} has rows {first} to {last - 1} {problem}: plan again")
        next_row += shard.num_rows
    if next_row != table.num_embeddings:
        raise ValueError(f"table {table.name!r} has rows {next_row} to {table.num_embeddings - 1} nowhere: plan again")
    # TorchRec's input dist computes the owner of a row, so its blocks cannot be chosen freely.
    expected = ranks[:1] if placed.sharding_type == "table_wise" else list(range(machine.world_size))
    if placed.shards != shards_of(table, placed.sharding_type, expected):
        rule = "one shard" if placed.sharding_type == "table_wise" else "equal blocks on ranks 0, 1, 2, ..."
        raise ValueError(f"table {table.name!r} is {placed.sharding_type}, which means {rule}: plan again")


def _table_text(table: TablePlacement) -> str:
    """JSON of one table: a line of facts, then one line a shard and a candidate."""
    facts = {
        "num_embeddings": table.num_embeddings,
        "embedding_dim": table.embedding_dim,
        "dtype": table.dtype,
        "optimizer": table.optimizer,
        "sharding_type": table.sharding_type,
        "kernel": table.kernel,
    }
    shards = [
        f'{{"rank": {shard.rank}, "offset": [{shard.first_row}, 0], "size": [{shard.num_rows}, {table.embedding_dim}]}}'
        for shard in table.shards
    ]
    candidates = [json.dumps(dataclasses.asdict(candidate)) for candidate in table.candidates]
    return (
        json.dumps(facts)[:-1]
        + ',\n  "shards": [\n    '
        + ",\n    ".join(shards)
        + '],\n  "candidates": [\n    '
        + ",\n    ".join(candidates)
        + "]}"
    )


def _plan(values: dict[str, Any]) -> Plan:
    return Plan(
        machine=_record(Machine, values["machine"]),
        load=_record(BatchLoad, values["load"]),
        reservation=_record(Reservation, values["reservation"]),
        tables={name: _table(name, table) for name, table in values["tables"].items()},
        ranks=tuple(_record(RankEstimate, {k: v for k, v in rank.items() if k != "rank"}) for rank in values["ranks"]),
    )


def _table(name: str, values: dict[str, Any]) -> TablePlacement:
    if values["sharding_type"] not in SHARDING_TYPES:
        raise ValueError(
            f"table {name!r}: sharding_type must be one of {SHARDING_TYPES}, got {values['sharding_type']!r}"
        )
    if values["kernel"] not in KERNELS:
        raise ValueError(f"table {name!r}: kernel must be one of {KERNELS}, got {values['kernel']!r}")
    dim = int(values["embedding_dim"])
    for shard in values["shards"]:
        if shard["offset"][1] != 0 or shard["size"][1] != dim:
            raise ValueError(f"table {name!r}: a shard must hold all {dim} columns, got {shard}")
    return TablePlacement(
        num_embeddings=int(values["num_embeddings"]),
        embedding_dim=dim,
        dtype=values["dtype"],
        optimizer=values["optimizer"],
        sharding_type=values["sharding_type"],
        kernel=values["kernel"],
        shards=tuple(
            Shard(int(shard["rank"]), int(shard["offset"][0]), int(shard["size"][0])) for shard in values["shards"]
        ),
        candidates=tuple(_record(Candidate, candidate) for candidate in values.get("candidates", [])),
    )


def _record(kind: type[Record], values: dict[str, Any]) -> Record:
    """A flat dataclass from its JSON object; wrong keys raise TypeError, as a wrong call does."""
    return kind(**values)
