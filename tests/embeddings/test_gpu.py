"""The kernels that only a GPU has, on one: values, updates, checkpoints between kernels, and the planned memory."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torchrec.distributed.embedding import EmbeddingCollectionSharder
from torchrec.distributed.model_parallel import DistributedModelParallel

from embeddings.config import ComputeKernel, PlacementConfig, TableConfig
from embeddings.machine import Machine
from embeddings.plan import BatchLoad, Plan
from embeddings.planner import plan_tables
from embeddings.sharding import to_sharding_plan
from embeddings.tables import apply_sparse_optimizer, build_embedding_collection, init_tables
from tests.embeddings import sharded

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]

KERNELS: tuple[ComputeKernel, ...] = ("fused", "fused_uvm_caching", "fused_uvm")


@pytest.fixture(scope="module", autouse=True)
def process_group(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """This process as a job of one rank."""
    torch.cuda.set_device(0)
    store = dist.FileStore(str(tmp_path_factory.mktemp("job") / "store"), 1)
    dist.init_process_group("cuda:nccl,cpu:gloo", store=store, rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def shard(
    kernel: ComputeKernel, tables: tuple[TableConfig, ...] = sharded.TABLES
) -> tuple[Plan, DistributedModelParallel]:
    """`tables` on the GPU under `kernel`, with initial values."""
    model = sharded.Model()
    model.embeddings = build_embedding_collection(tables, device=torch.device("meta"))
    plan = plan_tables(
        model,
        tables,
        machine=Machine(world_size=1, local_world_size=1, compute_device="cuda", hbm_gib=80.0),
        placement=PlacementConfig(compute_kernels=(kernel,)),
        optimizer=sharded.OPTIMIZER,
        load=BatchLoad(),
    )
    apply_sparse_optimizer(model.embeddings, sharded.OPTIMIZER)
    dmp = DistributedModelParallel(
        model,
        device=torch.device("cuda", 0),
        plan=to_sharding_plan(plan, model),
        sharders=[EmbeddingCollectionSharder()],
    )
    init_tables(dmp, tables, sharded.SEED)
    return plan, dmp


def train(model: DistributedModelParallel) -> list[dict[str, torch.Tensor]]:
    """The embeddings of each step, on the CPU."""
    outputs = []
    for step in range(sharded.STEPS):
        batch = sharded.global_batch(step)
        embedded = {key: value.values() for key, value in model(sharded.jagged(batch).to(torch.device("cuda"))).items()}
        losses = [
            (values * sharded.weights(feature, sharded.flat(batch[feature]), step).cuda()).sum()
            for feature, values in embedded.items()
        ]
        torch.stack(losses).sum().backward()
        outputs.append({feature: values.detach().cpu() for feature, values in embedded.items()})
    return outputs


def whole(model: DistributedModelParallel) -> dict[str, torch.Tensor]:
    """The state as whole tensors; one rank holds them all."""
    return {name: torch.cat([rows.cpu() for _, rows in parts]) for name, parts in sharded.local_parts(model).items()}


@pytest.mark.parametrize("kernel", KERNELS)
def test_training_equals_the_unsharded_tables_on_a_cpu(kernel: ComputeKernel) -> None:
    _, model = shard(kernel)
    tables, sums, outputs = sharded.oracle()
    for step, embedded in enumerate(train(model)):
        for feature, values in outputs[step].items():
            torch.testing.assert_close(embedded[feature], values, rtol=1e-5, atol=1e-6)
    expected = {f"tables/{name}": value for name, value in tables.items()}
    expected |= {f"optimizer/{name}/momentum1": value for name, value in sums.items()}
    state = whole(model)
    assert state.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(state[name], value, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kernel", KERNELS)
def test_initial_values_equal_those_on_a_cpu(kernel: ComputeKernel) -> None:
    _, model = shard(kernel)
    collection = build_embedding_collection(sharded.TABLES, device=torch.device("cpu"))
    init_tables(collection, sharded.TABLES, sharded.SEED)
    state = whole(model)
    for name, module in collection.embeddings.items():
        torch.testing.assert_close(state[f"tables/{name}"], module.weight.detach(), rtol=0, atol=0)


@pytest.mark.parametrize("loaded", KERNELS)
@pytest.mark.parametrize("saved", ["fused", "fused_uvm_caching"])
def test_checkpoint_carries_over_between_kernels(saved: ComputeKernel, loaded: ComputeKernel, tmp_path: Path) -> None:
    _, source = shard(saved)
    train(source)
    dcp.save(sharded.state(source), checkpoint_id=tmp_path)
    _, target = shard(loaded)
    dcp.load(sharded.state(target), checkpoint_id=tmp_path)
    expected = whole(source)
    for name, value in whole(target).items():
        torch.testing.assert_close(value, expected[name], rtol=0, atol=0)
    # A cache that still held other rows would show in the next lookups.
    for after, before in zip(train(target), train(source), strict=True):
        for feature, values in before.items():
            torch.testing.assert_close(after[feature], values, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(("kernel", "tolerance"), [("fused", 0.02), ("fused_uvm_caching", 0.05)])
def test_planned_memory_is_what_is_allocated(kernel: ComputeKernel, tolerance: float) -> None:
    """Of a cached table we take TorchRec's estimate, which leaves out the cache's bookkeeping: 16 bytes a row."""
    table = TableConfig(name="item", num_embeddings=4_000_000, embedding_dim=128, features=("item",))
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    plan, model = shard(kernel, (table,))
    torch.cuda.synchronize()
    allocated = torch.cuda.memory_allocated() - before
    planned = plan.ranks[0].weight_bytes + plan.ranks[0].optimizer_bytes
    assert model is not None
    assert abs(allocated - planned) < tolerance * planned, f"planned {planned:,}, allocated {allocated:,}"
