"""Targets of training: `test_watched_run` ends a run at one."""

import pytest

from pipelines.reading.loader import dataset_info
from tests.support.small_data import small_dataset
from trainer.jobs.train import check_measured
from trainer.recipes import load_recipe
from trainer.resolve import resolve
from trainer.target import parse_target
from trainer.typed_values import apply_overrides


def test_a_target_is_a_metric_and_a_bound() -> None:
    rises, falls = parse_target("auc/click>=0.75"), parse_target(" ne/click <= 0.9 ")
    assert (falls.metric, falls.bound) == ("ne/click", 0.9)
    found = {"auc/click": 0.75, "ne/click": 0.91}
    assert rises.reached(found) and not falls.reached(found)
    assert not rises.reached({}) and not rises.reached({"auc/click": None}), "what is undefined is not reached"
    for text in ("auc/click", "auc/click>0.75", "auc/click>=high", ">=0.5", ""):
        with pytest.raises(ValueError, match="must be METRIC>=NUMBER or METRIC<=NUMBER"):
            parse_target(text)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["evaluation.target=auc/is_click>=0.5"], "have no effect without evaluation.every_steps"),
        (["evaluation.every_steps=2", "evaluation.target=auc"], "must be METRIC>=NUMBER"),
        (
            [
                'model.retrieval={"num_negatives":8}',
                'model.stages=[{"num_layers":1}]',
                "model.input.num_time_buckets=128",
                "evaluation.baseline=false",
            ],
            "is for rankers alone",
        ),
    ],
)
def test_settings_that_cannot_be_are_one_line(overrides: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        apply_overrides(load_recipe("kuairand_sample"), overrides)


def test_a_metric_that_is_not_measured_is_named_before_training() -> None:
    config = apply_overrides(load_recipe("kuairand_sample"), [f"data.path={small_dataset()}"])
    resolved = resolve(config, dataset_info(config.data))
    check_measured("evaluation.target", "auc/is_click", resolved)
    with pytest.raises(ValueError, match=r"target: evaluations measure ne/is_click, auc/is_click.* and not auc/clicks"):
        check_measured("evaluation.target", "auc/clicks", resolved)
