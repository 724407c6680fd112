"""Labels together: weights, keep rates, missing labels; calibration after the negatives were thinned; ranks alike."""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from pipelines.features import DatasetInfo
from tests.trainer.labels.test_kinds import info
from trainer.labels.config import LabelConfig
from trainer.labels.loss import RankingLoss, build_ranking_loss

KEPT = {"count": 100, "missing": 0, "mean": 0.5, "std": 0.4, "quantiles": [0.1, 0.1, 1.0]}


def weighted(**changes: Any) -> DatasetInfo:
    """The shop with sold as weight and dwell as keep rate."""
    return replace(info(dwell=KEPT), weight="sold", keep_rate="dwell", **changes)


def batch(actions: torch.Tensor, *, denominator: float = 1.0, **values: torch.Tensor) -> Any:
    labels = SimpleNamespace(action=actions, values=values, loss_denominator=torch.tensor(denominator))
    return SimpleNamespace(inputs=SimpleNamespace(padded=False), labels=labels)


def test_the_loss_is_the_weighted_mean_over_labels_of_weighted_sums_over_candidates() -> None:
    configs = (LabelConfig(name="view", weight=3.0), LabelConfig(name="click"))
    loss = build_ranking_loss(configs, weighted())
    outputs, actions = torch.randn(4, 2), torch.tensor([0b01, 0b11, 0b10, 0b00])
    weight, kept = torch.tensor([1.0, 0.5, 2.0, 0.0]), torch.tensor([1.0, 1.0, 0.5, 0.1])
    found = loss(outputs, None, batch(actions, denominator=4.0, sold=weight.double(), dwell=kept.double()))
    expected = 0.0
    for bit, share in ((0, 0.75), (1, 0.25)):
        p = torch.sigmoid(outputs[:, bit])
        y = actions >> bit & 1
        cross = -(y * p.log() + (1 - y) * (1 - p).log())
        expected += share * float((weight / kept * cross).sum()) / 4
    assert float(found) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("mode", ["weight", "shift"])
def test_thinned_negatives_leave_predictions_calibrated(mode: Any) -> None:
    """Labels of a known rate a group, negatives kept with a probability a group: the logit learned is the group's."""
    generator = np.random.default_rng(0)
    group = generator.integers(0, 3, 60_000)
    rates, keep = np.array([0.05, 0.2, 0.5])[group], np.array([0.1, 0.3, 0.9])[group]
    positive = generator.random(len(group)) < rates
    kept = positive | (generator.random(len(group)) < keep)
    # A candidate's own rate for weights; that of negatives for shifts.
    rate = np.where(positive & (mode == "weight"), 1.0, keep)[kept]
    loss = build_ranking_loss((LabelConfig(name="view", keep_rate=mode),), replace(weighted(), weight=None))
    made = batch(
        torch.from_numpy(positive[kept].astype(np.int64)), denominator=kept.sum(), dwell=torch.from_numpy(rate)
    )
    logits = torch.zeros(3, 1, requires_grad=True)
    optimizer = torch.optim.LBFGS([logits], max_iter=100)
    rows = torch.from_numpy(group[kept])

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        value: torch.Tensor = loss(logits[rows], None, made)
        value.backward()
        return value

    for _ in range(5):
        optimizer.step(closure)
    learned = torch.sigmoid(logits.detach()[:, 0]).numpy()
    truth = [positive[group == each].mean() for each in range(3)]
    assert learned == pytest.approx(truth, abs=0.01)
    evidence, weights = loss.evidence(logits.detach()[rows], made.labels)
    found = loss.kinds[0].measure(evidence[0], weights[:, 0].double(), torch.zeros(len(rows)))
    assert found["calibration"] == pytest.approx(1.0, abs=0.02)
    ignored = build_ranking_loss((LabelConfig(name="view", keep_rate="ignore"),), weighted())
    assert set(ignored.keep_rates) == {"ignore"}


def test_a_batch_without_candidates_gives_zero_loss_and_zero_gradients() -> None:
    configs = (
        LabelConfig(name="view"),
        LabelConfig(name="dwell", kind="regression"),
        LabelConfig(name="dwell", kind="ordered"),
        LabelConfig(name="reason", kind="classes"),
    )
    loss = build_ranking_loss(configs, info())
    outputs = torch.zeros(0, loss.num_outputs, requires_grad=True)
    empty = torch.zeros(0)
    value = loss(outputs, None, batch(empty.int(), dwell=empty.double(), reason=empty.long()))
    value.backward()
    assert value.item() == 0 and outputs.grad is not None


def test_each_label_has_its_own_outputs() -> None:
    configs = (LabelConfig(name="reason", kind="classes"), LabelConfig(name="click"))
    loss = build_ranking_loss(configs, info())
    assert isinstance(loss, RankingLoss) and loss.num_outputs == 4
    assert [part.shape for part in loss.outputs(torch.zeros(5, 4))] == [(5, 3), (5, 1)]
    assert loss.start().tolist() == pytest.approx([0, 0, 0, np.log(0.2 / 0.8)], rel=1e-4)


@pytest.mark.parametrize(
    ("role", "quantiles", "missing", "message"),
    [
        ("keep_rate", [0.0, 0.5, 1.0], 0, "keep_rate column 'dwell' must hold a number above 0 and at most 1"),
        ("keep_rate", [0.1, 1.5], 0, "it goes from 0.1 to 1.5"),
        ("keep_rate", [0.1, 1.0], 3, "and 3 are missing"),
        ("weight", [-1.0, 1.0], 0, "weight column 'dwell' must hold a number at least 0"),
    ],
)
def test_weights_and_keep_rates_that_cannot_be_are_refused(
    role: str, quantiles: list[float], missing: int, message: str
) -> None:
    known = info(dwell=KEPT | {"quantiles": quantiles, "missing": missing})
    with pytest.raises(ValueError, match=message):
        build_ranking_loss(None, replace(known, **{role: "dwell"}))


def test_a_keep_rate_without_a_column_is_refused() -> None:
    with pytest.raises(ValueError, match="keep_rate=shift of 'view' has no effect, shop names no column"):
        build_ranking_loss((LabelConfig(name="view", keep_rate="shift"),), info())
