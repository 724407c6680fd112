"""The kernels that only a GPU has, on one: values, updates, checkpoints between kernels, and the planned memory."""

import gc
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from fbgemm_gpu.split_table_batched_embeddings_ops_common import EmbeddingLocation, PoolingMode
from fbgemm_gpu.split_table_batched_embeddings_ops_training import (
    ComputeDevice,
    SplitTableBatchedEmbeddingBagsCodegen,
)
from torchrec.distributed.model_parallel import DistributedModelParallel

from embeddings.config import ComputeKernel, ExchangeConfig, PlacementConfig, SparseOptimizerConfig, TableConfig
from embeddings.machine import Machine
from embeddings.optimizers import TableOptimizers
from embeddings.plan import Plan
from embeddings.planner import plan_tables
from embeddings.planning.problem import BatchLoad
from embeddings.sharding import shard_tables
from embeddings.tables import build_tables, init_tables, rows_by_feature, table_weights
from tests.embeddings import sharded
from tests.embeddings.lookups import unbounded_ranks

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]

KERNELS: tuple[ComputeKernel, ...] = ("fused", "fused_uvm_caching", "fused_uvm")

BY_OPTIMIZER = {
    # FBGEMM can be built without the kernels of an optimizer: then the others are tested still.
    "plain_adagrad": tuple(table for table in sharded.TABLES if table.optimizer and table.optimizer.kind == "adagrad"),
    # Pooled tables have plain Adagrad there, and are to be tested here.
    "others": tuple(
        replace(table, optimizer=None) if table.pooled else table for table in sharded.TABLES if table.name != "tag"
    ),
}
NOT_BUILT = "device kernel image is invalid"
"""What CUDA says of a kernel that was not built for its GPU."""


