"""Predicted time and memory of tables beside what a GPU takes, the way through the modules beside FBGEMM's bare kernel.

Run on a GPU: python -m benchmarks.placements [--machine MACHINE.json] [--json FILE] [--parts init placements bare]

`placements`: tables of one rank, looked up and updated with uniform ids; estimates from peaks and, with `--machine`,
from the rates that `python -m embeddings probe` measured there.  `bare`: the same ids through FBGEMM's
SplitTableBatchedEmbeddingBags without TorchRec: what the GPU takes, and what its host takes to ask for it.  `init`:
initial rows a second.
"""

import gc
import itertools
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from fbgemm_gpu.split_table_batched_embeddings_ops_common import EmbeddingLocation, PoolingMode
from fbgemm_gpu.split_table_batched_embeddings_ops_training import (
    ComputeDevice,
    SplitTableBatchedEmbeddingBagsCodegen,
)

from benchmarks.on_one_gpu import DEVICE, Part, run_parts
from embeddings.config import ComputeKernel, PlacementConfig, RowType, TableConfig
from embeddings.machine import Machine
from embeddings.measuring.trial import OPTIMIZER, Trial, median_ms
from embeddings.plan import Plan
from embeddings.planning.problem import Problem
from embeddings.planning.solver import evaluate
from embeddings.rows.initial import fill

Case = tuple[int, int, int, int, RowType, ComputeKernel, float]
"""Tables, rows and columns of each, ids of each, type of rows, kernel, part of the rows that a cache has room for."""

CASES: dict[str, Case] = {
    "1 x 40M x 128, 1M ids": (1, 40_000_000, 128, 2**20, "float32", "fused", 0.2),
    "1 x 40M x 128, 52K ids": (1, 40_000_000, 128, 52_416, "float32", "fused", 0.2),
    "10 x 4M x 128, 105K ids": (10, 4_000_000, 128, 104_832, "float32", "fused", 0.2),
    "50 x 500K x 128, 4K ids": (50, 500_000, 128, 4096, "float32", "fused", 0.2),
    "50 x 500K x 128, 32K ids": (50, 500_000, 128, 32_768, "float32", "fused", 0.2),
    "4 x 5M x 512, 64K ids": (4, 5_000_000, 512, 65_536, "float32", "fused", 0.2),
    "1 x 40M x 16, 1M ids": (1, 40_000_000, 16, 2**20, "float32", "fused", 0.2),
    "4 x 10M x 64, 262K ids": (4, 10_000_000, 64, 2**18, "float32", "fused", 0.2),
    "1 x 40M x 128 fp16, 1M ids": (1, 40_000_000, 128, 2**20, "float16", "fused", 0.2),
    "10 x 1M x 256 fp16, 52K ids": (10, 1_000_000, 256, 52_416, "float16", "fused", 0.2),
    "1 x 20M x 128 cached, 262K ids": (1, 20_000_000, 128, 2**18, "float32", "fused_uvm_caching", 0.2),
    "1 x 20M x 128 cached .05, 262K ids": (1, 20_000_000, 128, 2**18, "float32", "fused_uvm_caching", 0.05),
    "1 x 20M x 128 cached .5, 262K ids": (1, 20_000_000, 128, 2**18, "float32", "fused_uvm_caching", 0.5),
    "4 x 4M x 64 cached, 64K ids": (4, 4_000_000, 64, 65_536, "float32", "fused_uvm_caching", 0.2),
    "2 x 2M x 32, 131K ids": (2, 2_000_000, 32, 2**17, "float32", "fused", 0.2),
    "20 x 1M x 96, 16K ids": (20, 1_000_000, 96, 16_384, "float32", "fused", 0.2),
    "1 x 10M x 256 cached, 32K ids": (1, 10_000_000, 256, 32_768, "float32", "fused_uvm_caching", 0.2),
    "1 x 8M x 128 in host memory, 64K ids": (1, 8_000_000, 128, 65_536, "float32", "fused_uvm", 0.2),
}


def tables_of(case: Case) -> list[TableConfig]:
    """The tables of a case, one feature each."""
    count, rows, columns, _, dtype, *_ = case
    return [
        TableConfig(name=f"t{i}", num_embeddings=rows, embedding_dim=columns, features=(f"t{i}",), dtype=dtype)
        for i in range(count)
    ]


def placements(machine: Machine) -> Iterator[tuple[str, Any]]:
    """Each case measured, and what was predicted of it; how far both are apart."""
    cases: dict[str, dict[str, float]] = {}
    for name, case in CASES.items():
        cases[name] = placement(case, machine)
        yield "cases", cases
        yield "errors", errors(cases)


def placement(case: Case, machine: Machine) -> dict[str, float]:
    """Milliseconds and GiB of one case, predicted and measured."""
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    trial = made(case, machine)
    measured = median_ms(trial.step, DEVICE, prepare=trial.exchange)
    row = {"measured_ms": measured, "planned_ms": trial.plan.step_ms}
    row["peak_gib"] = (torch.cuda.max_memory_allocated() - before) / 2**30
    row["planned_gib"] = trial.plan.ranks[0].memory_bytes / 2**30
    row["peaks_ms"] = at_peaks(trial.plan, case).step_ms
    return row


