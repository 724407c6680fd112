"""Each kind of label: targets, loss, prediction and metrics against definitions written out here."""

import math
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from pipelines.features import DatasetInfo, parse_dataset_info
from trainer.labels.binary import action_rates
from trainer.labels.build import build_labels
from trainer.labels.config import LabelConfig
from trainer.labels.kind import LabelKind
from trainer.labels.ordered import Ordered

DWELL = {"count": 90, "missing": 10, "mean": 20.0, "std": 15.0, "quantiles": [0.0, 5.0, 10.0, 40.0, 80.0]}
SOLD = {"count": 100, "missing": 0, "mean": 0.25, "std": 0.43, "quantiles": [0.0, 0.0, 0.0, 1.0]}


def info(**numbers: dict[str, Any]) -> DatasetInfo:
    """Labels: dwell and sold are numbers, reason has three classes; `numbers` replace what is known of them."""
    known = {"dwell": DWELL, "sold": SOLD} | numbers
    values = {
        "format_version": 2,
        "name": "shop",
        "spaces": {"item": {"rows": 9}, "reason": {"rows": 4}},
        "event": {"item_id": "item"},
        "candidate": {"item_id": "item"},
        "label": {"dwell": "number", "sold": "number", "reason": "reason"},
        "numbers": {f"label.{name}": each for name, each in known.items() if each},
        "actions": ["view", "click"],
        "splits": {"train": {"samples": 10, "history_events": 50, "candidates": 100}},
        "source": "",
        "licence": "",
        "statistics": {"splits": {"train": {"positives": {"view": 90, "click": 20}}}},
    }
    return parse_dataset_info(values, "shop")


def test_rates_of_a_first_part_are_measured_by_its_own_candidates() -> None:
    """The others' candidates are counted elsewhere: with them every action would look rarer than it is."""
    first = info()
    counted = {"candidates": 40, "positives": {"view": 30, "click": 10}}
    several = replace(first, parts=(".", "part=00001"), details={"statistics": {"splits": {"train": counted}}})
    assert action_rates(several) == {"view": 0.75, "click": 0.25}
    assert action_rates(first) == {"view": 0.9, "click": 0.2}


def labels(**values: Tensor) -> Any:
    return SimpleNamespace(action=torch.tensor([0b01, 0b11, 0b10, 0b00]), values=values)


def build(name: str, **settings: Any) -> LabelKind:
    return build_labels((LabelConfig(name=name, **settings),), info())[0]


def _kind(kind: LabelKind) -> Ordered:
    assert isinstance(kind, Ordered)
    return kind


NAN = float("nan")
NUMBERS = labels(
    dwell=torch.tensor([3.0, NAN, 30.0, 99.0]).double(),
    sold=torch.tensor([1.0, 0.0, NAN, 1.0]).double(),
    reason=torch.tensor([1, 0, 3, 2]),
)
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "action": ("click", {}),
    "binary column": ("sold", {}),
    "regression": ("dwell", {"kind": "regression"}),
    "regression of logarithms": ("dwell", {"kind": "regression", "transform": "log", "huber": 0.5}),
    "ordered": ("dwell", {"kind": "ordered", "buckets": 4}),
    "ordered by thresholds": ("dwell", {"kind": "ordered", "thresholds": (1.0, 20.0, 200.0)}),
    "classes": ("reason", {"kind": "classes"}),
}


@pytest.mark.parametrize("case", KINDS)
def test_what_is_not_known_adds_nothing_and_gets_no_gradient(case: str) -> None:
    name, settings = KINDS[case]
    kind = build(name, **settings)
    targets = kind.targets(NUMBERS)
    outputs = torch.randn(4, kind.num_outputs, requires_grad=True)
    losses = kind.loss(outputs, targets)
    losses.sum().backward()
    unknown = targets.isnan()
    assert unknown.sum() == (0 if case == "action" else 1)
    assert outputs.grad is not None and losses.isfinite().all()
    assert (losses[unknown] == 0).all() and (losses[~unknown] > 0).all()
    assert not outputs.grad[unknown].any() and outputs.grad[~unknown].any(1).all()
    assert kind.evidence(outputs.detach(), targets)[:, -1].isnan().equal(unknown)


