"""Model configurations that say nothing, or two things at once, are refused with the fix."""

from dataclasses import replace
from typing import Any

import pytest

from trainer.labels.config import LabelConfig
from trainer.models.config import ChannelConfig, InputConfig, ModelConfig, StageConfig
from trainer.models.layer_config import LayerConfig
from trainer.models.retrieval_config import RetrievalConfig
from trainer.recipes import load_recipe

ONE = (StageConfig(num_layers=1),)
MODEL = ModelConfig(dim=16, max_len=32, stages=ONE)
CHANNEL = ChannelConfig(name="clicks", dim=16, stages=ONE)
CHANNELS: dict[str, Any] = {"stages": (), "channels": (CHANNEL,)}
GROWING = (StageConfig(num_layers=1, keep_newest=4), StageConfig(num_layers=1, keep_newest=4))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"stages": ()}, "0 stages and 0 channels: give either"),
        ({"channels": (CHANNEL,)}, "1 stages and 1 channels: give either"),
        (CHANNELS | {"channels": (CHANNEL, CHANNEL)}, "must have different names, got clicks, clicks"),
        (CHANNELS | {"input": InputConfig(merge="interleave")}, "use merge=add"),
        (
            {"stages": (), "channels": (replace(CHANNEL, layer=LayerConfig()),), "layer": LayerConfig(dropout=0.1)},
            "model.layer has no effect, every one of model.channels has its own",
        ),
        ({"stages": GROWING}, "model.stages: keep_newest=4 has no effect behind a stage that keeps 4"),
        (CHANNELS | {"channels": (replace(CHANNEL, stages=GROWING),)}, "stages of channel 'clicks': keep_newest=4"),
        (
            {"layer": LayerConfig(variant="softmax"), "stages": (StageConfig(num_layers=1, local=2),)},
            "layer.variant=softmax takes no stages.local",
        ),
        (
            {"layer": LayerConfig(variant="target_attention"), "stages": (StageConfig(num_layers=2),)},
            "target_attention has one layer: set stages.num_layers to 1",
        ),
        (
            {"layer": LayerConfig(variant="last_event"), "retrieval": RetrievalConfig()},
            "layer.variant=last_event is for rankers alone",
        ),
        ({"labels": ()}, "model.labels is empty"),
        ({"labels": (LabelConfig(name="like"), LabelConfig(name="like"))}, "must not repeat a name, got like, like"),
    ],
)
def test_settings_that_contradict_or_have_no_effect_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(MODEL, **changes)


def test_a_learned_action_of_interleaved_candidates_is_refused() -> None:
    """No token would hold it."""
    with pytest.raises(ValueError, match="use candidate_action=zero"):
        InputConfig(merge="interleave", candidate_action="learned")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "a.b"}, "name 'a.b' must be letters, digits and underscores"),
        ({"name": ""}, "name '' must be letters"),
        ({"actions": ("like", "click", "like")}, "'clicks' must not repeat one, got like, click, like"),
        ({"stages": ()}, "'clicks' has no stages"),
    ],
)
def test_a_channel_that_cannot_be_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(CHANNEL, **changes)


@pytest.mark.parametrize("changes", [{"layer": LayerConfig(fp8=True)}, None])
def test_fp8_beside_float32_is_refused(changes: dict[str, Any] | None) -> None:
    recipe = load_recipe("kuairand_sample")
    channel = replace(CHANNEL, layer=LayerConfig(fp8=True))
    model = replace(MODEL, **(changes or {"stages": (), "channels": (channel,)}))
    assert replace(recipe, model=model).precision == "bfloat16"
    with pytest.raises(ValueError, match="set precision=bfloat16, or fp8=false"):
        replace(recipe, model=model, precision="float32")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"weight": 0.0}, "weight of 'dwell' must be above 0, got 0.0: leave out"),
        ({"huber": 1.0}, "huber of 'dwell' has no effect on kind=binary, only on regression"),
        ({"kind": "regression", "thresholds": (1.0,)}, "thresholds of 'dwell' has no effect on kind=regression"),
        ({"kind": "regression", "keep_rate": "shift"}, "keep_rate=shift of 'dwell' needs kind=binary"),
        ({"kind": "regression", "huber": 0.0}, "huber of 'dwell' must be above 0"),
        ({"kind": "ordered", "thresholds": (2.0, 1.0)}, r"must rise, got \(2.0, 1.0\)"),
        ({"kind": "ordered", "thresholds": (1.0,), "buckets": 4}, "buckets of 'dwell' has no effect with thresholds"),
        ({"kind": "ordered", "buckets": 1}, "buckets of 'dwell' must be at least 2"),
    ],
)
def test_settings_that_a_label_cannot_have_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LabelConfig(name="dwell", **settings)
