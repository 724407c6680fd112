"""Ranks that were started otherwise, or that read other data, are named before anything is trained."""

import re
import shutil
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from tests.support.small_data import small_dataset
from tests.support.training import SMALL, run_trainer

DATA, OTHER, MOVED = "data.path=here", "data.path=other", "data.path=moved"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same data in two places, and as many samples in another order in a third, described by the same words."""
    folder = tmp_path_factory.mktemp("data")
    for name in ("here", "moved", "other"):
        shutil.copytree(small_dataset(), folder / name)
    file = folder / "other" / "train" / "part-00000.parquet"
    table = pq.read_table(file)
    pq.write_table(table.take(list(range(table.num_rows))[::-1]), file)
    return folder


def train(folder: Path, run: Path, ranks: int, otherwise: str) -> tuple[int, list[str]]:
    """(exit status, errors) of two steps, which the last rank was started `otherwise`."""
    settings = [f"data.path={folder}/here", *SMALL, "max_steps=2"]
    status, output = run_trainer(
        *("train", "kuairand_sample", "--run-dir", str(run), "--set", *settings),
        ranks=ranks,
        module="tests.trainer.parallel.otherwise",
        OTHERWISE=otherwise.replace("data.path=", f"data.path={folder}/"),
    )
    return status, [line for line in output.splitlines() if line.startswith("error: ")]


@pytest.mark.parametrize(
    ("otherwise", "said"),
    [
        ("schedule.kind=constant -> optimizer.learning_rate=0.1", "was started with optimizer.learning_rate=0.1, rank"),
        ("max_steps=2 -> max_steps=1", "was started with max_steps=1, rank 0 on .* with 2: give every rank the same"),
        (f"{DATA} -> {OTHER}", "reads another train split in .*/other than rank 0 on .*copy the same data set"),
    ],
)
def test_a_rank_that_was_started_otherwise_is_named(otherwise: str, said: str, folder: Path, tmp_path: Path) -> None:
    status, errors = train(folder, tmp_path, 3, otherwise)
    assert status == 1 and errors
    assert [error for error in errors if not re.match(rf"error: rank 2 on \S+ {said}", error)] == []
    assert not (tmp_path / "config.json").exists()


def test_the_same_data_may_lie_elsewhere(folder: Path, tmp_path: Path) -> None:
    status, errors = train(folder, tmp_path, 2, f"{DATA} -> {MOVED}")
    assert (status, errors) == (0, [])
