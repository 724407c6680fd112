"""How long does planning take, and are the plans as good as TorchRec's, for the same choices and the same estimates?

Run: python -m benchmarks.planner [--sizes 10x64 100x256 ...] [--problems 20] [--json FILE] [--parts times sets ...]

Needs no GPU.  Sizes are tables x ranks; tables have dimension 128, up to 12 million rows and one lookup a sample.
TorchRec's planner gets every sharding type that it has for the collection, with rows in device memory, as ours does; it
is left out where it would not end within minutes.  The random problems have 3 to 40 tables, 8 to 64 ranks and 1 to 16
GiB; plans are compared by the estimated time of the busiest rank and the fixed time of each lookup group.  The sets are
tables of well-known models, whose rows are no multiples of the ranks: TorchRec takes all blocks of a table to be alike,
so its plan is estimated as ours is too.  A part that is not asked for keeps its figures in the file.
"""

import argparse
import datetime
import json
import logging
import os
import platform
import random
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torchrec
from torch import nn
from torchrec.distributed.embedding import EmbeddingCollectionSharder
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
from torchrec.distributed.planner import EmbeddingShardingPlanner, ParameterConstraints
from torchrec.distributed.planner.perf_models import NoopPerfModel
from torchrec.distributed.planner.storage_reservations import FixedPercentageStorageReservation
from torchrec.distributed.planner.types import (
    HardwareConfig,
    KernelConfig,
    ShardingOption,
    Topology,
    TopologyFactory,
    TrainerConfig,
)

from embeddings.config import PlacementConfig, SparseOptimizerConfig, TableConfig, optimizer_of
from embeddings.kinds.registry import KINDS
from embeddings.machine import Machine
from embeddings.optimizers import attach_optimizers
from embeddings.plan import TablePlacement
from embeddings.planner import problem_of
from embeddings.planning.plan_file import read_plan, write_plan
from embeddings.planning.problem import GIB, BatchLoad, Problem
from embeddings.planning.solver import evaluate, solve
from embeddings.tables import build_tables

BYTES_PER_MS = 1e6
"""One GB/s in TorchRec's unit of bandwidth."""

Placements = dict[str, TablePlacement]
"""By table name."""

# fmt: off
CRITEO = (
    39_884_406, 39_043, 17_289, 7_420, 20_263, 3, 7_120, 1_543, 63, 38_532_951, 2_953_546, 403_346, 10, 2_208, 11_938,
    155, 4, 976, 14, 39_979_771, 25_641_295, 39_664_984, 585_935, 12_972, 108, 36,
)
# fmt: on
"""Rows of the 26 tables of the Criteo 1TB click logs, as MLPerf's DLRM has them with at most 40 million."""

OUR_NAMES = {"data_parallel": "replicated", "table_column_wise": "column_wise"}
"""Our names of TorchRec's sharding types; blocks of columns on the ranks of one node are blocks of columns."""

COLUMNS = (32, 64)
"""Widths of a block of columns that TorchRec is asked for, each in a plan of its own."""

MAX_TORCHREC_WORK = 3_000_000
"""Tables squared times ranks: TorchRec tries about two proposals a table, each with every shard of every table."""


def main() -> None:
    parser = argparse.ArgumentParser(description="Planning time and plan quality beside TorchRec's planner.")
    parser.add_argument(
        "--sizes", nargs="+", default=["10x64", "100x64", "100x256", "1000x64", "1000x1024", "5000x2048"]
    )
    parser.add_argument("--problems", type=int, default=20, help="random problems of the part quality")
    parser.add_argument("--json", type=Path, default=Path("benchmarks/results/planner.json"))
    parser.add_argument(
        "--parts", nargs="+", choices=["times", "sets", "quality"], default=["times", "sets", "quality"]
    )
    arguments = parser.parse_args()
    logging.disable(logging.CRITICAL)
    report = json.loads(arguments.json.read_text()) if arguments.json.exists() else {}
    report |= {
        "hardware": f"{os.cpu_count()}-core CPU machine, load {os.getloadavg()[0]:.1f}",
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "torchrec": torchrec.__version__},
    }
    measures: dict[str, Callable[[], list[dict[str, Any]]]] = {
        "times": lambda: measure_times(arguments.sizes),
        "sets": compare_sets,
        "quality": lambda: compare_random(arguments.problems),
    }
    for part in arguments.parts:
        report[part] = measures[part]()
        report.setdefault("dates", {})[part] = datetime.date.today().isoformat()
        arguments.json.write_text(json.dumps(report, indent=1) + "\n")


