"""What each rank of the test of unbounded ids does, and the oracle: plain dictionaries, plain PyTorch, one process."""

from collections import Counter, deque
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed._shard.sharded_tensor.api import ShardedTensor
from torchrec.distributed.model_parallel import DistributedModelParallel

from embeddings.config import PlacementConfig, SparseOptimizerConfig, TableConfig, UnboundedConfig
from embeddings.lookups.key_map import SHARED_ROW, UNKNOWN_KEY
from embeddings.lookups.unbounded import UnboundedTables
from embeddings.machine import Machine
from embeddings.optimizers import TableOptimizers
from embeddings.planner import problem_of
from embeddings.planning.problem import BatchLoad
from embeddings.planning.solver import solve
from embeddings.sharding import shard_tables
from embeddings.tables import build_tables, init_tables, rows_by_feature, table_weights
from tests.embeddings.lookups.test_key_map import PlainMap
from tests.embeddings.sharded import EPS, Model, Part, averaged, flat, jagged, local_parts, tables_of

TABLE = TableConfig(
    name="item",
    num_embeddings=150,
    embedding_dim=64,
    features=("event", "candidate"),
    # Elementwise: every kind can have it.
    optimizer=SparseOptimizerConfig(kind="adagrad", learning_rate=0.1),
    unbounded=UnboundedConfig(min_count=2, evict_after_steps=2),
)
CPU = torch.device("cpu")
SEED = 3
STEPS = 14
SAMPLES = 6
LOOK_AHEAD = 2
"""Batches that are admitted before the one that is trained on."""


def global_batch(step: int) -> dict[str, list[list[int]]]:
    """Samples of keys; the common ones move on, and some are unknown."""
    draw = np.random.default_rng(step)
    keys = np.random.default_rng(99).integers(-(2**63), 2**63 - 1, 1000)
    keys[::50] = UNKNOWN_KEY
    return {
        feature: [keys[step * 25 + draw.integers(0, 90, draw.integers(0, 20))].tolist() for _ in range(SAMPLES)]
        for feature in TABLE.features
    }


def weights(keys: Tensor, step: int) -> Tensor:
    """What the loss multiplies the rows of keys with."""
    return torch.sin((keys % 1000)[:, None] * 0.7 + torch.arange(TABLE.embedding_dim) * 0.3 + step)


def oracle(*, rowwise: bool = False) -> tuple[dict[str, Tensor], list[dict[int, int]], int]:
    """(rows and their sums, the row of each key of each step, rows that began anew)."""
    unsharded = build_tables([TABLE], device=torch.device("cpu"))
    init_tables(unsharded, SEED)
    initial = table_weights(unsharded)["item"].detach().clone()
    rows, sums = initial.clone(), torch.zeros_like(initial[:, 0] if rowwise else initial)
    assert TABLE.unbounded is not None
    plain, maps, begun = PlainMap(TABLE.unbounded, TABLE.num_embeddings - 1), [], 0
    for step in range(STEPS):
        batch = {feature: flat(samples) for feature, samples in global_batch(step).items()}
        known = Counter(key for keys in batch.values() for key in keys.tolist() if key != UNKNOWN_KEY)
        slots, restarted = plain.admit(known)
        again = torch.tensor(sorted(restarted), dtype=torch.int64) + 1
        rows[again], sums[again], begun = initial[again], 0.0, begun + len(again)
        row_of = {key: slots[key] + 1 if key in slots else SHARED_ROW for key in [*known, UNKNOWN_KEY]}
        maps.append(row_of)
        leaf = rows.clone().requires_grad_()
        looked_up = [
            (leaf[[row_of[key] for key in keys.tolist()]] * weights(keys, step)).sum() for keys in batch.values()
        ]
        torch.stack(looked_up).sum().backward()
        assert leaf.grad is not None
        sums += leaf.grad.square().mean(1) if rowwise else leaf.grad.square()
        roots = sums.sqrt() + EPS
        rows -= 0.1 * leaf.grad / (roots[:, None] if rowwise else roots)
    return {"tables/item": rows, "optimizer/item/momentum1": sums}, maps, begun


Result = tuple[dict[str, list[Part]], list[dict[int, int]], dict[str, list[Part]]]
"""(a rank's parts of rows and sums, the row of each of its keys in each step, its parts of the map)."""


def run_rank(layouts: Sequence[str]) -> dict[str, Result]:
    """What every layout comes to."""
    return {layout: run(layout) for layout in layouts}


def run(layout: str, table: TableConfig = TABLE, device: torch.device = CPU) -> Result:
    """What this rank comes to."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    model, optimizers = _shard(layout, ranks, table, device)
    tables = tables_of(model)
    unbounded = UnboundedTables(tables, optimizers, seed=SEED)
    unbounded.forget_flight()
    found, admitted = [], deque[tuple[dict[str, list[list[int]]], dict[str, Tensor]]]()
    for step in range(STEPS + LOOK_AHEAD):
        if step < STEPS:
            keys = {name: samples[rank::ranks] for name, samples in global_batch(step).items()}
            admitted.append((keys, unbounded.admit(_ids(keys))))
        if step >= LOOK_AHEAD:
            keys, rows = admitted.popleft()
            unbounded.begin_step()
            # The map in force is that of the step, not of the batches that were admitted since.
            again = unbounded.find(_ids(keys))
            assert all(torch.equal(again[name], rows[name]) for name in rows)
            found.append({k: r for name in rows for k, r in _pairs(keys[name], rows[name])})
            _train(model, optimizers, keys, rows, step - LOOK_AHEAD)
    parts = {name: _parts(value) for name, value in unbounded.state().items() if isinstance(value, ShardedTensor)}
    return local_parts(tables, optimizers), found, parts


def _train(
    model: DistributedModelParallel,
    optimizers: TableOptimizers,
    keys: dict[str, list[list[int]]],
    rows: dict[str, Tensor],
    step: int,
) -> None:
    lens = {name: [len(sample) for sample in samples] for name, samples in keys.items()}
    ids = {name: [part.tolist() for part in torch.split(rows[name], lens[name])] for name in rows}
    optimizers.zero_grad()
    device = next(model.parameters()).device
    looked_up = rows_by_feature(model(jagged(ids).to(device)))
    loss = sum((looked_up[name].values() * weights(flat(keys[name]), step).to(device)).sum() for name in keys)
    (loss * float(dist.get_world_size())).backward()
    averaged(model)()
    optimizers.step()


def _shard(
    layout: str, ranks: int, table: TableConfig, device: torch.device
) -> tuple[DistributedModelParallel, TableOptimizers]:
    model, default = Model((table,)), SparseOptimizerConfig()
    on_gpu = device.type == "cuda"
    machine = Machine(
        world_size=ranks, local_world_size=ranks, compute_device=device.type, hbm_gib=80.0 if on_gpu else None
    )
    problem = problem_of(
        model,
        [table],
        machine=machine,
        placement=PlacementConfig(sharding_types=(layout,)),
        optimizer=default,
        load=BatchLoad(),
    )
    return shard_tables(model, solve(problem), optimizer=default, device=device, seed=SEED)


def _ids(keys: dict[str, list[list[int]]]) -> Callable[[str], Tensor]:
    return lambda name: flat(keys[name])


def _pairs(samples: list[list[int]], rows: Tensor) -> Any:
    return zip(flat(samples).tolist(), rows.tolist(), strict=True)


def _parts(value: ShardedTensor) -> list[Part]:
    return [(list(shard.metadata.shard_offsets), shard.tensor.clone()) for shard in value.local_shards()]
