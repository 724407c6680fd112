"""Stochastic length against its formula, and the load-balanced form by simulation at 512 ranks."""

import json
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from pipelines.config import DataConfig, StochasticLengthConfig, SyntheticConfig
from pipelines.storage.columns import Lengths
from pipelines.stream.global_batches import BatchPlan, GlobalBatches
from pipelines.stream.order import SampleOrder
from pipelines.stream.position import position_from_dict
from pipelines.stream.randomness import random_uniform
from pipelines.stream.stochastic_length import balanced_lens, choose_events, cut_len, keep_probability, load, plain_lens
from pipelines.synthetic import synthetic_info


def draws(count: int, *key: int) -> np.ndarray:
    return random_uniform(key, np.arange(count))


@pytest.mark.parametrize(("longest", "tokens"), [(3072, 1110), (8192, 2600), (16384, 4400)])
def test_full_histories_shrink_to_the_papers_averages(longest: int, tokens: int) -> None:
    lens = np.full(200_000, longest)
    kept = plain_lens(lens, draws(len(lens), 1), longest, 1.7)
    assert kept.mean() == pytest.approx(tokens, rel=0.04)
    assert set(np.unique(kept)) == {cut_len(longest, 1.7), longest}


def test_keep_probability_is_the_papers() -> None:
    assert keep_probability(np.array([10, 100, 200, 400]), 400, 1.5).tolist() == pytest.approx([1, 0.8, 0.2, 0.05])


def test_alpha_two_keeps_everything() -> None:
    lens = np.arange(1, 1000)
    assert (plain_lens(lens, draws(999, 2), 1000, 2.0) == lens).all()


def simulate(
    per_rank: int, longest: int, gamma: float, ranks: int = 512, steps: int = 10
) -> tuple[float, float, float]:
    """Algorithm 1 with a fixed division over ranks: imbalance of plain and balanced, and the ratio of their tokens."""
    config = StochasticLengthConfig(mode="load_balanced", gamma=gamma, scope="rank")
    group = np.repeat(np.arange(ranks), per_rank)
    generator = np.random.default_rng(per_rank)
    budget, loads, tokens, worst = 0.0, [], np.zeros(2), []
    for step in range(3 * steps):
        lens = np.clip(generator.lognormal(np.log(longest / 4), 1.0, len(group)), 1, longest).astype(np.int64)
        lens[generator.random(len(group)) < 0.3] = longest
        plain = plain_lens(lens, draws(len(lens), 3, step), longest, config.alpha)
        cost = np.bincount(group, weights=load(plain, gamma))
        loads.append(cost.mean())
        if step % steps == 0 and step:
            budget = float(np.mean(loads))
            loads = []
        if not budget:
            continue
        kept = balanced_lens(lens, draws(len(lens), 4, step), group, budget, max_history_len=longest, config=config)
        balanced = np.bincount(group, weights=load(kept, gamma))
        worst.append((cost.max() / cost.mean(), balanced.max() / balanced.mean()))
        tokens += (plain.sum(), kept.sum())
    plain_worst, balanced_worst = np.mean(worst, axis=0)
    return plain_worst, balanced_worst, tokens[1] / tokens[0]


@pytest.mark.parametrize(("per_rank", "longest", "gamma"), [(32, 3072, 1.5), (128, 3072, 1.5), (64, 16384, 1.3)])
def test_load_balance_at_512_ranks(per_rank: int, longest: int, gamma: float) -> None:
    plain, balanced, tokens = simulate(per_rank, longest, gamma)
    assert balanced <= 1.05
    assert plain > 1.2
    assert abs(tokens - 1) <= 0.03


@pytest.mark.parametrize("selection", ["uniform", "age_weighted"])
def test_chosen_events_are_distinct_in_order_and_reproducible(selection: str) -> None:
    config = StochasticLengthConfig(mode="plain", selection=selection)
    chosen = np.concatenate([choose_events(500, 100, config, (seed,)) for seed in range(200)]).reshape(200, 100)
    assert (np.diff(chosen, axis=1) > 0).all()
    assert (choose_events(500, 100, config, (7,)) == chosen[7]).all()
    mean = {"uniform": 249.5, "age_weighted": 326}[selection]
    assert chosen.mean() == pytest.approx(mean, rel=0.03)


RANKS, PER_RANK, LONGEST, GAMMA, WARM_UP = 512, 32, 3072, 1.5, 4


def batches_of_512_ranks(mode: Any) -> GlobalBatches:
    """The stream that a run plans, its imbalance counted in the paper's load; every rank has a fixed slice."""
    rows = np.full(512, 64)
    generator = np.random.default_rng(0)
    lens = np.clip(generator.lognormal(np.log(LONGEST / 4), 1.0, rows.sum()), 1, LONGEST).astype(np.int64)
    lens[generator.random(len(lens)) < 0.3] = LONGEST
    lengths = Lengths(history=lens, candidates=np.zeros_like(lens))
    source: Any = SimpleNamespace(
        unit_rows=rows,
        unit_file=np.zeros(len(rows), np.int64),
        file_lengths=lambda file: lengths,
        info=synthetic_info(SyntheticConfig()),
    )
    config = DataConfig(
        path="lengths",
        global_batch_size=RANKS * PER_RANK,
        max_history_len=LONGEST,
        num_epochs=6,
        balance="none",
        stochastic_length=StochasticLengthConfig(
            mode=mode, gamma=GAMMA, scope="rank", warmup_batches=WARM_UP, recalibration_batches=2
        ),
    )
    order = SampleOrder(source, (0, 0), shuffled=True, window_samples=16384, run=1)
    return GlobalBatches(
        config, [order], split="train", rank=0, world_size=RANKS, cost=lambda history, _: load(history, GAMMA)
    )


def test_the_planned_stream_of_512_ranks_is_balanced_from_the_end_of_warm_up_and_resumes_so() -> None:
    plain = list(batches_of_512_ranks("plain").plans())
    balanced = list(batches_of_512_ranks("load_balanced").plans())
    assert [plan.imbalance for plan in balanced[:WARM_UP]] == [plan.imbalance for plan in plain[:WARM_UP]]
    assert min(plan.imbalance for plan in plain) > 1.4
    assert max(plan.imbalance for plan in balanced[WARM_UP:]) <= 1.05
    tokens = [sum(plan.global_tokens for plan in plans[WARM_UP:]) for plans in (plain, balanced)]
    assert abs(tokens[1] / tokens[0] - 1) <= 0.03

    def content(plans: list[BatchPlan]) -> list[tuple[Any, ...]]:
        return [(plan.position, plan.samples.sample.tolist(), plan.history.tolist()) for plan in plans]

    for stop in (2, WARM_UP, WARM_UP + 3):
        position = position_from_dict(json.loads(json.dumps(balanced[stop - 1].position.as_dict())))
        assert content(list(batches_of_512_ranks("load_balanced").plans(position))) == content(balanced[stop:])