@pytest.mark.parametrize("case", KINDS)
def test_learning_one_label_leads_to_its_true_values(case: str) -> None:
    """Gradient descent on the outputs themselves: the loss is smallest where the prediction is the truth."""
    name, settings = KINDS[case]
    kind = build(name, **settings)
    targets = kind.targets(NUMBERS)
    known = ~targets.isnan()
    outputs = torch.zeros(4, kind.num_outputs, requires_grad=True)
    optimizer = torch.optim.Adam([outputs], lr=0.3)
    for _ in range(400):
        optimizer.zero_grad()
        kind.loss(outputs, targets).sum().backward()
        optimizer.step()
    predicted = kind.predict(outputs.detach())[known]
    if case == "classes":
        assert predicted.argmax(1).tolist() == [0, 2, 1] and predicted.max(1).values.min() > 0.9
    elif case.startswith("ordered"):
        values = _kind(kind).values
        bucket = (targets[known][:, None] >= _kind(kind).thresholds).sum(1)
        torch.testing.assert_close(predicted, values[bucket], rtol=0.02, atol=0.5)
    else:
        torch.testing.assert_close(predicted, targets[known].double(), rtol=0.02, atol=0.02)


def test_actions_are_read_from_their_bits() -> None:
    assert build("view").targets(NUMBERS).tolist() == [1, 1, 0, 0]
    assert build("click").targets(NUMBERS).tolist() == [0, 1, 1, 0]


@pytest.mark.parametrize(("name", "rate"), [("click", 0.2), ("sold", 0.25)])
def test_an_untrained_binary_label_predicts_its_rate(name: str, rate: float) -> None:
    kind = build(name)
    assert kind.predict(kind.start()[None]).item() == pytest.approx(rate, rel=1e-4)


def test_untrained_numbers_predict_what_the_training_split_says() -> None:
    mean = build("dwell", kind="regression")
    assert mean.predict(mean.start()[None]).item() == pytest.approx(20.0)
    ordered = build("dwell", kind="ordered", buckets=64)
    # The mean of the distribution that the quantiles describe.
    assert ordered.predict(ordered.start()[None]).item() == pytest.approx((2.5 + 7.5 + 25 + 60) / 4, rel=0.01)
    logarithms = build("dwell", kind="regression", transform="log")
    expected = math.expm1(sum(math.log1p(value) for value in DWELL["quantiles"]) / 5)
    assert logarithms.predict(logarithms.start()[None]).item() == pytest.approx(expected)


def test_the_loss_of_a_number_is_hubers_in_units_of_its_spread() -> None:
    kind = build("dwell", kind="regression", huber=0.5)
    outputs = torch.tensor([[0.2], [0.0], [0.3], [-1.0]])
    losses = kind.loss(outputs, kind.targets(NUMBERS)).tolist()
    for loss, output, value in zip(losses, outputs[:, 0].tolist(), (3.0, None, 30.0, 99.0), strict=True):
        if value is None:
            continue
        error = abs(output - (value - 20.0) / 15.0)
        assert loss == pytest.approx(0.5 * error**2 if error <= 0.5 else 0.5 * (error - 0.25), rel=1e-5)


def test_thresholds_by_default_cut_the_training_split_into_equal_parts() -> None:
    kind = build("dwell", kind="ordered", buckets=4)
    assert _kind(kind).thresholds.tolist() == [5.0, 10.0, 40.0]
    assert _kind(kind).rates == pytest.approx([0.75, 0.5, 0.25], abs=1e-3)
    assert _kind(kind).values.tolist() == pytest.approx([2.5, 7.5, 25.0, 60.0], rel=1e-2)


