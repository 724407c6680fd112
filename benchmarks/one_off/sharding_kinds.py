"""What a step's lookups and update of one small table cost under each sharding kind, on gloo processes of this machine.

Run: python -m benchmarks.one_off.sharding_kinds [--rows 1000] [--dim 64] [--ids 20000] [--ranks 2] [--rounds 15]

Forward, backward and update of the table alone, the kinds in turn within each round, so that other work on the machine
meets all of them; medians of the slowest rank.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.multiprocessing.spawn import spawn
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from embeddings.config import PlacementConfig, SparseOptimizerConfig, TableConfig
from embeddings.machine import Machine
from embeddings.measuring.trial import BAG_IDS, TablesAlone
from embeddings.optimizers import TableOptimizers
from embeddings.planner import plan_tables
from embeddings.planning.problem import BatchLoad
from embeddings.sharding import shard_tables
from embeddings.tables import rows_by_feature
from trainer.parallel.averaging import GradientAverage

KINDS = ("row_wise", "table_wise", "replicated")


def main() -> None:
    parser = argparse.ArgumentParser(description="One small table under each sharding kind, on gloo processes.")
    for name, default in (("rows", 1000), ("dim", 64), ("ids", 20_000), ("ranks", 2), ("rounds", 15)):
        parser.add_argument(f"--{name}", type=int, default=default)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        spawn(_run, (folder, arguments), nprocs=arguments.ranks, join=True)  # type: ignore[no-untyped-call]
        times = [torch.load(Path(folder, f"{rank}.pt")) for rank in range(arguments.ranks)]
    for kind in KINDS:
        print(f"{kind:>12} {max(statistics.median(rank[kind]) for rank in times):8.2f} ms")


def _run(rank: int, folder: str, arguments: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=arguments.ranks)
    steps = {kind: _parallel(kind, arguments) for kind in KINDS}
    times: dict[str, list[float]] = {kind: [] for kind in KINDS}
    generator = torch.Generator().manual_seed(rank)
    for number in range(arguments.rounds + 2):
        ids = torch.randint(arguments.rows, (arguments.ids,), generator=generator)
        full, rest = divmod(arguments.ids, BAG_IDS)
        features = KeyedJaggedTensor(["small"], ids, lengths=torch.tensor([BAG_IDS] * full + [rest]))
        for kind, (model, optimizers, average) in steps.items():
            dist.barrier()  # every rank; so that none waits for another within the time
            start = time.perf_counter()
            optimizers.zero_grad()
            rows_by_feature(model(features))["small"].values().square().sum().backward()
            if average is not None:
                average()
            optimizers.step()
            if number >= 2:
                times[kind].append(1000 * (time.perf_counter() - start))
    torch.save(times, Path(folder, f"{rank}.pt"))
    dist.destroy_process_group()


def _parallel(kind: str, arguments: argparse.Namespace) -> tuple[nn.Module, TableOptimizers, GradientAverage | None]:
    table = TableConfig(name="small", num_embeddings=arguments.rows, embedding_dim=arguments.dim, features=("small",))
    model, optimizer = TablesAlone([table]), SparseOptimizerConfig()
    plan = plan_tables(
        model,
        [table],
        machine=Machine(world_size=arguments.ranks, local_world_size=arguments.ranks, compute_device="cpu"),
        placement=PlacementConfig(sharding_types=(kind,)),
        optimizer=optimizer,
        load=BatchLoad(samples_per_rank=1, ids_per_sample={"small": float(arguments.ids)}),
    )
    module, optimizers = shard_tables(model, plan, optimizer=optimizer, device=torch.device("cpu"), seed=0)
    average = GradientAverage(list(model.tables.parameters()), arguments.ranks) if kind == "replicated" else None
    return module, optimizers, average


if __name__ == "__main__":
    main()
