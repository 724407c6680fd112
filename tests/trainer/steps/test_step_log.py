"""What is counted of a step, and what is not."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.support.batches import NUM_ACTIONS, NUM_ITEMS, batch_of, random_arrays
from tests.support.datasets import made_up_info
from trainer.checkpoint.progress import Progress
from trainer.checkpoint.restoring import Restart
from trainer.models.config import ChannelConfig, ModelConfig, StageConfig
from trainer.models.flops import InputWidths, ranker_flops
from trainer.parallel.mesh import Mesh
from trainer.recipes import load_recipe
from trainer.resolve import resolve
from trainer.run.run_dir import RunDir
from trainer.steps.feed import describe
from trainer.steps.optim import GradientNorms
from trainer.steps.step_log import StepLog, _Interval

ACTIONS = tuple(f"action_{index}" for index in range(NUM_ACTIONS))
NORMS = GradientNorms((), torch.ones(1))
INFO = made_up_info(num_items=NUM_ITEMS, actions=ACTIONS, numbers=("play_s",))


def test_flops_of_a_mixture_count_the_events_that_each_channel_sees() -> None:
    stages = (StageConfig(num_layers=1),)
    channels = (
        ChannelConfig(name="clicks", dim=16, stages=stages, actions=("action_1",)),
        ChannelConfig(name="watched", dim=16, stages=stages, side="play_s"),
        ChannelConfig(name="all", dim=16, stages=stages),
    )
    recipe = load_recipe("kuairand_sample")
    model = ModelConfig(dim=16, max_len=128, channels=channels)
    config = replace(recipe, model=model)
    histories, candidates = [6, 0, 9], [1, 3, 2]
    resolved, interval = resolve(config, INFO), _Interval()
    expected = 0.0
    for seed in (0, 1):
        arrays = random_arrays(histories, candidates, seed=seed)
        interval.add(describe(batch_of(arrays), resolved), (torch.tensor(0.5), NORMS))
        rows = (slice(0, 6), slice(6, 6), slice(6, 15))
        seen = {
            "clicks": np.array([int((arrays["action"][own] >> 1 & 1).sum()) for own in rows]),
            "watched": np.array([int((arrays["number/play_s"][own].nan_to_num() != 0).sum()) for own in rows]),
        }
        assert 0 < seen["clicks"].sum() < sum(histories)
        count = ranker_flops(
            model,
            np.array(histories),
            np.array(candidates),
            # Items; a number, whether it is known, its one bucket and that of what is missing; "something happened" and
            # the actions.
            inputs=InputWidths(event=32 + 2 + 2 + 1 + NUM_ACTIONS, candidate=32, context=0),
            num_context=0,
            num_outputs=NUM_ACTIONS,
            channel_history_lens=seen,
        )
        expected += count.training.sum()
    assert interval.flops(resolved) == expected


def test_saving_and_evaluating_take_no_time_of_the_steps(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    now = [100.0]
    monkeypatch.setattr("trainer.steps.step_log.time.perf_counter", lambda: now[0])
    mesh = Mesh(rank=1, world_size=2, local_world_size=2, device=torch.device("cpu"))
    resolved = resolve(load_recipe("kuairand_sample"), INFO)
    step_log = StepLog(
        RunDir(tmp_path),
        mesh,
        Restart(progress=Progress(), saved=None, evaluated=False, losses={}),
        resolved,
        total_samples=None,
    )
    now[0] += 5.0
    with step_log.paused():
        now[0] += 60.0
    assert now[0] - step_log._interval.start == 5.0


def test_steps_are_known_by_number_and_samples_though_batches_between_them_were_left_out() -> None:
    interval = _Interval()
    arrays = random_arrays([3, 2], [1, 1], seed=0)
    consumed = describe(batch_of(arrays), resolve(load_recipe("kuairand_sample"), INFO))
    outcome = (torch.tensor(0.5), NORMS)
    for samples, left_out in ((10, False), (20, True), (30, False)):
        interval.add(replace(consumed, samples=samples), None if left_out else outcome)
    assert interval.steps_taken(Progress(step=8, samples=160)) == [(6, 100, 109), (8, 130, 159)]
    assert len(interval.outcomes) == 2 and interval.took_last
