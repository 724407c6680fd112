"""A run's memory and time become the activations and the dense time of the same model on other ranks."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from embeddings.planning.plan_file import parse_plan
from embeddings.planning.problem import GIB
from pipelines.reading.loader import dataset_info
from trainer.command_line import WrongUse
from trainer.config import TrainConfig
from trainer.dense_cost import dense_cost
from trainer.jobs.plan import plan_job
from trainer.recipes import load_recipe
from trainer.resolve import Resolved, resolve
from trainer.run.run_dir import RunDir
from trainer.typed_values import apply_overrides, to_dict

ACTIVATIONS, DENSE_MS = 3.25, 40.0


def of(config: TrainConfig) -> Resolved:
    """The run that a configuration makes."""
    return resolve(config, dataset_info(config.data))


@pytest.fixture
def config() -> TrainConfig:
    """A recipe on the data that come along."""
    return apply_overrides(load_recipe("kuairand_sample"), ["data.global_batch_size=64"])


@pytest.fixture
def run(config: TrainConfig, tmp_path: Path) -> Path:
    """What a run of 4 GPUs leaves, whose memory and time are known sums."""
    directory = RunDir(tmp_path)
    directory.config_file.write_text(json.dumps(to_dict(config)))
    plan_job(config, world_size=4, local_world_size=4, hbm_gib=80.0, host_gib=None, out=directory.plan_file)
    plan = parse_plan(directory.plan_file)
    held = (plan.ranks[0].memory_bytes + plan.reservation.dense_bytes) / GIB
    records = [
        {"step": step, "world_size": 4, "step_ms": plan.step_ms + ms, "peak_gib": held + gib}
        for step, ms, gib in ((10, 900.0, 3.0), (20, DENSE_MS, ACTIVATIONS), (30, DENSE_MS, ACTIVATIONS))
    ]
    directory.metrics_file.write_text("".join(json.dumps(record) + "\n" for record in records))
    return tmp_path


@pytest.mark.parametrize("world_size", [2, 4, 16])
def test_memory_and_time_follow_a_ranks_share_of_the_batch(config: TrainConfig, run: Path, world_size: int) -> None:
    cost = dense_cost(run, of(config), world_size)
    assert cost.activation_gib == pytest.approx(ACTIVATIONS * 4 / world_size)
    assert cost.step_ms == pytest.approx(DENSE_MS * 4 / world_size)


def test_longer_histories_take_more_time_than_memory(config: TrainConfig, run: Path) -> None:
    longer = of(config)
    train = longer.info.splits["train"]
    splits = {**longer.info.splits, "train": replace(train, history_events=train.history_events * 2)}
    config = replace(config, data=replace(config.data, max_history_len=10 * config.data.max_history_len))
    longer = replace(longer, config=config, info=replace(longer.info, splits=splits))
    cost = dense_cost(run, longer, 4)
    assert 1 < cost.activation_gib / ACTIVATIONS < cost.step_ms / DENSE_MS < 4


def test_plan_counts_the_activations_and_predicts_the_step(
    config: TrainConfig, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = run / "other.json"
    plan_job(config, world_size=8, local_world_size=8, hbm_gib=80.0, host_gib=None, out=out, like=run)
    plan = parse_plan(out)
    assert plan.reservation.activation_bytes == pytest.approx(ACTIVATIONS / 2 * GIB, rel=0.01)
    said = capsys.readouterr().out
    assert f"{plan.step_ms + DENSE_MS / 2:.3g} ms = " in said and "placement.activation_gib=1.6" in said


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda run: run.metrics_file.write_text('{"step": 1, "step_ms": 2.0}\n'), "logged no peak_gib"),
        (lambda run: run.plan_file.unlink(), r"holds no plan\.json"),
        (lambda run: run.metrics_file.write_text('{"step": 1, "step_ms": 2.0, "peak_gib": 0.0}\n'), "peaked at 0.00"),
    ],
)
def test_what_is_no_such_run_is_refused(config: TrainConfig, run: Path, change: object, message: str) -> None:
    assert callable(change)
    change(RunDir(run))
    with pytest.raises(WrongUse, match=message):
        dense_cost(run, of(config), 4)


def test_a_run_of_another_model_is_refused(config: TrainConfig, run: Path) -> None:
    other = apply_overrides(config, ["model.max_len=4096"])
    with pytest.raises(WrongUse, match=r"trained another model, with model.max_len="):
        dense_cost(run, of(other), 4)
