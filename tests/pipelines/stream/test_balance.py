"""Even cost, with equal or bounded counts, from lengths alone."""

import numpy as np
import pytest

from pipelines.stream.balance import assign, default_cost, imbalance


def zipf_lens(count: int, seed: int, longest: int = 16384) -> np.ndarray:
    """Lengths with P(length) proportional to 1 / length, from 16 to `longest`."""
    draws = np.random.default_rng(seed).random(count)
    return np.exp(np.log(16) + draws * np.log(longest / 16)).astype(np.int64)


@pytest.mark.parametrize("world_size", [2, 8, 64, 512])
@pytest.mark.parametrize("mode", ["equal", "bounded"])
def test_zipf_lengths_balance_to_five_percent(world_size: int, mode: str) -> None:
    lens = zipf_lens(32 * world_size, seed=world_size)
    cost = default_cost(lens, np.zeros_like(lens))
    rank = assign(cost, world_size, mode=mode, slack=0.25)
    counts = np.bincount(rank, minlength=world_size)
    assert imbalance(cost, rank, world_size) <= 1.05
    assert counts.max() <= (32 if mode == "equal" else 40)


def test_slices_of_the_same_lengths_are_far_from_even() -> None:
    lens = zipf_lens(32 * 64, seed=64)
    cost = default_cost(lens, np.zeros_like(lens))
    assert imbalance(cost, assign(cost, 64, mode="none"), 64) > 1.5


def test_keeping_neighbours_balances_and_moves_few() -> None:
    lens = zipf_lens(64 * 16, seed=5)
    cost = default_cost(lens, np.zeros_like(lens))
    rank = assign(cost, 16, mode="equal", keep_neighbours=True)
    assert imbalance(cost, rank, 16) <= 1.05
    assert (rank == assign(cost, 16, mode="none")).mean() > 0.8
    assert set(np.bincount(rank)) == {64}


@pytest.mark.parametrize("mode", ["none", "equal", "bounded"])
@pytest.mark.parametrize("count", [0, 1, 3, 7, 50])
def test_any_count_is_assigned_with_fair_numbers(mode: str, count: int) -> None:
    rank = assign(np.random.default_rng(count).random(count), 4, mode=mode)
    counts = np.bincount(rank, minlength=4)
    assert counts.sum() == count
    assert counts.max() - counts.min() <= 1 if mode != "bounded" else counts.max() <= -(-count // 4)
