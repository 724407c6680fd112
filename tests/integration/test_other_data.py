"""A trained run beside data that came later: scored on it where ids mean the same, refused with both digests else."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from tests.support.small_data import small_dataset
from tests.support.training import read_lines, run_trainer, run_training, train
from trainer.run.run_dir import RunDir


def data_like_the_runs(folder: Path, **item: Any) -> Path:
    """A copy of the small data set, whose space of items is changed so."""
    return described_otherwise(folder, lambda description: description["spaces"]["item"].update(item))


def described_otherwise(folder: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    """A copy of the small data set with a description that was changed."""
    shutil.copytree(small_dataset(), folder)
    description = json.loads((folder / "dataset.json").read_text())
    change(description)
    (folder / "dataset.json").write_text(json.dumps(description))
    return folder


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("other") / "run"
    train(folder, 1, "max_steps=2")
    return folder


def evaluations(run_dir: Path, data: Path) -> list[dict[str, Any]]:
    return read_lines(RunDir(run_dir).eval_file_of(str(data)))


def test_yesterdays_model_scores_todays_data_whatever_the_last_folder_is_called(run_dir: Path, tmp_path: Path) -> None:
    for day in ("monday", "tuesday"):
        (tmp_path / day).mkdir()
        today = data_like_the_runs(tmp_path / day / "prepared")
        status, output = run_trainer("evaluate", str(run_dir), "--set", f"data.path={today}")
        assert status == 0 and f"evaluation at step 2 on {today}:" in output.splitlines()
        assert "keeps the line" not in output
        assert evaluations(run_dir, today) == read_lines(run_dir / "eval.jsonl")


def test_samples_that_were_written_anew_between_two_starts_are_told(run_dir: Path, tmp_path: Path) -> None:
    """Of as many samples in another order some come twice and others never; the same ones may lie elsewhere."""
    run, told = tmp_path / "run", "were written anew since this run last read them"
    shutil.copytree(run_dir, run)
    moved = data_like_the_runs(tmp_path / "moved")
    status, output = run_training(run, 1, "max_steps=3", f"data.path={moved}")
    assert status == 0 and told not in output
    file = moved / "train" / "part-00000.parquet"
    table = pq.read_table(file)
    pq.write_table(table.take(list(range(table.num_rows))[::-1]), file)
    for steps, is_told in ((4, True), (5, False)):
        status, output = run_training(run, 1, f"max_steps={steps}", f"data.path={moved}")
        assert status == 0 and (told in output) == is_told


def test_renumbered_items_are_refused_with_both_digests(run_dir: Path, tmp_path: Path) -> None:
    digest = json.loads((small_dataset() / "dataset.json").read_text())["spaces"]["item"]["digest"]
    assert json.loads((run_dir / "config.json").read_text())["vocabularies"]["item"] == digest
    renumbered = data_like_the_runs(tmp_path / "renumbered", digest="0123456789abcdef")
    for status, output in (
        run_trainer("evaluate", str(run_dir), "--set", f"data.path={renumbered}"),
        run_training(run_dir, 1, "max_steps=3", f"data.path={renumbered}"),
    ):
        assert status != 0
        line = output.splitlines()[-1]
        assert "ids of the space 'item' mean something else" in line
        assert "0123456789abcdef" in line
        assert digest in line


def test_numbers_of_other_data_are_measured_as_in_training(run_dir: Path, tmp_path: Path) -> None:
    """With fewer quantiles the model itself would have other buckets, and other parameters."""

    def rougher(description: dict[str, Any]) -> None:
        for known in description["numbers"].values():
            known.update(mean=0.0, std=7.0, quantiles=known["quantiles"][::40])

    today = described_otherwise(tmp_path / "rough", rougher)
    assert run_trainer("evaluate", str(run_dir), "--set", f"data.path={today}")[0] == 0
    assert evaluations(run_dir, today) == read_lines(run_dir / "eval.jsonl")


def test_an_evaluation_cannot_change_the_model(run_dir: Path) -> None:
    status, output = run_trainer("evaluate", str(run_dir), "--set", "model.dim=32")
    assert status == 2
    assert "--set model.dim=32 would make another model of it" in output.splitlines()[-1]