def measure_times(sizes: Sequence[str]) -> list[dict[str, Any]]:
    """CPU seconds of each size, and the file of the plan."""
    times = []
    for size in sizes:
        num_tables, world_size = map(int, size.split("x"))
        row = measure_time(num_tables, world_size)
        print(f"{size:>10} ours {row['ours_s']:8.2f} s   TorchRec {row['torchrec_s'] or float('nan'):8.2f} s", end="")
        print(f"   file {row['file_mib']:.2f} MiB, read in {row['read_s']:.2f} s", flush=True)
        times.append(row)
    return times


def compare_random(problems: int) -> list[dict[str, Any]]:
    """So many random problems, planned by both."""
    quality = [compare(seed) for seed in range(problems)]
    ratios = [result["ratio"] for result in quality]
    print(
        f"time of the busiest rank, ours over TorchRec's: {min(ratios):.3f} to {max(ratios):.3f} in {len(ratios)} plans"
    )
    print(f"planning them: {sum(r['ours_s'] for r in quality):.1f} s, {sum(r['torchrec_s'] for r in quality):.1f} s")
    return quality


def measure_time(num_tables: int, world_size: int) -> dict[str, Any]:
    """CPU seconds that each planner takes for one problem; TorchRec's only if it is likely to end."""
    tables = [_table(f"t{i}", 1000 + 997 * i * (i % 13), 128) for i in range(num_tables)]
    machine = Machine(world_size=world_size, local_world_size=8, compute_device="cuda", hbm_gib=80.0)
    load = BatchLoad(samples_per_rank=64)
    problem = _problem(tables, machine, load)
    start = time.process_time()
    plan = solve(problem)
    row: dict[str, Any] = {"tables": num_tables, "ranks": world_size, "ours_s": time.process_time() - start}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "plan.json"
        write_plan(path, plan)
        start = time.process_time()
        read_plan(path, problem)
        row |= {"read_s": time.process_time() - start, "file_mib": path.stat().st_size / 2**20}
    feasible = num_tables**2 * world_size < MAX_TORCHREC_WORK
    _, theirs, _ = torchrec_plan(tables, machine, load) if feasible else (None, None, None)
    return row | {"torchrec_s": theirs}


def compare_sets() -> list[dict[str, Any]]:
    """Tables of well-known models, planned by both; both plans estimated as ours."""
    rows = []
    for name, world_size, tables, load in _sets():
        machine = Machine(world_size=world_size, local_world_size=8, compute_device="cuda", hbm_gib=80.0)
        ours, _ = _ours(tables, machine, load)
        theirs, _, placed = torchrec_plan(tables, machine, load)
        # Of kinds that are not ours there is its own estimate alone.
        same = None if placed is None else evaluate(_problem(tables, machine, load), placed).step_ms
        of_ours = "not ours" if same is None else f"{same:.4f}"
        print(f"{name} x {world_size}: ours {ours:.4f} ms, TorchRec's {of_ours} ({theirs:.4f} by its own estimate)")
        rows.append({"set": name, "ranks": world_size, "ours_ms": ours, "torchrec_ms": same, "by_torchrec_ms": theirs})
    return rows


