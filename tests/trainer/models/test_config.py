"""Model configurations that say nothing, or two things at once, are refused with the fix."""

from dataclasses import replace
from typing import Any

import pytest

from trainer.models.config import ChannelConfig, InputConfig, LayerConfig, ModelConfig, StageConfig
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
        ({"tasks": ()}, "model.tasks is empty"),
        ({"tasks": ("like", "like")}, "must not repeat an action, got like, like"),
        ({"task_weights": (1.0,)}, "needs model.tasks of the same length, got None"),
        ({"tasks": ("like",), "task_weights": (0.0,)}, r"above 0, got \(0.0,\): leave out tasks"),
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
