"""Every rule of the data configuration, and its message."""

from typing import Any

import pytest

from pipelines.config import DataConfig, StochasticLengthConfig, SyntheticConfig

BASE: dict[str, Any] = {"path": "data", "global_batch_size": 8, "max_history_len": 16}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"path": ""}, r"data\.path must name"),
        ({"global_batch_size": 0}, r"data\.global_batch_size must be at least 1, got 0"),
        ({"max_history_len": 0}, r"data\.max_history_len must be at least 1"),
        ({"prefetch_batches": 0}, r"data\.prefetch_batches must be at least 1"),
        ({"max_candidates": 0}, r"data\.max_candidates must be at least 1"),
        ({"global_batch_tokens": 0}, r"data\.global_batch_tokens must be at least 1"),
        ({"attention_cost": 0.0}, r"data\.attention_cost must be above 0, got 0\.0"),
        (
            {"attention_cost": 2.0, "balance": "none"},
            r"attention_cost=2\.0 has no effect with data\.balance=none",
        ),
        ({"balance_slack": -0.1}, r"data\.balance_slack must be at least 0"),
        ({"synthetic": SyntheticConfig(lag=5)}, r"data\.synthetic has no effect with data\.path=data"),
        ({"mix_paths": ("synthetic",), "mix_weights": (1.0, 1.0), "max_samples": 9}, "can only be data.path"),
        ({"mix_weights": (1.0,)}, "has no effect without"),
        ({"mix_paths": ("b",), "mix_weights": (1.0,), "max_samples": 9}, "must hold 2 numbers above 0"),
        ({"mix_paths": ("b",), "mix_weights": (1.0, 0.0), "max_samples": 9}, "must hold 2 numbers above 0"),
        ({"mix_paths": ("b",), "mix_weights": (1.0, 2.0)}, "max_samples must be set"),
    ],
)
def test_rules_of_data(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DataConfig(**{**BASE, **change})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"alpha": 1.0}, r"alpha must lie in \(1, 2\]"),
        ({"gamma": 2.5}, r"gamma must lie in \[1, 2\]"),
        ({"warmup_batches": 0}, "warmup_batches must be at least 1"),
        ({"recalibration_batches": 0}, "recalibration_batches must be at least 1"),
    ],
)
def test_rules_of_stochastic_length(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        StochasticLengthConfig(**change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_users": 0}, "num_users must be at least 1"),
        ({"min_len": 9, "max_len": 8}, "max_len must lie in"),
        ({"max_len": 70_000}, "max_len must lie in"),
        ({"noise": 1.5}, r"noise must lie in \[0, 1\]"),
        ({"item_exponent": -1.0}, "item_exponent must be at least 0"),
    ],
)
def test_rules_of_synthetic_data(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SyntheticConfig(**change)
