"""Sharding kinds: costs are TorchRec's estimates, shards cover a table, what a kind cannot do it says."""

import random

import pytest
import torch
from torch import nn
from torchrec.distributed.embedding import EmbeddingCollectionSharder
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
from torchrec.distributed.planner.constants import DEFAULT_PERF_ESTIMATOR
from torchrec.distributed.planner.enumerators import EmbeddingEnumerator, get_partition_by_type
from torchrec.distributed.planner.estimator.estimator import EmbeddingPerfEstimatorFactory
from torchrec.distributed.planner.shard_estimators import EmbeddingStorageEstimator
from torchrec.distributed.planner.types import ParameterConstraints, ShardingOption
from torchrec.distributed.planner.types import Shard as TorchRecShard
from torchrec.distributed.types import PipelineType

from benchmarks.planner import torchrec_topology
from embeddings.config import ComputeKernel, ExchangeConfig, SparseOptimizerConfig, TableConfig
from embeddings.kinds.kind import Blocks, Work
from embeddings.kinds.registry import KINDS
from embeddings.machine import Machine
from embeddings.optimizers import attach_optimizers
from embeddings.tables import build_tables, modules_by_table

GPUS_32 = Machine(world_size=32, local_world_size=8, compute_device="cuda", hbm_gib=80.0)
GPUS_8 = Machine(world_size=8, local_world_size=8, compute_device="cuda", hbm_gib=141.0)
GPUS_16 = Machine(world_size=16, local_world_size=8, compute_device="cuda", hbm_gib=80.0)
NODES_OF_ONE = Machine(world_size=4, local_world_size=1, compute_device="cpu")
CPUS_2 = Machine(world_size=2, local_world_size=2, compute_device="cpu")

TORCHREC_NAMES = {"replicated": "data_parallel"}


def table(rows: int, dim: int, **changes: object) -> TableConfig:
    """A table with two features."""
    return TableConfig(name="t", num_embeddings=rows, embedding_dim=dim, features=("a", "b"), **changes)  # type: ignore[arg-type]


def work_of(config: TableConfig, optimizer: str, kernel: ComputeKernel, machine: Machine, *, ids: float) -> Work:
    """So many lookups, of which every id is sent, in full; of a pooled table in 128 bags, a sample one a feature."""
    return Work(
        table=config,
        optimizer=optimizer,
        kernel=kernel,
        machine=machine,
        ids=ids,
        exchanged_ids=ids,
        exchange=ExchangeConfig(),
        bags=None if config.pooled is None else 128.0,
    )


def torchrec_estimate(work: Work, kind: str, block: Blocks) -> TorchRecShard:
    """TorchRec's estimate of one block."""
    built = build_tables([work.table], device=torch.device("meta"))
    attach_optimizers(built, SparseOptimizerConfig(kind=work.optimizer))  # type: ignore[arg-type]
    (collection,) = built.collections
    topology = torchrec_topology(work.machine)
    lookups = [work.ids / 64 * 0.75, work.ids / 64 * 0.25]
    constraints = {"t": ParameterConstraints(pooling_factors=lookups)}
    enumerator = EmbeddingEnumerator(
        topology=topology,
        batch_size=64,
        constraints=constraints,
        estimator=[
            EmbeddingPerfEstimatorFactory.create(DEFAULT_PERF_ESTIMATOR, topology=topology, constraints=constraints),
            EmbeddingStorageEstimator(
                topology=topology,
                constraints=constraints,
                # The pipeline holds the ids of two batches, and outputs live from the lookup to its backward.
                pipeline_type=PipelineType.TRAIN_SPARSE_DIST,
                run_embedding_at_peak_memory=True,
            ),
        ],
    )
    pooled = work.table.pooled is not None
    enumerator.enumerate(nn.Module(), [EmbeddingBagCollectionSharder() if pooled else EmbeddingCollectionSharder()])
    name = TORCHREC_NAMES.get(kind, kind)
    option = ShardingOption(
        name="t",
        tensor=modules_by_table(collection)["t"].weight,
        module=("", collection),
        input_lengths=lookups,
        batch_size=64,
        compute_kernel=work.kernel if name != "data_parallel" else "dense",
        sharding_type=name,
        partition_by=get_partition_by_type(name),
        shards=[TorchRecShard(size=[block.num_rows, block.num_columns], offset=[0, 0])],
        is_pooled=pooled,
    )
    enumerator.populate_estimates([option])
    shard: TorchRecShard = option.shards[0]
    return shard


CASES = [
    (kind, kernel, optimizer, machine, dim, pooled)
    for kind in KINDS
    for pooled in (None, "sample")
    for kernel in ("fused", "fused_uvm_caching", "fused_uvm")
    for optimizer in ("rowwise_adagrad", "adagrad")
    for machine, dim in ((GPUS_8, 32), (GPUS_16, 96), (GPUS_32, 128), (GPUS_32, 64), (CPUS_2, 64))
]