def made(case: Case, machine: Machine) -> Trial:
    """The case on this GPU."""
    placed = PlacementConfig(compute_kernels=(case[5],), cached_part=case[6], reserved_fraction=0.0)
    return Trial(tables_of(case), case[3], machine=machine, placement=placed, rank=0)


def at_peaks(plan: Plan, case: Case) -> Plan:
    """The same plan with the data sheet's rates."""
    machine = replace(plan.machine, rates=None, calibration="")
    problem = Problem(
        tables=tuple(tables_of(case)),
        machine=machine,
        placement=PlacementConfig(compute_kernels=(case[5],), cached_part=case[6]),
        optimizer=OPTIMIZER,
        load=plan.load,
        reservation=plan.reservation,
    )
    tables = {name: replace(table, candidates=()) for name, table in plan.tables.items()}
    return evaluate(problem, tables)


def bare(machine: Machine) -> Iterator[tuple[str, Any]]:
    """FBGEMM's kernel called with the trial's own batches, beside the whole way."""
    for name in ("1 x 40M x 128, 1M ids", "10 x 4M x 128, 105K ids", "10 x 1M x 128, 5K ids"):
        case = CASES.get(name, (10, 1_000_000, 128, 5_248, "float32", "fused", 0.2))
        gc.collect()
        torch.cuda.empty_cache()
        trial = made(case, machine)
        step = bare_step(case, trial)
        row = {"trial_ms": median_ms(trial.step, DEVICE, prepare=trial.exchange)}
        row["bare_ms"] = median_ms(step, DEVICE, prepare=trial.exchange)
        row["ratio"] = row["trial_ms"] / row["bare_ms"]
        row["trial_host_ms"], row["bare_host_ms"] = host_ms(trial.step, trial), host_ms(step, trial)
        yield name, row | {"exchange_host_ms": host_ms(trial.exchange, trial)}


def host_ms(step: Callable[[], None], trial: Trial) -> float:
    """Median time that the host takes to ask the GPU for a step, which does not begin before."""
    times = []
    for _ in range(16):
        trial.exchange()
        torch.cuda.synchronize()
        start = time.perf_counter()
        step()
        times.append((time.perf_counter() - start) * 1000)
    return statistics.median(times)


def bare_step(case: Case, trial: Trial) -> Callable[[], None]:
    """Lookup without pooling, backward pass and update of the trial's batch."""
    kernel = SplitTableBatchedEmbeddingBagsCodegen(
        [
            (table.num_embeddings, table.embedding_dim, EmbeddingLocation.DEVICE, ComputeDevice.CUDA)
            for table in tables_of(case)
        ],
        pooling_mode=PoolingMode.NONE,
        optimizer=EmbOptimType.EXACT_ROWWISE_ADAGRAD,
        learning_rate=0.02,
        device=DEVICE,
    )
    gradient = torch.randn(case[0] * case[3], case[2], device=DEVICE)

    def step() -> None:
        kernel(trial.batch.values(), trial.batch.offsets()).backward(gradient)

    return step


def init(machine: Machine) -> Iterator[tuple[str, Any]]:
    """GB/s at which initial rows are made."""
    del machine
    table = TableConfig(name="t", num_embeddings=40_000_000, embedding_dim=128, features=("t",))
    for dtype in (torch.float32, torch.float16):
        block = torch.empty(table.num_embeddings, table.embedding_dim, dtype=dtype, device=DEVICE)
        ms = median_ms(lambda block=block: fill(block, table, 0, 0, seed=1), DEVICE)  # type: ignore[misc]
        yield str(dtype), block.nbytes / ms / 1e6
        del block
        torch.cuda.empty_cache()


def errors(cases: dict[str, dict[str, float]]) -> dict[str, float]:
    """Median errors of time and memory over all cases, and which part of the pairs are in the right order."""
    rows = list(cases.values())
    pairs = list(itertools.combinations(rows, 2))
    right = [(a["planned_ms"] < b["planned_ms"]) == (a["measured_ms"] < b["measured_ms"]) for a, b in pairs]
    time_errors = [abs(row["planned_ms"] / row["measured_ms"] - 1) for row in rows]
    memory_errors = [abs(row["planned_gib"] / row["peak_gib"] - 1) for row in rows]
    return {
        "median_time_error": statistics.median(time_errors),
        "median_memory_error": statistics.median(memory_errors),
        "largest_memory_error": max(memory_errors),
        "pairs_in_order": sum(right) / max(len(right), 1),
    }


PARTS: dict[str, Part] = {"init": init, "placements": placements, "bare": bare}


if __name__ == "__main__":
    run_parts(__doc__, PARTS, Path("benchmarks/results/placements.json"))
