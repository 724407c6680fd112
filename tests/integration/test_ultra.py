"""The recipe of the whole ULTRA-HSTU model, made small, trains and is evaluated on a CPU."""

import json
from pathlib import Path

from benchmarks.tower import CASES
from tests.support.training import read_lines, train
from trainer.recipes import load_recipe

# Windows and truncation that cut histories of 24 events, and lengths that stochastic length cuts.
STAGES = [
    {"num_layers": 2, "local": 4, "global_rows": 4},
    {"num_layers": 3, "local": 4, "global_rows": 4, "keep_newest": 8},
]
PASSES = 3
OVERRIDES = (
    f"data.num_epochs={PASSES}",
    "data.global_batch_size=30",
    f"model.stages={json.dumps(STAGES)}",
    "data.stochastic_length.warmup_batches=1",
    "data.stochastic_length.recalibration_batches=1",
    "schedule.warmup_steps=0",
    "optimizer.learning_rate=0.01",
    "sparse_optimizer.learning_rate=0.05",
)


def test_small_ultra_learns_and_is_evaluated(tmp_path: Path) -> None:
    lines = train(tmp_path, 1, *OVERRIDES, recipe="yambda_ultra")
    (evaluation,) = read_lines(tmp_path / "eval.jsonl")
    steps = len(lines) // PASSES
    first, last = (sum(line["loss"] for line in part) / steps for part in (lines[:steps], lines[-steps:]))
    assert last < 0.95 * first
    assert evaluation["ne/is_click"] > 0
    saved = json.loads((tmp_path / "config.json").read_text())
    assert [stage["keep_newest"] for stage in saved["model"]["stages"]] == [None, 8]


def test_channels_and_columns_are_set_from_the_command_line(tmp_path: Path) -> None:
    """The forms that docs/models.md shows; channels without a layer of their own take `model.layer`."""
    channels = [
        {"name": "clicks", "dim": 8, "actions": ["is_click"], "stages": [{"num_layers": 1}]},
        {"name": "all", "dim": 16, "stages": STAGES},
    ]
    lines = train(
        tmp_path,
        1,
        f"model.channels={json.dumps(channels)}",
        "model.stages=[]",
        'model.input.event=["item_id","watch_time_ms"]',
        'model.input.numbers={"watch_time_ms":{"thresholds":[3000,10000]}}',
        "max_steps=2",
    )
    assert [line["step"] for line in lines] == [1, 2]


def test_the_recipes_tower_is_the_measured_one() -> None:
    """docs/speed.md gives the speed of this tower."""
    (ultra,) = (case for name, case in CASES.items() if name.startswith("ULTRA"))
    assert load_recipe("yambda_ultra").model.stages == ultra.stages
