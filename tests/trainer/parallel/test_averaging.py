"""Gradients averaged over ranks: of steps that are launched and recorded alike."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed._shard.sharded_tensor import ShardedTensor

from embeddings.config import PlacementConfig, TableConstraint
from pipelines.overlap import StepPipeline
from pipelines.reading.loader import build_loader, dataset_info
from tests.support.distributed import run_ranks
from tests.trainer.labels.test_ranks import config_of, write_labels
from trainer.build import build_model, machine_of, make_plan
from trainer.parallel.averaging import GradientAverage
from trainer.parallel.mesh import Mesh
from trainer.parallelize import parallelize
from trainer.resolve import resolve
from trainer.steps.recording import record_steps


def trained(path: str, *, recorded: bool) -> dict[str, Tensor]:
    """This rank's part of the state after four steps; countries' rows are replicated, items' sharded by rows.

    The fourth batch has a single sample: one of two ranks has none.
    """
    rank, world_size = dist.get_rank(), dist.get_world_size()
    mesh = Mesh(rank=rank, world_size=world_size, local_world_size=world_size, device=torch.device("cpu"))
    types = {"item": "row_wise", "country": "replicated"}
    tables = {name: TableConstraint(sharding_types=(kind,)) for name, kind in types.items()}
    config = config_of(path)
    data = replace(config.data, max_samples=3 * config.data.global_batch_size + 1)
    config = replace(config, data=data, placement=PlacementConfig(tables=tables))
    resolved = resolve(config, dataset_info(config.data))
    plan = make_plan(resolved, machine_of(mesh))
    model = parallelize(build_model(resolved, mesh.device), plan, config, mesh)
    if recorded:
        record_steps(model, resolved.task.padding, None)
    selection = resolved.task.selection
    batches = iter(build_loader(config.data, split="train", rank=rank, world_size=world_size, selection=selection))
    pipeline = StepPipeline("plain", model.module, model.optimizers, mesh.device, model.loss)
    model.module.train()
    for step in range(1, 5):
        model.optimizers.set_step(step)
        pipeline.step(batches)
    state = {}
    for name, value in model.tensors().items():
        parts = [each.tensor for each in value.local_shards()] if isinstance(value, ShardedTensor) else [value]
        state |= {f"{name} {n}": part.clone() for n, part in enumerate(parts)}
    return state


def both(path: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    return trained(path, recorded=False), trained(path, recorded=True)


def test_recorded_steps_of_two_ranks_train_as_launched_ones_do(tmp_path: Path) -> None:
    write_labels(tmp_path / "data")
    for launched, recorded in run_ranks(2, both, str(tmp_path / "data")):
        assert launched.keys() == recorded.keys()
        for name, value in launched.items():
            torch.testing.assert_close(recorded[name], value, rtol=1e-4, atol=1e-6, msg=name)


def _average() -> list[Tensor]:
    rank = dist.get_rank()
    parameters = [nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(1, 3))]
    parameters[0].grad = torch.full((2,), float(rank))
    if rank == 1:
        parameters[1].grad = torch.ones(1, 3)
    GradientAverage(parameters, 2)()
    return [parameter.grad for parameter in parameters if parameter.grad is not None]


def test_a_rank_without_a_gradient_adds_zeros() -> None:
    for first, second in run_ranks(2, _average):
        assert first.tolist() == pytest.approx([0.5, 0.5]) and second.tolist() == [pytest.approx([0.5] * 3)]
