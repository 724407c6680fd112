"""The batches of whole steps: as many events as they say, each history with its candidate at the end."""

import numpy as np
import pytest

from benchmarks.cost import made_up_batch
from benchmarks.step import make_cases, zipf_lens
from pipelines.loader import dataset_info


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
    batch = made_up_batch(dataset_info(config.data), config, lens)
    assert batch.history_lens.tolist() == lens.tolist()
    assert batch.features["item_id"].values().numel() == batch.action.numel() == lens.sum() + len(lens)
    assert batch.features["segment"].values().numel() == len(lens)
    candidates = np.cumsum(lens + 1) - 1
    assert not batch.action.numpy()[candidates].any()
    assert batch.timestamp.numpy()[candidates].tolist() == lens.tolist()
