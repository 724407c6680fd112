"""Whole steps: batches have as many events as they say, and steps that train nothing have no time."""

from dataclasses import replace

import numpy as np
import pytest

from benchmarks.cost import made_up_batch
from benchmarks.step import Case, make_cases, measure, zipf_lens
from pipelines.reading.loader import dataset_info
from trainer.config import DenseOptimizerConfig
from trainer.parallel.mesh import discover_mesh, joined
from trainer.resolve import resolve


@pytest.mark.parametrize("longest", [64, 4096])
def test_zipf_lengths_add_up_and_short_ones_are_common(longest: int) -> None:
    lens = zipf_lens(longest, 32 * longest)
    assert lens.sum() == 32 * longest
    assert lens.min() >= 1
    assert lens.max() <= longest
    assert np.median(lens) < longest / 2


def test_a_made_up_batch_has_histories_of_the_lengths_asked_for() -> None:
    config = make_cases(small=True)["HSTU"].config
    lens = np.array([3, 40, 1])
    batch = made_up_batch(resolve(config, dataset_info(config.data)), lens)
    inputs = batch.inputs
    assert inputs.history_lens.tolist() == lens.tolist()
    assert len(inputs.ids_host("item_id")) == inputs.timestamp.numel() == lens.sum() + len(lens)
    assert len(inputs.ids_host("sample.segment")) == len(lens)
    assert inputs.action.numel() == lens.sum()
    assert inputs.timestamp[lens.sum() :].tolist() == lens.tolist()


def test_steps_whose_numbers_are_not_finite_are_not_timed() -> None:
    """As a learning rate makes them after which no product is a number."""
    config = make_cases(small=True)["HSTU"].config
    spoilt = replace(config, optimizer=DenseOptimizerConfig(learning_rate=1e38))
    with joined(mesh := discover_mesh()), pytest.raises(FloatingPointError, match="nan is the"):
        measure(Case(spoilt, np.array([3, 40, 1])), mesh, steps=2)
