"""Frozen parts of a run keep every bit, with their optimizers' state, through a resume; the rest is trained."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from pipelines.reading.loader import dataset_info
from tests.support.small_data import small_dataset
from tests.support.training import losses, read_checkpoint, read_lines, train
from trainer.build import build_model
from trainer.name_patterns import matches
from trainer.recipes import load_recipe
from trainer.resolve import resolve

SAVE_ALL = ("checkpoint.keep=9", "checkpoint.every_steps=2", "nonfinite.policy=skip")
"""From the beginning on."""
PARTS = ["tables/item", "tables/u*", "dense/encoder.*"]


def states(run: Path) -> list[dict[str, Tensor]]:
    """Of every checkpoint, oldest first."""
    return [read_checkpoint(folder) for folder in sorted((run / "checkpoints").glob("step-*"))]


def is_frozen(name: str, patterns: list[str]) -> bool:
    """Whether a tensor, or state of its optimizer, is meant."""
    plain = name.replace("_optimizer/", "/", 1)
    names = {plain, plain.rpartition("/")[0]} if "_optimizer/" in name else {plain}
    return any(matches(pattern, each) for pattern in patterns for each in names)


def assert_frozen(found: list[dict[str, Tensor]], patterns: list[str]) -> None:
    stays = {name for name in found[0] if is_frozen(name, patterns)}
    for state in found[1:]:
        for name in stays:
            assert torch.equal(state[name], found[0][name]), name
    moves = {name for name in found[0] if not torch.equal(found[0][name], found[-1][name])}
    # Steps of Adam are counted for what is trained, and for nothing else.
    counted = {name for name in found[0] if name.startswith("dense_optimizer/") and name.endswith("/step")}
    assert stays
    assert counted & moves == counted - stays
    tables = {name for name in found[0] if name.startswith("tables/") and len(found[0][name]) > 5}
    assert tables & moves == tables - stays


@pytest.fixture(scope="module")
def partly_frozen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of four steps on two ranks."""
    run = tmp_path_factory.mktemp("partly") / "run"
    train(run, 2, "max_steps=4", f"frozen={json.dumps(PARTS)}", *SAVE_ALL, "checkpoint.deltas=2")
    return run


def test_frozen_parts_keep_their_bits_through_a_resume_on_two_ranks(partly_frozen: Path, tmp_path: Path) -> None:
    found = states(partly_frozen)
    assert len(found) == 3
    assert_frozen(found, PARTS)
    again = Path(shutil.copytree(partly_frozen, tmp_path / "run"))
    settings = ("max_steps=4", f"frozen={json.dumps(PARTS)}", *SAVE_ALL, "checkpoint.deltas=2")
    resumed = train(again, 2, *settings, options=("--from-step", "2"))
    assert losses(resumed) == losses(read_lines(partly_frozen / "metrics.jsonl"))
    for name, value in states(again)[-1].items():
        assert torch.equal(value, found[-1][name]), name


@pytest.mark.parametrize(("ranks", "pattern"), [(2, "dense/*"), (1, "tables/*")])
def test_a_whole_kind_of_parts_may_be_frozen(ranks: int, pattern: str, partly_frozen: Path, tmp_path: Path) -> None:
    """Of a run that has learnt: a new one's head is zero, and lets no gradient through while it stays so."""
    options = ("--init-from", str(partly_frozen), "--init-only", "tables/*", "dense/*")
    train(tmp_path / "run", ranks, "max_steps=2", f'frozen=["{pattern}"]', *SAVE_ALL, options=options)
    assert_frozen(states(tmp_path / "run"), [pattern])


@pytest.mark.parametrize(
    ("patterns", "message"),
    [
        (("tables/itm",), "frozen: 'tables/itm' is none of tables/item, .* and no dense parameter, as dense/"),
        (("tables/item", "tower.*"), r"frozen: 'tower\.\*' is none of"),
        (("tables/*", "dense/*"), "leaves nothing to train"),
        (("*",), "leaves nothing to train"),
    ],
)
def test_patterns_of_nothing_and_of_everything_are_refused(patterns: tuple[str, ...], message: str) -> None:
    recipe = load_recipe("kuairand_sample")
    config = replace(recipe, frozen=patterns, data=replace(recipe.data, path=str(small_dataset())))
    with pytest.raises(ValueError, match=message):
        build_model(resolve(config, dataset_info(config.data)), torch.device("meta"))
