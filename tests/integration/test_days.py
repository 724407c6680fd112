"""Days one after another, as MLPerf's recommender trains: each is scored before it is trained on, on two processes."""

import json
from pathlib import Path

import numpy as np
import pytest

from tests.pipelines.storage.test_gathered import made_up_events, prepare, sizes, write_yambda
from tests.support.training import read_lines, train
from trainer.recipes import load_recipe

SMALL = (
    # Smaller than a day, which then has several batches, and none of another.
    "data.global_batch_size=16",
    "data.max_history_len=12",
    "data.shuffle_run=4",
    "model.max_len=32",
    "model.head.hidden=[8]",
    "model.layer.num_heads=2",
    "data.reader_threads=0",
    "schedule.warmup_steps=0",
    "evaluation.every_steps=1000",
    "evaluation.first_step=1000",
    "evaluation.progressive=true",
)


def test_each_day_is_scored_before_it_is_trained_on(tmp_path: Path) -> None:
    source = write_yambda(tmp_path / "in", made_up_events())
    assert prepare(source, tmp_path / "data", *sizes()) == 0
    info = json.loads((tmp_path / "data" / "dataset.json").read_text())
    lines = train(tmp_path / "run", 2, *SMALL, f"data.path={tmp_path / 'data'}", recipe="dlrm_v4")
    samples = [(tmp_path / "data/train" / part / "place.bin").stat().st_size // 8 for part in info["parts"]]
    steps = np.cumsum([-(-count // 16) for count in samples]).tolist()
    assert lines[-1]["step"] == steps[-1] and lines[-1]["samples"] == sum(samples)
    # The first day is the one that nothing can be said of: no step has been taken.
    days = read_lines(tmp_path / "run" / "progressive.jsonl")
    assert [(each["part"], each["step"]) for each in days] == list(zip(info["parts"][1:], steps[:-1], strict=True))
    assert all(0 < each["auc/listen_plus"] < 1 and each["ne/listen_plus"] > 0 for each in days)
    (last,) = read_lines(tmp_path / "run" / "eval.jsonl")
    assert last["positives/listen_plus"] == info["statistics"]["splits"]["eval"]["positives"]["listen_plus"]
    assert not any("_baseline" in name for name in last), "the recipe counts none"
    plan = json.loads((tmp_path / "run" / "plan.json").read_text())
    assert len(plan["tables"]) == 11


def test_the_recipe_is_mlperfs(tmp_path: Path) -> None:
    """Figures of the reference, written out: 1,362 of each pool, .75, every 2,293,760 samples from 57,344,000 on."""
    config = load_recipe("dlrm_v4")
    batch, evaluation = config.data.global_batch_size, config.evaluation
    assert evaluation.every_steps is not None
    assert (evaluation.every_steps * batch, evaluation.first_step * batch) == (2_293_760, 57_344_000)
    assert config.data.max_history_len == 3 * 1362 and config.data.max_history_len + 8 + 1 <= config.model.max_len
    assert evaluation.target == "auc/listen_plus>=0.75"
    assert config.tables["user_x_artist"].initial_bound == pytest.approx(1e-4)
    assert sum(round(each.initial_bound**-2) for each in config.tables.values() if each.initial_bound) == 293_051_712