def _sets() -> Iterator[tuple[str, int, list[TableConfig], BatchLoad]]:
    for ids in (2048.0, 4096.0):
        tables = [_table("item", 10**9, 512), _table("user", 10**7, 512), _table("category", 128, 512)]
        load = BatchLoad(samples_per_rank=32, ids_per_sample={"item": ids, "user": 1.0, "category": ids})
        yield f"DLRM-v3, {ids:.0f} events", 32, tables, load
    for samples in (256, 1024, 4096):
        tables = [_table(f"c{i}", rows, 128) for i, rows in enumerate(CRITEO)]
        yield f"Criteo, {samples} samples", 64, tables, BatchLoad(samples_per_rank=samples)
        # Summed where they lie: a bag a sample, of 20 ids.
        pooled = [replace(table, pooled="sample") for table in tables]
        for ids in (1.0, 20.0):
            load = BatchLoad(samples_per_rank=samples, ids_per_sample={table.name: ids for table in tables})
            yield f"Criteo pooled, {samples} samples of {ids:.0f} ids", 64, pooled, load
            by_columns = [replace(table, optimizer=SparseOptimizerConfig(kind="adagrad")) for table in pooled]
            yield f"Criteo pooled, Adagrad, {samples} samples of {ids:.0f} ids", 64, by_columns, load
    draw = random.Random(40)
    tables = [_table(f"t{i}", 16 * int(10 ** draw.uniform(2, 5.3)), 64) for i in range(40)]
    ids_of = {table.name: 10 ** draw.uniform(0, 3) for table in tables}
    yield "40 random tables", 16, tables, BatchLoad(samples_per_rank=32, ids_per_sample=ids_of)


def compare(seed: int) -> dict[str, Any]:
    """One random problem, planned by both."""
    draw = random.Random(seed)
    num_tables, world_size = draw.choice([3, 6, 9, 12, 40]), draw.choice([8, 16, 64])
    machine = Machine(
        world_size=world_size, local_world_size=8, compute_device="cuda", hbm_gib=draw.choice([1.0, 4.0, 16.0])
    )
    # Multiples of the ranks: TorchRec takes all blocks of a table to be alike.
    tables = [_table(f"t{i}", world_size * int(10 ** draw.uniform(2, 5.3)), 64) for i in range(num_tables)]
    load = BatchLoad(samples_per_rank=32, ids_per_sample={table.name: 10 ** draw.uniform(0, 3) for table in tables})
    ours_ms, ours_s = _ours(tables, machine, load)
    theirs_ms, theirs_s, _ = torchrec_plan(tables, machine, load)
    sizes = {"tables": num_tables, "ranks": world_size, "hbm_gib": machine.hbm_gib}
    return {"seed": seed, **sizes, "ratio": ours_ms / theirs_ms, "ours_s": ours_s, "torchrec_s": theirs_s}


def _ours(tables: Sequence[TableConfig], machine: Machine, load: BatchLoad) -> tuple[float, float]:
    """(ms of the busiest rank and the lookup groups, CPU seconds to plan)."""
    start = time.process_time()
    plan = solve(_problem(tables, machine, load))
    return plan.step_ms, time.process_time() - start


def _problem(tables: Sequence[TableConfig], machine: Machine, load: BatchLoad) -> Problem:
    return problem_of(
        nn.Module(),
        tables,
        machine=machine,
        placement=PlacementConfig(),
        optimizer=SparseOptimizerConfig(),
        load=load,
    )


def torchrec_topology(machine: Machine) -> Topology:
    """`machine` in TorchRec's terms."""
    rates = machine.effective_rates
    return TopologyFactory.create_topology(
        TrainerConfig(world_size=machine.world_size, local_world_size=machine.local_world_size),
        HardwareConfig(
            hbm_cap_bytes=None if machine.hbm_gib is None else int(machine.hbm_gib * GIB),
            ddr_cap_bytes=int(machine.ddr_gib * GIB),
            hbm_mem_bw=rates.device * BYTES_PER_MS,
            ddr_mem_bw=rates.device * BYTES_PER_MS,
            hbm_to_ddr_mem_bw=rates.host_link * BYTES_PER_MS,
            intra_host_bw=rates.within_node * BYTES_PER_MS,
            inter_host_bw=rates.across_nodes * BYTES_PER_MS,
        ),
        KernelConfig(compute_device=machine.compute_device, use_hardware_based_bandwidth=True),
    )


