"""How long does planning take, and are the plans as good as TorchRec's, for the same choices and the same estimates?

Run: python -m benchmarks.planner [--sizes 10x64 100x256 ...] [--problems 20] [--json FILE]

Needs no GPU.  Sizes are tables x ranks; tables have dimension 128, up to 12 million rows and one lookup a sample.
TorchRec's planner gets every sharding type that it has for the collection, with rows in device memory, as ours does; it
is left out where it would not end within minutes.  The random problems have 3 to 40 tables, 8 to 64 ranks and 1 to 16
GiB; plans are compared by the estimated time of the busiest rank and the fixed time of each lookup group.
"""

import argparse
import datetime
import json
import logging
import os
import platform
import random
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torchrec
from torch import nn
from torchrec.distributed.embedding import EmbeddingCollectionSharder
from torchrec.distributed.planner import EmbeddingShardingPlanner, ParameterConstraints
from torchrec.distributed.planner.perf_models import NoopPerfModel
from torchrec.distributed.planner.storage_reservations import FixedPercentageStorageReservation
from torchrec.distributed.planner.types import HardwareConfig, KernelConfig, Topology, TopologyFactory, TrainerConfig

from embeddings.config import PlacementConfig, SparseOptimizerConfig, TableConfig
from embeddings.machine import Machine
from embeddings.optimizers import attach_optimizers
from embeddings.planner import plan_tables
from embeddings.problem import GIB, BatchLoad
from embeddings.tables import build_tables

BYTES_PER_MS = 1e6
"""One GB/s in TorchRec's unit of bandwidth."""

MAX_TORCHREC_WORK = 3_000_000
"""Tables squared times ranks: TorchRec tries about two proposals a table, each with every shard of every table."""


def main() -> None:
    parser = argparse.ArgumentParser(description="Planning time and plan quality beside TorchRec's planner.")
    parser.add_argument("--sizes", nargs="+", default=["10x64", "100x64", "100x256", "1000x64", "1000x1024"])
    parser.add_argument("--problems", type=int, default=20, help="random problems for the comparison of quality")
    parser.add_argument("--json", type=Path, default=Path("benchmarks/results/planner.json"))
    arguments = parser.parse_args()
    logging.disable(logging.CRITICAL)
    times = []
    for size in arguments.sizes:
        num_tables, world_size = map(int, size.split("x"))
        times.append(measure_time(num_tables, world_size))
        print(
            f"{size:>10} ours {times[-1]['ours_s']:8.2f} s   TorchRec {times[-1]['torchrec_s'] or float('nan'):8.2f} s"
        )
    quality = [compare(seed) for seed in range(arguments.problems)]
    ratios = [result["ratio"] for result in quality]
    print(
        f"time of the busiest rank, ours over TorchRec's: {min(ratios):.3f} to {max(ratios):.3f} in {len(ratios)} plans"
    )
    print(f"planning them: {sum(r['ours_s'] for r in quality):.1f} s, {sum(r['torchrec_s'] for r in quality):.1f} s")
    report = {
        "date": datetime.date.today().isoformat(),
        "hardware": f"{os.cpu_count()}-core CPU machine, load {os.getloadavg()[0]:.1f}",
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "torchrec": torchrec.__version__},
        "times": times,
        "quality": quality,
    }
    arguments.json.write_text(json.dumps(report, indent=1) + "\n")


def measure_time(num_tables: int, world_size: int) -> dict[str, Any]:
    """CPU seconds that each planner takes for one problem; TorchRec's only if it is likely to end."""
    tables = [_table(f"t{i}", 1000 + 997 * i * (i % 13), 128) for i in range(num_tables)]
    machine = Machine(world_size=world_size, local_world_size=8, compute_device="cuda", hbm_gib=80.0)
    load = BatchLoad(samples_per_rank=64)
    _, ours = _ours(tables, machine, load)
    feasible = num_tables**2 * world_size < MAX_TORCHREC_WORK
    _, theirs = torchrec_plan(tables, machine, load) if feasible else (None, None)
    return {"tables": num_tables, "ranks": world_size, "ours_s": ours, "torchrec_s": theirs}


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
    theirs_ms, theirs_s = torchrec_plan(tables, machine, load)
    sizes = {"tables": num_tables, "ranks": world_size, "hbm_gib": machine.hbm_gib}
    return {"seed": seed, **sizes, "ratio": ours_ms / theirs_ms, "ours_s": ours_s, "torchrec_s": theirs_s}


def _ours(tables: Sequence[TableConfig], machine: Machine, load: BatchLoad) -> tuple[float, float]:
    """(ms of the busiest rank and the lookup groups, CPU seconds to plan)."""
    start = time.process_time()
    plan = plan_tables(
        nn.Module(),
        tables,
        machine=machine,
        placement=PlacementConfig(),
        optimizer=SparseOptimizerConfig(),
        load=load,
    )
    return plan.step_ms, time.process_time() - start


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


def torchrec_plan(tables: Sequence[TableConfig], machine: Machine, load: BatchLoad) -> tuple[float, float]:
    """(ms of the busiest rank and the lookup groups, CPU seconds to plan) of TorchRec's own planner."""
    built = build_tables(tables, device=torch.device("meta"))
    attach_optimizers(built, SparseOptimizerConfig())
    topology = torchrec_topology(machine)
    planner = EmbeddingShardingPlanner(
        topology=topology,
        batch_size=load.samples_per_rank,
        constraints={
            table.name: ParameterConstraints(
                # column_wise needs another optimizer than row-wise Adagrad to be right.
                sharding_types=["table_wise", "row_wise", "data_parallel"],
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
    planner.plan(built, [EmbeddingCollectionSharder()])
    seconds = time.process_time() - start
    best = planner._best_plan
    widths = {table.name: table.embedding_dim for table in tables}
    fixed_ms = machine.effective_rates.lookup_group_ms * len(
        {(widths[option.name], option.sharding_type) for option in best}
    )
    return float(NoopPerfModel(topology).rate(best)) + fixed_ms, seconds


def _table(name: str, rows: int, dim: int) -> TableConfig:
    return TableConfig(name=name, num_embeddings=rows, embedding_dim=dim, features=(name,))


if __name__ == "__main__":
    main()
