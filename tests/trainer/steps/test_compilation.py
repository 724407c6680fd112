"""The pass that compiles a step's kernels comes before the first step in training, and leaves no trace in it."""

from dataclasses import replace

import torch
from torch import Tensor

from tests.support.batches import random_batch
from tests.trainer.models import test_ranker
from trainer.models.model import Model
from trainer.steps.compilation import compile_before_first_step

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def step(model: Model, seed: int) -> list[Tensor]:
    """Loss and gradients of a batch, what has been summed up so far, and what is drawn next."""
    batch = random_batch([5, 0, 9], [2, 3, 1], context_names=test_ranker.CONTEXT, seed=seed).to(DEVICE)
    torch.manual_seed(seed)
    model.zero_grad()
    with torch.autocast(DEVICE.type, torch.bfloat16, enabled=DEVICE.type == "cuda"):
        loss = model(batch)
    if model.training:
        loss.backward()
    gradients = [x.grad.to_dense().clone() for x in model.parameters() if x.grad is not None]
    sums = [x.clone() for x in model.objective.buffers()]
    return [loss.detach(), *gradients, *sums, torch.rand(3, device=DEVICE), torch.rand(3)]


def test_steps_are_the_same_and_only_the_first_in_training_is_passed_twice() -> None:
    config = test_ranker.CONFIGS["paper"]
    config = replace(config, layer=replace(config.layer, dropout=0.3))
    plain, compiled = (test_ranker.small_ranker(config).to(DEVICE) for _ in range(2))
    compiled.load_state_dict(plain.state_dict())
    compile_before_first_step(compiled)
    passes: list[bool] = []
    compiled.tower.register_forward_hook(lambda *_: passes.append(torch.is_grad_enabled()))
    for training, seed, expected in ((False, 1, 1), (True, 1, 2), (True, 2, 1), (False, 2, 1)):
        passes.clear()
        with torch.set_grad_enabled(training):
            found = [step(model.train(training), seed) for model in (plain, compiled)]
        assert all(torch.equal(x, y) for x, y in zip(*found, strict=True))
        assert len(passes) == expected
