"""Histories shared by several ranks: the same outputs, gradients and runs as of ranks that share nothing."""

from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from tests.support.batches import random_batch
from tests.support.distributed import run_ranks
from tests.support.training import losses, read_checkpoint, train
from tests.trainer.models.test_ranker import CONFIGS, CONTEXT, LAYER, model_config, small_ranker
from trainer.config import TrainConfig
from trainer.models.config import ModelConfig
from trainer.parallel.context_parallel import SharedTower, share_histories
from trainer.parallel.mesh import Mesh, discover_mesh
from trainer.recipes import load_recipe

HEADS = replace(LAYER, num_heads=4)
KEPT = replace(HEADS, recompute_normed=False, recompute_uvqk=False, recompute_gated=False)
MODELS = {
    "paper": model_config(layer=HEADS),
    "nothing rebuilt": model_config(layer=KEPT),
    "production": model_config(layer=replace(HEADS, variant="production", norm="group")),
    "columns": replace(CONFIGS["columns"], layer=HEADS),
    "interleaved, stochastic depth": replace(CONFIGS["interleaved"], layer=replace(HEADS, stochastic_depth=0.5)),
}
BATCHES = [([5, 0, 9], [2, 3, 1]), ([4, 2], [1, 0]), ([0], [1]), ([0, 0], [0, 0])]
"""History lengths and candidates; of the last ones, some or all ranks have no tokens."""

Found = dict[str, list[tuple[Tensor, dict[str, Tensor]]]]
"""By model and batch: outputs and this rank's gradients."""


def steps(config: ModelConfig, sharing: int) -> list[tuple[Tensor, dict[str, Tensor]]]:
    """What this rank computes of every batch.  Ranks that share a batch have the same one."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    mesh = Mesh(
        rank=rank, world_size=world_size, local_world_size=world_size, device=torch.device("cpu"), sharing=sharing
    )
    model = small_ranker(config)
    share_histories(model, mesh)
    assert any(isinstance(module, SharedTower) for module in model.modules()) == (sharing > 1)
    model.train()
    found = []
    for seed, (histories, candidates) in enumerate(BATCHES):
        batch = random_batch(histories, candidates, context_names=CONTEXT, seed=10 * seed + mesh.data_rank)
        model.zero_grad()
        torch.manual_seed(seed)
        embedded = model.tables(batch.inputs.features)
        outputs = model.tower(embedded, batch.inputs)
        model.loss(outputs, embedded, batch).backward()
        gradients = {name: x.grad.to_dense().clone() for name, x in model.named_parameters() if x.grad is not None}
        found.append((outputs.detach(), gradients))
    return found


def all_steps(*sharing: int) -> dict[int, Found]:
    """By number of sharing ranks."""
    return {ranks: {name: steps(config, ranks) for name, config in MODELS.items()} for ranks in sharing}


def test_shared_histories_have_the_outputs_and_gradients_of_whole_ones() -> None:
    """Four ranks share one batch, or two and two a batch; the average over ranks is that of ranks with whole ones."""
    plain, shared = run_ranks(2, all_steps, 1), run_ranks(4, all_steps, 2, 4)
    for ranks in (2, 4):
        for name, index in product(MODELS, range(len(BATCHES))):
            alone = [found[1][name][index] for found in plain[: 4 // ranks]]
            together = [found[ranks][name][index] for found in shared]
            for rank, (outputs, _) in enumerate(together):
                torch.testing.assert_close(outputs, alone[rank // ranks][0], rtol=1e-5, atol=1e-6)
            averages = [
                {key: torch.stack([gradients[key] for _, gradients in found]).mean(0) for key in found[0][1]}
                for found in (alone, together)
            ]
            assert averages[0].keys() == averages[1].keys()
            for key, average in averages[0].items():
                torch.testing.assert_close(averages[1][key], average, rtol=1e-4, atol=1e-6)


def test_a_run_goes_on_with_shared_histories_and_without(tmp_path: Path) -> None:
    """Steps 1 and 2 on one rank, 3 and 4 on four that share two batches' histories; another run never shares."""
    common = ("checkpoint.every_steps=2", "model.layer.num_heads=2")
    expected = train(tmp_path / "plain", 2, "max_steps=4", *common)
    train(tmp_path / "run", 1, "max_steps=2", *common)
    lines = train(tmp_path / "run", 4, "max_steps=4", "context_parallel=2", *common)
    assert losses(lines) == pytest.approx(losses(expected), rel=1e-5)
    one, other = (read_checkpoint(tmp_path / name / "checkpoints" / "step-00000004") for name in ("plain", "run"))
    assert one.keys() == other.keys()
    for name, value in one.items():
        torch.testing.assert_close(other[name], value, rtol=1e-5, atol=1e-6, msg=name)


def shared_demo(sharing: int, heads: int) -> TrainConfig:
    config = load_recipe("kuairand_sample")
    layer = replace(config.model.layer, num_heads=heads)
    return replace(config, model=replace(config.model, layer=layer), context_parallel=sharing)


def test_heads_that_cannot_be_shared_are_refused() -> None:
    assert shared_demo(2, 4).context_parallel == 2
    with pytest.raises(ValueError, match=r"context_parallel=3 shares the heads of a layer, which are 4: choose"):
        shared_demo(3, 4)
    with pytest.raises(ValueError, match="context_parallel must be at least 1, got 0"):
        shared_demo(0, 4)


def test_processes_that_are_no_multiple_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(ValueError, match=r"context_parallel=2 ranks share their samples, but the job has 3: start"):
        discover_mesh(2)