def measured(kind: LabelKind, outputs: Tensor, weights: Tensor) -> dict[str, float]:
    evidence = kind.evidence(outputs, kind.targets(NUMBERS))
    known = ~evidence[:, -1].isnan()
    return kind.measure(evidence[known], weights[known].double(), torch.arange(4)[known])


def test_metrics_of_numbers_are_weighted_errors() -> None:
    kind = build("dwell", kind="regression")
    found = measured(kind, torch.tensor([[0.0], [9.0], [1.0], [2.0]]), torch.tensor([1.0, 5.0, 2.0, 1.0]))
    errors = [20.0 - 3, 35.0 - 30, 50.0 - 99]
    assert found["mae"] == pytest.approx(sum(w * abs(e) for w, e in zip((1, 2, 1), errors, strict=True)) / 4)
    assert found["rmse"] == pytest.approx(math.sqrt(sum(w * e**2 for w, e in zip((1, 2, 1), errors, strict=True)) / 4))
    assert found["calibration"] == pytest.approx((20 + 2 * 35 + 50) / (3 + 2 * 30 + 99))


def test_metrics_of_classes_are_weighted_log_loss_and_hits() -> None:
    kind = build("reason", kind="classes")
    outputs = torch.tensor([[2.0, 0.0, 0.0], [0.0, 0.0, 9.0], [1.0, 1.0, 1.0], [0.0, 3.0, 1.0]])
    weights = (1.0, 2.0, 3.0)
    found = measured(kind, outputs, torch.tensor([1.0, 7.0, 2.0, 3.0]))
    logs = [torch.log_softmax(outputs[row], 0)[place].item() for row, place in ((0, 0), (2, 2), (3, 1))]
    log_loss = -sum(w * each for w, each in zip(weights, logs, strict=True)) / 6
    entropy = -sum(w / 6 * math.log(w / 6) for w in weights)
    assert found["log_loss"] == pytest.approx(log_loss, rel=1e-5)
    assert found["ne"] == pytest.approx(log_loss / entropy, rel=1e-5)
    # Equal outputs are no hit.
    assert found["accuracy"] == pytest.approx((1 + 3) / 6)


def test_calibration_and_ne_of_a_binary_label_are_weighted() -> None:
    kind = build("sold")
    outputs, weights = torch.tensor([[1.0], [-1.0], [5.0], [0.5]]), torch.tensor([1.0, 4.0, 9.0, 2.0])
    found = measured(kind, outputs, weights)
    p = [1 / (1 + math.exp(-each)) for each in (1.0, -1.0, 0.5)]
    rate = 3 / 7
    cross = -(math.log(p[0]) + 4 * math.log(1 - p[1]) + 2 * math.log(p[2])) / 7
    assert found["ne"] == pytest.approx(cross / -(rate * math.log(rate) + (1 - rate) * math.log(1 - rate)), rel=1e-5)
    assert found["calibration"] == pytest.approx((p[0] + 4 * p[1] + 2 * p[2]) / 3, rel=1e-5)


@pytest.mark.parametrize(
    ("config", "numbers", "message"),
    [
        (LabelConfig(name="buy"), {}, "kind=binary of 'buy', which shop does not have; label columns: dwell, sold"),
        (LabelConfig(name="click", kind="regression"), {}, "kind=regression of 'click', which shop does not have"),
        (LabelConfig(name="reason", kind="regression"), {}, "'reason' does not fit, the column holds ids"),
        (LabelConfig(name="dwell", kind="classes"), {}, "'dwell' does not fit, the column holds numbers"),
        (LabelConfig(name="dwell"), {}, "'dwell' is of kind binary, but holds numbers from 0 to 80: use kind=reg"),
        (LabelConfig(name="dwell", kind="ordered"), {"dwell": {}}, "needs the quantiles of the training split"),
        (LabelConfig(name="dwell", kind="ordered"), {"dwell": DWELL | {"quantiles": [4.0, 4.0]}}, "has one value"),
    ],
)
def test_labels_that_the_data_do_not_serve_are_refused(
    config: LabelConfig, numbers: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        build_labels((config,), info(**numbers))
