"""The fitted cost of attention: what was put in comes out, and nothing is made of noise."""

import functools

import numpy as np
import pytest

from benchmarks.cost import Measurement, fit
from pipelines.stream.balance import assign, imbalance
from trainer.models.config import ModelConfig, StageConfig
from trainer.models.flops import InputWidths, ranker_flops, training_flops
from trainer.models.layer_config import LayerConfig


def measurements(fixed_ms: float, per_dense: float, per_attention: float, noise: float = 0.0) -> list[Measurement]:
    generator = np.random.default_rng(0)
    made = []
    for history_len in (256, 1024, 4096):
        for samples in (32768 // history_len, 65536 // history_len):
            dense, attention = 1e8 * samples * history_len, 1e4 * samples * history_len**2
            step_ms = fixed_ms + per_dense * dense + per_attention * attention
            step_ms *= 1 + noise * generator.standard_normal()
            made.append(Measurement(history_len, samples, dense, attention, step_ms))
    return made


def test_fit_finds_the_costs_of_noisy_steps() -> None:
    _, _, per_dense, per_attention = fit(measurements(3.0, 1e-12, 4e-12, noise=0.003))
    assert per_attention / per_dense == pytest.approx(4.0, rel=0.1)


def test_steps_that_take_the_same_time_are_refused() -> None:
    with pytest.raises(ValueError, match="do not show what attention costs: raise --tokens"):
        fit([Measurement(1, 1, 1e9, 1e9, 5.0), Measurement(2, 1, 2e9, 2e9, 5.0), Measurement(4, 1, 4e9, 4e9, 5.0)])


def test_balance_by_the_fitted_cost_evens_out_time_where_flops_do_not() -> None:
    """Attention ten times as dear as its FLOPs, eight samples a rank; with 16 and more, either measure will do."""
    model = ModelConfig(dim=512, max_len=16500, layer=LayerConfig(), stages=(StageConfig(num_layers=2),))
    lens = np.exp(np.random.default_rng(0).uniform(np.log(64), np.log(4096), 8 * 8)).astype(np.int64)
    ones, inputs = np.ones_like(lens), InputWidths(event=9, candidate=0, context=512)
    count = functools.partial(ranker_flops, model, inputs=inputs, num_context=1, num_outputs=8)
    flops, time = (training_flops(lens, ones, flops=count, attention_cost=cost) for cost in (1.0, 10.0))
    assert imbalance(time, assign(time, 8, mode="equal"), 8) <= 1.02
    assert imbalance(time, assign(flops, 8, mode="equal"), 8) > 1.1
