"""Plans for machines that are not here, and a run under a plan from a file."""

import json
from pathlib import Path

import pytest

from tests.support.training import SMALL, losses, run_trainer, train
from trainer.command_line import run_command
from trainer.commands import app


def _plan(out: Path, *arguments: str) -> int:
    return run_command(app, ["plan", "kuairand_sample", "--out", str(out), *arguments])


def test_recipe_is_planned_for_64_gpus_without_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "plan.json"
    assert _plan(out, "--world-size", "64", "--local-world-size", "8", "--hbm-gib", "80") == 0
    text = capsys.readouterr().out
    assert "\n  item " in text and "memory of each rank" in text and str(out) in text
    tables = json.loads(out.read_text())["tables"]
    for table in tables.values():
        assert all(0 <= rank < 64 for rank in table["ranks"])


def test_tables_that_cannot_fit_are_refused_with_a_fix(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "plan.json"
    assert _plan(out, "--world-size", "2", "--hbm-gib", "0.002", "--set", "embedding_dim=512") == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    assert not out.exists()


def test_training_follows_a_plan_file_and_refuses_one_for_other_ranks(tmp_path: Path) -> None:
    two, four = tmp_path / "two.json", tmp_path / "four.json"
    small = [f"--set={override}" for override in SMALL]
    row_wise = '--set=placement.sharding_types=["row_wise"]'
    assert _plan(two, "--world-size", "2", row_wise, *small) == 0
    assert _plan(four, "--world-size", "4", *small) == 0
    # The last step is logged though it is no multiple of log_every.
    planned = train(tmp_path / "planned", 2, "max_steps=3", "log_every=2", plan=two)
    # Every step's imbalance of the two ranks, also of those that are not logged.
    assert [len(line["imbalance_by_step"]) for line in planned] == [2, 1]
    for line in planned:
        assert min(line["imbalance_by_step"]) >= 1
        assert line["imbalance"] == pytest.approx(sum(line["imbalance_by_step"]) / len(line["imbalance_by_step"]))
    assert [line["step"] for line in planned] == [2, 3]
    in_force = json.loads((tmp_path / "planned" / "plan.json").read_text())
    assert {table["sharding_type"] for table in in_force["tables"].values()} == {"row_wise"}
    unplanned = losses(train(tmp_path / "unplanned", 2, "max_steps=3"))
    assert losses(planned) == pytest.approx({step: unplanned[step] for step in (2, 3)}, rel=1e-5)

    refused = ("--run-dir", str(tmp_path / "run"), "--plan", str(four), *small)
    status, output = run_trainer("train", "kuairand_sample", *refused)
    assert status == 2 and "made for 4 ranks, but this job has 1" in output
    assert not (tmp_path / "run").exists()
