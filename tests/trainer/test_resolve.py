"""From a configuration and a data set to what follows from them: lengths that do not fit are refused at once."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from embeddings.config import ExchangeConfig, TableConstraint
from pipelines.features import DatasetInfo, SplitInfo, parse_dataset_info
from tests.support.datasets import made_up_info
from trainer.build import build_model
from trainer.config import TrainConfig
from trainer.labels.config import LabelConfig
from trainer.models.config import ChannelConfig, StageConfig
from trainer.recipes import load_recipe
from trainer.resolve import Resolved, make_task, resolve, resolve_again

SWIPES = ChannelConfig(name="swipes", dim=16, stages=(StageConfig(num_layers=1),), actions=("swipe",))
COUNTED = {"splits": {"train": {"num_candidates": {"q100": 9}}, "eval": {"num_candidates": {"q100": 100}}}}
INFO = made_up_info(
    num_items=9,
    context={"country": 3},
    actions=("click",),
    splits={
        "train": SplitInfo(samples=10, history_events=200, candidates=41),
        "eval": SplitInfo(samples=4, history_events=80, candidates=10),
    },
)


def test_a_later_delivery_may_bring_more_candidates() -> None:
    later = {"splits": {"train": {"num_candidates": {"q100": 120}}}}
    info = replace(INFO, details={"statistics": COUNTED, "deliveries": {"part=00001": {"statistics": later}}})
    assert resolve(load_recipe("own_log"), info).most_candidates == 120


@pytest.mark.parametrize(
    ("counted", "max_candidates", "expected"),
    [
        (COUNTED, None, 100),
        (COUNTED, 20, 20),
        (COUNTED, 200, 100),
        ({}, None, 5),
        ({}, 3, 3),
    ],
)
def test_candidates_are_bounded_by_what_the_data_says(
    counted: dict[str, Any], max_candidates: int | None, expected: int
) -> None:
    recipe = load_recipe("kuairand_sample")
    config = replace(recipe, data=replace(recipe.data, max_candidates=max_candidates))
    resolved = resolve(config, replace(INFO, details={"statistics": counted}))
    assert resolved.most_candidates == expected


@pytest.mark.parametrize(("positives", "how_often"), [(0, "never"), (41, "always")])
def test_an_action_without_two_outcomes_is_refused_with_the_ways_on(positives: int, how_often: str) -> None:
    def info(positives: int) -> DatasetInfo:
        return replace(INFO, details={"statistics": {"splits": {"train": {"positives": {"click": positives}}}}})

    ranker = load_recipe("kuairand_sample")
    make_task(ranker, info(40)).check_training_data()
    make_task(ranker, INFO).check_training_data()
    make_task(load_recipe("kuairand_retrieval"), info(positives)).check_training_data()
    with pytest.raises(ValueError, match=rf"'click' is {how_often} taken .* add impressions .* or train retrieval"):
        make_task(ranker, info(positives)).check_training_data()


def test_data_without_candidates_is_for_retrieval_alone() -> None:
    sizes = SplitInfo(samples=10, history_events=200, candidates=0)
    info = replace(INFO, splits={"train": sizes, "eval": sizes})
    make_task(load_recipe("kuairand_retrieval"), info).check_training_data()
    with pytest.raises(ValueError, match=r"holds no candidates, so no labels: add impressions .* or train retrieval"):
        make_task(load_recipe("kuairand_sample"), info).check_training_data()


def test_next_item_data_is_for_retrieval_alone() -> None:
    by_place = replace(INFO, cut="by_place")
    resolve(load_recipe("kuairand_retrieval"), by_place)
    with pytest.raises(ValueError, match="made up is next-item data, cut by place"):
        resolve(load_recipe("kuairand_sample"), by_place)


@pytest.mark.parametrize(("merge", "longest"), [("add", 1 + 96 + 100), ("interleave", 1 + 2 * 96 + 100)])
def test_lengths_beyond_the_models_are_refused_before_the_start(merge: Any, longest: int) -> None:
    recipe = load_recipe("kuairand_sample")
    info = replace(INFO, details={"statistics": COUNTED})
    model = replace(recipe.model, input=replace(recipe.model.input, merge=merge), max_len=longest)
    resolve(replace(recipe, model=model), info)
    with pytest.raises(
        ValueError, match=f"below the {longest} tokens.* or lower data.max_history_len or data.max_cand"
    ):
        resolve(replace(recipe, model=replace(model, max_len=longest - 1)), info)


@pytest.mark.parametrize(
    ("recipe", "merge", "expected"),
    [
        ("kuairand_sample", "add", [5 + 2 + 1, 0 + 3 + 1]),
        ("kuairand_sample", "interleave", [10 + 2 + 1, 0 + 3 + 1]),
        ("kuairand_retrieval", "add", [5 + 2, 0 + 3]),
    ],
)
def test_tokens_are_counted_as_the_model_makes_them(recipe: str, merge: Any, expected: list[int]) -> None:
    config = load_recipe(recipe)
    config = replace(config, model=replace(config.model, input=replace(config.model.input, merge=merge), max_len=8192))
    assert resolve(config, INFO).token_count(np.array([5, 0]), np.array([2, 3])).tolist() == expected


def test_initial_values_follow_from_the_seed_and_leave_the_generator_alone() -> None:
    resolved = resolve(load_recipe("kuairand_sample"), INFO)
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first = build_model(resolved, torch.device("cpu")).tower.state_dict()
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(3)
    again = build_model(resolved, torch.device("cpu")).tower.state_dict()
    other = build_model(resolve(replace(resolved.config, seed=1), INFO), torch.device("cpu")).tower.state_dict()
    assert all(torch.equal(value, again[name]) for name, value in first.items())
    assert any(not torch.equal(value, other[name]) for name, value in first.items())


@pytest.mark.parametrize("changes", [{"labels": (LabelConfig(name="swipe"),)}, {"channels": (SWIPES,), "stages": ()}])
def test_an_action_that_the_data_lack_is_refused(changes: dict[str, Any]) -> None:
    recipe = load_recipe("kuairand_sample")
    with pytest.raises(ValueError, match="swipe"):
        resolve(replace(recipe, model=replace(recipe.model, **changes)), INFO)


BAGS = {
    "event": {"item_id": "item", "query": ["word"]},
    "item": {"words": ["word"], "colours": ["colour"], "colour": "shade", "shades": ["shade"]},
    "sample": {"interests": ["interest"]},
}


@pytest.mark.parametrize(
    ("table", "exchange", "message"),
    [
        (
            "word",
            {},
            r"of item.words, query|of query, item.words|query, item.words are columns of event and of event\+candidate",
        ),
        ("shade", {}, "'item.colour' reads single ones"),
        ("colour", {"rows": "float16"}, "sends sums in full"),
        ("item", {}, "'item_id' reads single ones"),
    ],
)
def test_what_cannot_be_pooled_is_refused(table: str, exchange: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=rf"placement.tables.{table}.pooled .*{message}"):
        resolve(with_bags({table: TableConstraint(pooled=True)}, ExchangeConfig(**exchange)), bags())


def test_pooled_tables_of_the_same_rows_are_looked_up_together() -> None:
    constraint = TableConstraint(pooled=True)
    found = resolve(with_bags({"colour": constraint, "interest": constraint}, ExchangeConfig()), bags())
    assert {table.name: table.pooled for table in found.tables if table.pooled} == {
        "colour": "event+candidate",
        "interest": "sample",
    }


def bags() -> DatasetInfo:
    """Data with columns of many ids."""
    values = INFO.as_dict()
    names = ("word", "colour", "shade", "interest")
    values["spaces"] |= {name: {"rows": 5} for name in names}
    for part, columns in BAGS.items():
        values[part] = values.get(part, {}) | columns
    return parse_dataset_info(values, "made up")


def with_bags(tables: dict[str, TableConstraint], exchange: ExchangeConfig) -> TrainConfig:
    recipe = load_recipe("kuairand_sample")
    return replace(recipe, placement=replace(recipe.placement, tables=tables, exchange=exchange))


LOGGED = parse_dataset_info(
    {
        **made_up_info(num_items=9, context={"country": 3}, actions=("click",)).as_dict(),
        "spaces": {"item": {"rows": 9, "used": 9, "digest": "a"}, "tag": {"rows": 16, "used": 16, "hash": "xxh64"}},
        "sample": {},
        "event": {"item_id": "item", "dwell_s": "number"},
        "candidate": {"item_id": "item", "tags": ["tag"]},
        "label": {"watched_s": "number"},
    },
    "dataset.json",
)
PREDICTS = (LabelConfig(name="watched_s", kind="regression"),)


def again(**changes: Any) -> Resolved:
    """What follows for a model that was trained on `LOGGED`, from data whose description was changed so."""
    recipe = load_recipe("own_log")
    config = replace(recipe, model=replace(recipe.model, labels=PREDICTS))
    other = parse_dataset_info({**LOGGED.as_dict(), **changes}, "dataset.json")
    return resolve_again(config, other, resolve(config, LOGGED).meanings(), Path("runs/a"))[0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"event": {"item_id": "item"}},
            r"lacks event.dwell_s \(number\), which the run of runs/a was trained on: prepare it",
        ),
        (
            {"event": {**LOGGED.as_dict()["event"], "price": "number"}},
            r"data/own_log has event.price \(number\), which the run of runs/a was not trained on",
        ),
        (
            {"candidate": {"item_id": "item", "tags": "tag"}},
            r"lacks candidate.tags \(ids of tag, 16 rows\), .* and has candidate.tags \(id of tag, 16 rows\), ",
        ),
        (
            {"spaces": {**LOGGED.as_dict()["spaces"], "tag": {"rows": 32, "used": 32, "hash": "xxh64"}}},
            r"lacks candidate.tags \(ids of tag, 16 rows\)",
        ),
        (
            {"spaces": {**LOGGED.as_dict()["spaces"], "item": {"rows": 9, "used": 9, "digest": "b"}}},
            r"ids of the space 'item' mean something else",
        ),
        ({"actions": ["like"]}, r"the actions of data/own_log are like, but .*: a model knows them by their places"),
        (
            {"event": dict(reversed(LOGGED.as_dict()["event"].items()))},
            r"column 1 of those .* is event.dwell_s \(number\) in .*: a model knows columns by their places",
        ),
    ],
)
def test_data_of_which_another_model_would_be_made_are_refused_by_name(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        again(**changes)


def test_a_trained_model_keeps_the_measure_of_its_numbers() -> None:
    def known(mean: float) -> dict[str, Any]:
        numbers = {"count": 9, "missing": 0, "mean": mean, "std": 2.0, "quantiles": [0.0, mean, 2 * mean]}
        return {"numbers": {"label.watched_s": numbers}}

    recipe = load_recipe("own_log")
    config = replace(recipe, model=replace(recipe.model, labels=PREDICTS))
    yesterday, today = (parse_dataset_info({**LOGGED.as_dict(), **known(mean)}, "x") for mean in (5.0, 50.0))
    meanings = resolve(config, yesterday).meanings()
    resolved, _ = resolve_again(config, today, meanings, Path("runs/a"))
    [label] = resolved.task.labels.kinds
    assert label.predict(torch.zeros(1, 1)).item() == 5.0
    assert resolved.meanings() == meanings