@pytest.mark.parametrize(("kind", "kernel", "optimizer", "machine", "dim", "pooled"), CASES)
def test_cost_is_torchrecs_estimate(
    kind: str, kernel: ComputeKernel, optimizer: str, machine: Machine, dim: int, pooled: str | None
) -> None:
    config = table(machine.world_size * 1000, dim, pooled=pooled)
    work = work_of(config, optimizer, kernel, machine, ids=64 * 37.5)
    if KINDS[kind].refusal(work) is not None or (machine is CPUS_2 and kernel != "fused"):
        return
    for block, *others in KINDS[kind].cuts(config, machine):
        assert all(other == block for other in others)
        ours, theirs = KINDS[kind].cost(work, block), torchrec_estimate(work, kind, block)
        assert ours.ms == pytest.approx(theirs.perf.total, rel=1e-6)
        device, host = theirs.storage.hbm, theirs.storage.ddr
        if machine is CPUS_2:
            device, host = host, 0
        # TorchRec leaves out the gradient of a replicated table and its copy that is added up.
        left_out = 2 * config.weight_bytes if kind == "replicated" else 0
        if machine is not CPUS_2:
            # It also leaves out what a GPU was seen to hold: the gradient of the rows and one of their copies, of rows
            # in host memory two, the buffers that ids are sorted in, and 4 bytes more of each row of a cached table.
            ranks: float = 1 if KINDS[kind].everywhere else machine.world_size
            if KINDS[kind].on_nodes:
                ranks = machine.world_size / machine.local_world_size
            copies = (3 if kernel == "fused_uvm" else 2) * block.num_columns * 4
            vectors = ranks * work.ids
            if work.bags is not None:
                # Parts of sums come for the bags of all ranks.
                vectors = work.bags * (machine.world_size if KINDS[kind].sharded else 1)
            left_out += ranks * work.ids * 52 + vectors * copies
            left_out += block.num_rows * 4 if kernel == "fused_uvm_caching" else 0
        assert ours.memory_bytes - left_out == pytest.approx(device, rel=1e-6, abs=64)
        assert ours.host_bytes == host


def test_float16_rows_take_as_long_as_float32_ones_but_from_host_memory() -> None:
    times = {}
    for kernel in ("fused", "fused_uvm"):
        for dtype in ("float32", "float16"):
            work = work_of(table(1000, 128, dtype=dtype), "sgd", kernel, GPUS_8, ids=2400.0)
            ((block,),) = KINDS["table_wise"].cuts(work.table, GPUS_8)
            times[kernel, dtype] = KINDS["table_wise"].cost(work, block).ms
    assert times["fused", "float16"] == times["fused", "float32"]
    assert times["fused_uvm", "float16"] < times["fused_uvm", "float32"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", range(5))
def test_shards_hold_every_value_once_or_on_every_rank(kind: str, seed: int) -> None:
    draw = random.Random(seed)
    world_size, ranks_a_node = draw.choice([(2, 2), (3, 1), (8, 4), (16, 8)])
    machine = Machine(world_size=world_size, local_world_size=ranks_a_node, compute_device="cpu")
    config = table(draw.randint(1, 200), draw.choice([4, 64, 256]))
    for cut in KINDS[kind].cuts(config, machine):
        count = sum(blocks.count for blocks in cut)
        ranks = range(world_size) if KINDS[kind].everywhere else draw.sample(range(world_size), count)
        shards = KINDS[kind].shards(config, machine, ranks)
        assert [shard.rank for shard in shards] == list(ranks)
        sizes = [(len(shard.rows), len(shard.columns)) for shard in shards]
        assert sizes == [(blocks.num_rows, blocks.num_columns) for blocks in cut for _ in range(blocks.count)]
        held = torch.zeros(config.num_embeddings, config.embedding_dim, dtype=torch.int64)
        for shard in shards:
            held[shard.rows.start : shard.rows.stop, shard.columns.start : shard.columns.stop] += 1
        assert (held == (1 if KINDS[kind].sharded else world_size)).all()


@pytest.mark.parametrize(
    ("kind", "optimizer", "kernel", "dtype", "machine", "reason"),
    [
        ("column_wise", "rowwise_adagrad", "fused", "float32", GPUS_8, "averages over all its columns"),
        ("column_wise", "adam", "fused", "float32", GPUS_8, "has not been held against"),
        ("column_wise", "sgd", "fused_uvm", "float32", GPUS_8, "for whole rows only"),
        ("grid_shard", "rowwise_adagrad", "fused", "float32", GPUS_16, "averages over all its columns"),
        ("grid_shard", "sgd", "fused_uvm_caching", "float32", GPUS_16, "for whole rows only"),
        ("grid_shard", "sgd", "fused", "float32", GPUS_8, "there is one node, where row_wise is the same"),
        ("grid_shard", "sgd", "fused", "float32", NODES_OF_ONE, "one rank, where column_wise is the same"),
        ("table_row_wise", "sgd", "fused", "float32", NODES_OF_ONE, "one rank, where table_wise is the same"),
        ("replicated", "adam", "fused", "float32", GPUS_8, "rows without an id too"),
        ("replicated", "sgd", "fused", "float16", GPUS_8, "added up in float16"),
        ("replicated", "sgd", "fused_uvm", "float32", GPUS_8, "no kernel fused_uvm"),
        (
            "replicated",
            "sgd",
            "fused",
            "float32",
            Machine(world_size=1, local_world_size=1, compute_device="cpu"),
            "there is one rank",
        ),
    ],
)
def test_what_a_kind_cannot_do_it_says(
    kind: str, optimizer: str, kernel: ComputeKernel, dtype: str, machine: Machine, reason: str
) -> None:
    pooled = "sample" if KINDS[kind].on_nodes else None
    work = work_of(table(100, 64, dtype=dtype, pooled=pooled), optimizer, kernel, machine, ids=1.0)
    refusal = KINDS[kind].refusal(work)
    assert refusal is not None and reason in refusal and "\n" not in refusal


@pytest.mark.parametrize("kind", [name for name, kind in KINDS.items() if kind.on_nodes])
def test_kinds_over_nodes_take_pooled_tables_alone(kind: str) -> None:
    refusal = KINDS[kind].refusal(work_of(table(100, 64), "sgd", "fused", GPUS_16, ids=1.0))
    assert refusal is not None and "for pooled tables alone" in refusal
