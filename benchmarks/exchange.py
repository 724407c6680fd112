"""How many bytes ranks send each other for the lookups of a recipe's batches, each way, beside what was planned.

Run: python -m benchmarks.exchange [RECIPE] [--set KEY=VALUE ...] [--ranks 2] [--samples 32] [--steps 8] [--json FILE]

Lookup, backward pass and update of the tables alone, row-wise where a table can be, on gloo processes.  Counted is what
every rank hands to torch's exchange, its own part, lengths and sizes included; planned is the plan's `sent_bytes`.
"""

import argparse
import json
import statistics
import tempfile
from contextlib import closing
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor
from torch.multiprocessing.spawn import spawn

from embeddings.config import ExchangeConfig
from embeddings.machine import Machine
from embeddings.measuring.trial import TablesAlone
from embeddings.planner import plan_tables
from embeddings.sharding import shard_tables
from embeddings.tables import rows_by_feature
from pipelines.reading.loader import build_loader, dataset_info
from trainer.config import TrainConfig
from trainer.lookups import lookup_load
from trainer.recipes import RECIPES
from trainer.resolve import resolve
from trainer.typed_values import apply_overrides

WAYS = {
    "in full": ExchangeConfig(),
    "each id once": ExchangeConfig(deduplicate=True),
    "each id once, float16 rows, bfloat16 gradients": ExchangeConfig(
        deduplicate=True, rows="float16", gradients="bfloat16"
    ),
}


def main() -> None:
    """Prints and writes the ways."""
    parser = argparse.ArgumentParser(description="Bytes of the exchange, counted and planned.")
    parser.add_argument("recipe", nargs="?", default="kuairand_sample", choices=list(RECIPES))
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    for name, default in (("ranks", 2), ("samples", 32), ("steps", 8)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--json", type=Path, default=Path("benchmarks/results/exchange.json"))
    arguments = parser.parse_args()
    config = apply_overrides(RECIPES[arguments.recipe](), arguments.set)
    config = replace(config, data=replace(config.data, global_batch_size=arguments.ranks * arguments.samples))
    with tempfile.TemporaryDirectory() as folder:
        start: Any = spawn  # torch gives it no type
        start(_run, (folder, config, arguments.ranks, arguments.steps), nprocs=arguments.ranks, join=True)
        counted = [json.loads(Path(folder, f"{rank}.json").read_text()) for rank in range(arguments.ranks)]
    ways: dict[str, dict[str, float]] = {}
    for way in WAYS:
        sent, planned = statistics.mean(rank[way][0] for rank in counted), counted[0][way][1]
        ways[way] = {
            "counted": sent,
            "planned": planned,
            "times_fewer": ways["in full"]["counted"] / sent if ways else 1,
        }
        print(f"{way:>48}: {sent:12,.0f} bytes a rank and step, planned {planned:12,.0f} ({planned / sent - 1:+.1%})")
    settings = {
        "recipe": arguments.recipe,
        "set": arguments.set,
        "ranks": arguments.ranks,
        "samples": arguments.samples,
    }
    arguments.json.write_text(json.dumps(settings | {"ways": ways}, indent=1) + "\n", encoding="utf-8")


def _run(rank: int, folder: str, config: TrainConfig, ranks: int, steps: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=ranks)
    sent = {way: _sent(config, exchange, rank, steps) for way, exchange in WAYS.items()}
    Path(folder, f"{rank}.json").write_text(json.dumps(sent), encoding="utf-8")
    dist.destroy_process_group()


def _sent(config: TrainConfig, exchange: ExchangeConfig, rank: int, steps: int) -> tuple[float, int]:
    """(bytes a step that this rank hands over, bytes that the plan says a rank does)."""
    ranks = dist.get_world_size()
    placement = replace(config.placement, exchange=exchange, sharding_types=("row_wise",))
    config = replace(config, placement=placement)
    resolved = resolve(config, dataset_info(config.data))
    model = TablesAlone(resolved.tables)
    plan = plan_tables(
        model,
        resolved.tables,
        machine=Machine(world_size=ranks, local_world_size=ranks, compute_device="cpu"),
        placement=config.placement,
        optimizer=config.sparse_optimizer,
        load=lookup_load(resolved, ranks),
    )
    module, optimizers = shard_tables(
        model, plan, optimizer=config.sparse_optimizer, device=torch.device("cpu"), seed=0
    )
    loader = build_loader(
        replace(config.data, reader_threads=0),
        split="train",
        rank=rank,
        world_size=ranks,
        selection=resolved.task.selection,
        cost=resolved.balanced_cost,
    )
    sent, exchanged = 0, dist.all_to_all_single

    def counted(output: Tensor, input: Tensor, *rest: Any, **named: Any) -> Any:
        nonlocal sent
        sent += input.nbytes
        return exchanged(output, input, *rest, **named)

    with mock.patch.object(dist, "all_to_all_single", counted), closing(iter(loader)) as batches:
        for batch in islice(batches, steps):
            optimizers.zero_grad()
            rows = rows_by_feature(module(batch.features))
            torch.autograd.backward([value.values().sum() for value in rows.values()])
            optimizers.step()
    return sent / steps, plan.sent_bytes


if __name__ == "__main__":
    main()
