"""Counts as log-odds: the baseline's score at the start, sane values for any counts."""

import math

import numpy as np
import pytest
import torch

from pipelines.counts import Counts, group_counts
from pipelines.features import ITEM_ID, ITEM_SPACE
from pipelines.selection import Feature, Selection
from trainer.models.config import ModelConfig, StageConfig
from trainer.models.ranker import RankerTower, build_ranker_tower
from trainer.models.rate_config import RATE_PRIORS, START_PRIOR
from trainer.models.rates import Rates

ACTION_RATES = (0.3, 0.02, 0.9)
TASK_BITS = (2, 0)


def make_rates(*groups: str) -> Rates:
    torch.manual_seed(0)
    counts = [group_counts(group, len(ACTION_RATES)) for group in groups]
    return Rates(counts, action_rates=ACTION_RATES, output_bits=TASK_BITS, dim=8)


def make_numbers(counts: tuple[Counts, ...], size: int, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = np.random.default_rng(seed)
    numbers = {}
    for each in counts:
        seen = generator.integers(0, 500, size)
        numbers[each.seen] = torch.tensor(seen, dtype=torch.float32)
        for name in each.taken:
            numbers[name] = torch.tensor(generator.integers(0, seen + 1), dtype=torch.float32)
    return numbers


def logit(rate: float) -> float:
    return math.log(rate / (1 - rate))


def test_an_untrained_model_adds_what_item_and_user_rates_say() -> None:
    # Wherever they stand, and whatever else is counted.
    rates = make_rates("item", "user_brand", "user", "user_item")
    numbers = make_numbers(rates.counts, size=7)
    _, logits = rates(numbers)
    for candidate in range(7):
        for task, bit in enumerate(TASK_BITS):
            overall = ACTION_RATES[bit]
            expected = 0.0
            for group in ("item", "user"):
                seen, taken = (float(numbers[f"{group}_{name}"][candidate].item()) for name in ("seen", f"taken_{bit}"))
                expected += logit((taken + START_PRIOR * overall) / (seen + START_PRIOR)) - logit(overall)
            assert logits[candidate, task].item() == pytest.approx(expected, abs=1e-4)


def test_what_was_never_seen_adds_nothing() -> None:
    rates = make_rates("item", "user")
    nothing = {name: torch.zeros(3) for each in rates.counts for name in each.columns}
    assert rates.features(nothing).abs().max() < 1e-5
    missing = {name: torch.full((3,), torch.nan) for name in nothing}
    assert torch.equal(rates.features(missing), rates.features(nothing))


def test_features_are_finite_for_counts_of_any_size() -> None:
    rates = make_rates("item")
    always = {name: torch.tensor([0.0, 1.0, 1e6, 1e9]) for each in rates.counts for name in each.columns}
    never = {name: torch.zeros(4) if "taken" in name else values for name, values in always.items()}
    for numbers in (always, never):
        features = rates.features(numbers)
        assert features.isfinite().all()
        assert features.abs().max() < 50


def test_actions_that_are_always_or_never_taken_say_nothing() -> None:
    counts = [group_counts("item", 2)]
    rates = Rates(counts, action_rates=(0.0, 1.0), output_bits=(0, 1), dim=4)
    numbers = {"item_seen": torch.tensor([0.0, 50.0]), "item_taken_0": torch.zeros(2)}
    numbers["item_taken_1"] = numbers["item_seen"]
    assert (rates.features(numbers)[:, 1:] == 0).all()


def test_more_positives_raise_every_priors_log_odds_of_that_action_alone() -> None:
    rates = make_rates("item")
    few = {"item_seen": torch.tensor([20.0])} | {f"item_taken_{bit}": torch.tensor([3.0]) for bit in range(3)}
    many = few | {"item_taken_1": torch.tensor([9.0])}
    change = (rates.features(many) - rates.features(few))[0, 1:].view(len(RATE_PRIORS), 3)
    assert (change[:, 1] > 0).all()
    assert (change[:, [0, 2]] == 0).all()


def make_tower(action_rates: tuple[float, ...] | None) -> RankerTower:
    item = Feature(name=ITEM_ID, parts=("event", "candidate"), kind="id", space=ITEM_SPACE)
    counts = (group_counts("item", len(ACTION_RATES)),)
    columns = [Feature(name=name, parts=("candidate",), kind="number", space=None) for name in counts[0].columns]
    return build_ranker_tower(
        ModelConfig(dim=8, max_len=16, stages=(StageConfig(num_layers=1),)),
        selection=Selection(features=(item, *columns), counts=counts),
        widths={ITEM_SPACE: 4},
        action_names=("a", "b", "c"),
        output_bits=(0, 1, 2, None),
        action_rates=action_rates,
    )


def test_counts_need_the_rates_to_smooth_them_with() -> None:
    with pytest.raises(ValueError, match=r"statistics.splits.train.positives\): state it, or set model.input.counts"):
        make_tower(None)


def test_the_rates_that_counts_are_smoothed_with_stay_those_of_the_training() -> None:
    trained, other_day = make_tower(ACTION_RATES), make_tower((0.5, 0.5, 0.5))
    other_day.load_state_dict(trained.state_dict())
    assert other_day.rates is not None
    assert other_day.rates.action_rates.tolist() == pytest.approx(ACTION_RATES)
