"""Bags of ids: all ids, none longer than a warp, as many bags a feature."""

import numpy as np
import pytest

from pipelines.batches.packed import BAG_IDS, bag_lens


@pytest.mark.parametrize("counts", [[0], [1, 0], [BAG_IDS], [3, BAG_IDS + 1, 0], [16, 16 * 16384]])
def test_bags_hold_all_ids_and_none_is_long(counts: list[int]) -> None:
    lens = bag_lens(counts).reshape(len(counts), -1)
    assert lens.sum(1).tolist() == counts
    assert lens.max() <= BAG_IDS
    assert lens.shape[1] == max(1, -(-max(counts) // BAG_IDS))
    assert (np.diff(lens) <= 0).all()
