"""Overlapped steps equal plain ones: same losses, nothing lost at the end, evaluation in between changes nothing."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from embeddings.config import PlacementConfig
from pipelines.config import DataConfig
from pipelines.overlap import StepPipeline
from pipelines.reading.loader import build_loader, dataset_info
from tests.pipelines.made_up import write_dataset
from tests.support.distributed import run_ranks
from trainer.build import build_parallel, machine_of, make_plan
from trainer.config import ScheduleConfig, TrainConfig
from trainer.parallel.mesh import Mesh
from trainer.recipes import load_recipe
from trainer.resolve import resolve

SAMPLES = 85
BATCH = 12


def make_config(path: str, overlap: Any, kernel: Any = "fused") -> TrainConfig:
    """A small model on made-up data; the last of eight batches holds one sample, which leaves ranks without any."""
    recipe = load_recipe("kuairand_sample")
    data = DataConfig(
        path=path, global_batch_size=BATCH, max_history_len=24, num_epochs=1, max_samples=SAMPLES, reader_threads=1
    )
    layer = replace(recipe.model.layer, dropout=0.0, qk_dim=8, value_dim=8)
    model = replace(recipe.model, dim=16, layer=layer)
    # The recipe's rate decays to the end of a run, which nobody has settled here.
    placement = PlacementConfig(compute_kernels=(kernel,))
    recipe = replace(
        recipe, schedule=ScheduleConfig(), overlap=overlap, precision="float32", placement=placement, recorded="off"
    )
    return replace(recipe, data=data, model=model, embedding_dim=8)


def train(
    path: str, overlap: str, evaluate_every: int, device: str = "cpu", kernel: str = "fused"
) -> tuple[list[float], int]:
    """Losses of every step on this rank, and the samples of all ranks' batches that were evaluated."""
    config = make_config(path, overlap, kernel)
    resolved = resolve(config, dataset_info(config.data))
    world_size = dist.get_world_size()
    mesh = Mesh(rank=dist.get_rank(), world_size=world_size, local_world_size=world_size, device=torch.device(device))
    model = build_parallel(resolved, make_plan(resolved, machine_of(mesh)), mesh)
    share: Any = {"rank": mesh.rank, "world_size": world_size, "selection": resolved.task.selection}
    evaluated = 0

    def evaluate() -> None:
        nonlocal evaluated
        with torch.no_grad():
            for batch in build_loader(config.data, split="eval", **share):
                model.score(batch.to(mesh.device).inputs)
                evaluated += batch.global_samples

    pipeline = StepPipeline(config.overlap, model.module, model.optimizers, mesh.device, model.loss)
    batches = iter(build_loader(config.data, split="train", **share))
    losses = []
    while True:
        model.optimizers.set_step(len(losses) + 1)
        try:
            losses.append(float(pipeline.step(batches)))
        except StopIteration:
            break
        if len(losses) % evaluate_every == 0:
            pipeline.outside(evaluate)
    return losses, evaluated


def train_all(path: str, variants: list[tuple[str, int]]) -> list[tuple[list[float], int]]:
    """All variants one after another on the same processes, whose start takes longer than training."""
    return [train(path, overlap, evaluate_every) for overlap, evaluate_every in variants]


def test_overlap_and_evaluation_change_no_loss(tmp_path: Path) -> None:
    write_dataset(tmp_path / "data")
    variants = [("plain", 100), ("plain", 3), ("sparse_dist", 100), ("sparse_dist", 1), ("sparse_dist", 3)]
    steps = -(-SAMPLES // BATCH)
    for results in run_ranks(2, train_all, str(tmp_path / "data"), variants):
        reference = results[0][0]
        assert len(reference) == steps
        for (overlap, evaluate_every), (losses, evaluated) in zip(variants, results, strict=True):
            assert losses == reference, overlap
            assert evaluated == steps // evaluate_every * 23


def test_prefetch_without_a_gpu_is_refused() -> None:
    with pytest.raises(ValueError, match="overlap=prefetch needs a GPU, this run computes on cpu"):
        StepPipeline("prefetch", Any, Any, torch.device("cpu"), lambda batch: batch)  # type: ignore[arg-type, return-value]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_every_overlap_on_a_gpu_equals_plain_steps(tmp_path: Path) -> None:
    write_dataset(tmp_path / "data")
    torch.cuda.set_device(0)
    dist.init_process_group("nccl", store=dist.HashStore(), rank=0, world_size=1)
    try:
        reference, _ = train(str(tmp_path / "data"), "plain", 100, "cuda:0")
        for overlap, evaluate_every in (("plain", 3), ("sparse_dist", 100), ("sparse_dist", 3)):
            assert train(str(tmp_path / "data"), overlap, evaluate_every, "cuda:0")[0] == pytest.approx(reference, 1e-3)
        for kernel in ("fused", "fused_uvm_caching"):
            for overlap, evaluate_every in (("prefetch", 100), ("prefetch", 3), ("sparse_dist", 3)):
                losses, _ = train(str(tmp_path / "data"), overlap, evaluate_every, "cuda:0", kernel)
                assert losses == pytest.approx(reference, 1e-3), (kernel, overlap, evaluate_every)
    finally:
        dist.destroy_process_group()