@pytest.fixture(scope="module", autouse=True)
def process_group(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """This process as a job of one rank."""
    torch.cuda.set_device(0)
    store = dist.FileStore(str(tmp_path_factory.mktemp("job") / "store"), 1)
    dist.init_process_group("cuda:nccl,cpu:gloo", store=store, rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def shard(
    kernel: ComputeKernel,
    tables: tuple[TableConfig, ...] = sharded.TABLES,
    exchange: ExchangeConfig = sharded.IN_FULL,
) -> tuple[Plan, DistributedModelParallel, TableOptimizers]:
    """`tables` on the GPU under `kernel`, with initial values."""
    model = sharded.Model(tables)
    plan = plan_tables(
        model,
        tables,
        machine=Machine(world_size=1, local_world_size=1, compute_device="cuda", hbm_gib=80.0),
        placement=PlacementConfig(compute_kernels=(kernel,), exchange=exchange),
        optimizer=sharded.OPTIMIZER,
        load=BatchLoad(),
    )
    device, seed = torch.device("cuda", 0), sharded.SEED
    module, optimizers = shard_tables(model, plan, optimizer=sharded.OPTIMIZER, device=device, seed=seed)
    return plan, module, optimizers


def train(
    model: DistributedModelParallel, optimizers: TableOptimizers, *, rounded: torch.dtype | None = None
) -> list[dict[str, torch.Tensor]]:
    """The embeddings of each step, on the CPU; the model computes with them `rounded`."""
    outputs = []
    for step in range(sharded.STEPS):
        batch = sharded.global_batch(step)
        optimizers.zero_grad()
        rows = rows_by_feature(model(sharded.jagged(batch).to(torch.device("cuda"))))
        embedded = {key: value.values() for key, value in rows.items()}
        told = {feature: sharded.flat(samples) for feature, samples in batch.items()}
        told |= dict.fromkeys(sharded.POOLED, torch.arange(sharded.GLOBAL_SAMPLES))
        losses = [
            (
                (values if rounded is None else values.to(rounded))
                * sharded.weights(feature, told[feature], step).cuda()
            ).sum()
            for feature, values in embedded.items()
        ]
        try:
            torch.stack(losses).sum().backward()
        except RuntimeError as error:
            plain = [table.name for table in sharded.tables_of(model).configs if table in BY_OPTIMIZER["plain_adagrad"]]
            if plain and NOT_BUILT in str(error):
                pytest.skip(f"this FBGEMM has no kernels of plain Adagrad, which {plain} have")
            raise
        optimizers.step()
        outputs.append({feature: values.detach().cpu() for feature, values in embedded.items()})
    return outputs


def whole(model: DistributedModelParallel, optimizers: TableOptimizers) -> dict[str, torch.Tensor]:
    """The state as whole tensors; one rank holds them all."""
    parts = sharded.local_parts(sharded.tables_of(model), optimizers)
    return {name: value.cpu() for name, value in sharded.whole([parts]).items()}


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("tables", BY_OPTIMIZER.values(), ids=list(BY_OPTIMIZER))
def test_training_equals_the_unsharded_tables_on_a_cpu(tables: tuple[TableConfig, ...], kernel: ComputeKernel) -> None:
    _, model, optimizers = shard(kernel, tables)
    expected, outputs = sharded.oracle(tables)
    for step, embedded in enumerate(train(model, optimizers)):
        for feature, values in outputs[step].items():
            # FBGEMM rounds float16 rows up or down at random on a GPU.
            tolerance = 5e-3 if feature == "brand" else 1e-6
            torch.testing.assert_close(embedded[feature], values, rtol=10 * tolerance, atol=tolerance)
    state = whole(model, optimizers)
    assert state.keys() == expected.keys()
    for name, value in expected.items():
        tolerance = 5e-3 if "brand" in name else 1e-6
        torch.testing.assert_close(state[name], value, rtol=10 * tolerance, atol=tolerance)


@pytest.mark.parametrize("rounded", [False, True])
def test_ids_sent_once_and_rounded_rows_train_as_ever(rounded: bool) -> None:
    """On one rank, which sends all that to itself."""
    types: Any = {"rows": "float16", "gradients": "bfloat16"} if rounded else {}
    _, model, optimizers = shard("fused", BY_OPTIMIZER["others"], ExchangeConfig(deduplicate=True, **types))
    train(model, optimizers)
    expected, _ = sharded.oracle(BY_OPTIMIZER["others"])
    for name, value in whole(model, optimizers).items():
        tolerance = 5e-3 if rounded or "brand" in name else 1e-6
        torch.testing.assert_close(value, expected[name], rtol=10 * tolerance, atol=tolerance)


def test_kernels_that_write_bfloat16_round_rows_and_read_gradients_as_a_model_does() -> None:
    """As a model that rounds the rows of float32 kernels: what FBGEMM adds up has the same values."""
    tables = tuple(table for table in BY_OPTIMIZER["others"] if table.name != "brand" and table.pooled is None)
    found = []
    for exchange in (ExchangeConfig(), ExchangeConfig(rows="bfloat16", gradients="bfloat16")):
        _, model, optimizers = shard("fused", tables, exchange)
        outputs = train(model, optimizers, rounded=torch.bfloat16)
        found.append((outputs, whole(model, optimizers)))
    (outputs, state), (narrow_outputs, narrow_state) = found
    for step, narrow_step in zip(outputs, narrow_outputs, strict=True):
        for feature, values in narrow_step.items():
            assert values.dtype == torch.bfloat16
            torch.testing.assert_close(values.float(), step[feature].bfloat16().float(), rtol=2**-7, atol=1e-7)
    for name, value in state.items():
        torch.testing.assert_close(narrow_state[name], value, rtol=1e-5, atol=1e-7)


def test_unbounded_ids_train_as_a_plain_dictionary_of_keys_does() -> None:
    adagrad = SparseOptimizerConfig(kind="rowwise_adagrad", learning_rate=0.1)
    table = replace(unbounded_ranks.TABLE, optimizer=adagrad)
    state, found, _ = unbounded_ranks.run("table_wise", table, torch.device("cuda", 0))
    expected, maps, begun = unbounded_ranks.oracle(rowwise=True)
    assert begun > 50 and len(found) == len(maps)
    assert found == [
        {key: row for key, row in step.items() if key in mine} for step, mine in zip(maps, found, strict=True)
    ]
    for name, value in sharded.whole([state]).items():
        torch.testing.assert_close(value.cpu(), expected[name], rtol=1e-5, atol=1e-6)


def test_a_kernel_without_a_row_takes_part() -> None:
    """As on ranks that hold no row of any table of a width."""
    kernel = SplitTableBatchedEmbeddingBagsCodegen(
        [(0, 8, EmbeddingLocation.DEVICE, ComputeDevice.CUDA)],
        pooling_mode=PoolingMode.NONE,
        optimizer=EmbOptimType.EXACT_ROWWISE_ADAGRAD,
        learning_rate=0.1,
        device=torch.device("cuda", 0),
    )
    none, offsets = (torch.zeros(size, dtype=torch.int64, device="cuda") for size in (0, 4))
    rows = kernel(none, offsets)
    assert rows.shape == (0, 8)
    rows.sum().backward()


@pytest.mark.parametrize("kernel", KERNELS)
def test_initial_values_equal_those_on_a_cpu(kernel: ComputeKernel) -> None:
    _, model, optimizers = shard(kernel)
    unsharded = build_tables(sharded.TABLES, device=torch.device("cpu"))
    init_tables(unsharded, sharded.SEED)
    state = whole(model, optimizers)
    for name, value in table_weights(unsharded).items():
        torch.testing.assert_close(state[f"tables/{name}"], value, rtol=0, atol=0)


@pytest.mark.parametrize("loaded", KERNELS)
@pytest.mark.parametrize("saved", ["fused", "fused_uvm_caching"])
@pytest.mark.parametrize("optimizers", BY_OPTIMIZER)
def test_checkpoint_carries_over_between_kernels(
    optimizers: str, saved: ComputeKernel, loaded: ComputeKernel, tmp_path: Path
) -> None:
    tables = tuple(table for table in BY_OPTIMIZER[optimizers] if table.dtype == "float32")
    _, source, source_optimizers = shard(saved, tables)
    train(source, source_optimizers)
    dcp.save(sharded.state(sharded.tables_of(source), source_optimizers), checkpoint_id=tmp_path)
    _, target, target_optimizers = shard(loaded, tables)
    dcp.load(sharded.state(sharded.tables_of(target), target_optimizers), checkpoint_id=tmp_path)
    expected = whole(source, source_optimizers)
    for name, value in whole(target, target_optimizers).items():
        torch.testing.assert_close(value, expected[name], rtol=0, atol=0)
    # A cache that still held other rows would show in the next lookups.
    for after, before in zip(train(target, target_optimizers), train(source, source_optimizers), strict=True):
        for feature, values in before.items():
            torch.testing.assert_close(after[feature], values, rtol=1e-6, atol=1e-7)


def test_adam_counts_steps_and_not_evaluations_and_resumes_exactly(tmp_path: Path) -> None:
    adam = SparseOptimizerConfig(kind="adam", learning_rate=0.1)
    tables = tuple(replace(table, optimizer=adam) for table in sharded.TABLES if table.dtype == "float32")
    _, model, optimizers = shard("fused", tables)
    train(model, optimizers)
    dcp.save(sharded.state(sharded.tables_of(model), optimizers), checkpoint_id=tmp_path)
    assert int(optimizers.state()["item/step"]) == sharded.STEPS
    _, resumed, resumed_optimizers = shard("fused", tables)
    dcp.load(sharded.state(sharded.tables_of(resumed), resumed_optimizers), checkpoint_id=tmp_path)
    with torch.no_grad():
        for step in range(3):
            resumed(sharded.jagged(sharded.global_batch(step)).to(torch.device("cuda")))
    train(model, optimizers)
    train(resumed, resumed_optimizers)
    expected = whole(model, optimizers)
    for name, value in whole(resumed, resumed_optimizers).items():
        torch.testing.assert_close(value, expected[name], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(("kernel", "tolerance"), [("fused", 0.02), ("fused_uvm_caching", 0.05)])
def test_planned_memory_is_what_is_allocated(kernel: ComputeKernel, tolerance: float) -> None:
    """Of a cached table we take TorchRec's estimate, which leaves out the cache's bookkeeping: 16 bytes a row."""
    table = TableConfig(name="item", num_embeddings=4_000_000, embedding_dim=128, features=("item",))
    # Models of earlier tests may lie in reference cycles, to be freed in the midst of this one.
    gc.collect()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    plan, model, _ = shard(kernel, (table,))
    torch.cuda.synchronize()
    allocated = torch.cuda.memory_allocated() - before
    planned = plan.ranks[0].weight_bytes + plan.ranks[0].optimizer_bytes
    assert model is not None
    assert abs(allocated - planned) < tolerance * planned, f"planned {planned:,}, allocated {allocated:,}"