def torchrec_plan(
    tables: Sequence[TableConfig], machine: Machine, load: BatchLoad
) -> tuple[float, float, Placements | None]:
    """(ms of the busiest rank and the lookup groups, CPU seconds, the placement) of TorchRec's own planner, asked
    for each width of blocks of columns where columns may be cut, and then the best.

    No placement if it takes kinds that are not ours, or puts blocks of a table on one rank.
    """
    types = _torchrec_types(tables)
    partitions = COLUMNS if "column_wise" in types else COLUMNS[:1]
    plans = [_torchrec_plan(tables, machine, load, types, columns) for columns in partitions]
    ms, _, placed = min(plans, key=lambda plan: plan[0])
    return ms, sum(seconds for _, seconds, _ in plans), placed


def _torchrec_types(tables: Sequence[TableConfig]) -> list[str]:
    """TorchRec's sharding types under which these tables train as whole ones would."""
    pooled = tables[0].pooled is not None
    # Row-wise Adagrad, which a table without an optimizer of its own has, averages over all columns.
    columns = all(table.optimizer is not None and table.optimizer.kind == "adagrad" for table in tables)
    return [
        *("table_wise", "row_wise", "data_parallel"),
        *(["table_row_wise"] if pooled else []),
        *(["column_wise"] if columns else []),
        *(["table_column_wise", "grid_shard"] if columns and pooled else []),
    ]


def _torchrec_plan(
    tables: Sequence[TableConfig], machine: Machine, load: BatchLoad, types: Sequence[str], columns: int
) -> tuple[float, float, Placements | None]:
    pooled = tables[0].pooled is not None
    built = build_tables(tables, device=torch.device("meta"))
    attach_optimizers(built, SparseOptimizerConfig())
    topology = torchrec_topology(machine)
    planner = EmbeddingShardingPlanner(
        topology=topology,
        batch_size=load.samples_per_rank,
        constraints={
            table.name: ParameterConstraints(
                sharding_types=list(types),
                min_partition=columns,
                compute_kernels=["fused", "dense"],
                pooling_factors=[load.ids_per_sample.get(feature, 1.0) for feature in table.features],
            )
            for table in tables
        },
        storage_reservation=FixedPercentageStorageReservation(PlacementConfig().reserved_fraction),
        stats=[],
        debug=False,
    )
    start = time.process_time()
    planner.plan(built, [EmbeddingBagCollectionSharder() if pooled else EmbeddingCollectionSharder()])
    seconds = time.process_time() - start
    best = planner._best_plan
    ours = all(OUR_NAMES.get(option.sharding_type, option.sharding_type) in KINDS for option in best)
    apart = all(len({shard.rank for shard in option.shards}) == len(option.shards) for option in best)
    placed = _placements(tables, best) if ours and apart else None
    widths = {table.name: table.embedding_dim for table in tables}
    fixed_ms = machine.effective_rates.lookup_group_ms * len(
        {(widths[option.name], option.sharding_type) for option in best}
    )
    return float(NoopPerfModel(topology).rate(best)) + fixed_ms, seconds, placed


def _placements(tables: Sequence[TableConfig], options: Sequence[ShardingOption]) -> Placements:
    """A plan of TorchRec's in our terms."""
    by_name = {option.name: option for option in options}
    placed = {}
    for table in tables:
        option = by_name[table.name]
        kind = KINDS[OUR_NAMES.get(option.sharding_type, option.sharding_type)]
        placed[table.name] = TablePlacement(
            num_embeddings=table.num_embeddings,
            embedding_dim=table.embedding_dim,
            dtype=table.dtype,
            optimizer=optimizer_of(table, SparseOptimizerConfig()).kind,
            pooled=table.pooled,
            sharding_type=kind.name,
            kernel="fused",
            ranks=() if kind.everywhere else tuple(shard.rank for shard in option.shards if shard.rank is not None),
        )
    return placed


def _table(name: str, rows: int, dim: int) -> TableConfig:
    return TableConfig(name=name, num_embeddings=rows, embedding_dim=dim, features=(name,))


if __name__ == "__main__":
    main()
