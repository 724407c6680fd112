"""Unbounded ids from a log's raw keys to a trained, resumed and evaluated run."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from tests.pipelines.test_prepare import prepare
from tests.support.drifting_log import write_drifting_log
from tests.support.training import losses, read_checkpoint, read_lines, train

SCHEMA = """
user = "user"
item = "item"
time = "at"
actions = ["click"]
"""
COMMON = ("data.order=stored", "data.max_history_len=8", "data.num_epochs=1")


def make(folder: Path, spaces: dict[str, str], *, events: int, alive: int, lives: int, columns: str = "") -> Path:
    """A prepared log in order of time, whose `spaces` are made as said."""
    log = folder / "log"
    if not log.exists():
        log.mkdir()
        write_drifting_log(log / "log.csv", events=events, alive=alive, lives=lives)
    schema, out = folder / "schema.toml", folder / f"data-{len(list(folder.glob('data-*')))}"
    schema.write_text(SCHEMA + columns + "".join(f"[spaces.{name}]\n{text}\n" for name, text in spaces.items()))
    options = ("--no-counts", "--order", "time", "--max-history", "8", "--no-state")
    assert prepare("event_log", log, out, "--schema", str(schema), *options) == 0
    return out


def test_goes_on_exactly_from_a_delta_and_on_other_ranks(tmp_path: Path) -> None:
    """The map, too, after evaluations, which admit nothing; one table's keys are text, and wait for a second lookup."""
    spaces = {"item": "rows = 90\nunbounded = true", "seller": "rows = 40\nunbounded = true"}
    # Most of one table is room to grow, so that deltas pay.
    columns = '[event]\nseller = "seller"\n[sample]\nfirst = { of = "shop", column = "seller" }\n'
    data = make(tmp_path, {**spaces, "shop": "rows = 50000"}, events=2500, alive=40, lives=6, columns=columns)
    tables = {
        "item": {"unbounded": {"evict_after_steps": 2}},
        "seller": {"unbounded": {"min_count": 2, "evict": "lfu"}},
    }
    settings = (
        f"data.path={data}",
        *COMMON,
        f"tables={json.dumps(tables)}",
        "max_steps=9",
        "checkpoint.every_steps=3",
        "checkpoint.keep=9",
        "checkpoint.deltas=5",
    )
    whole = tmp_path / "whole"
    expected_losses = losses(train(whole, 2, *settings, recipe="own_log"))
    expected = read_checkpoint(whole / "checkpoints" / "step-00000009")
    before = read_checkpoint(whole / "checkpoints" / "step-00000006")
    assert json.loads((whole / "checkpoints" / "step-00000006" / "manifest.json").read_text())["base"] == 3
    maps = {name for name in expected if name.startswith("ids/")}
    assert {"ids/item/keys", "ids/seller/waiting_keys"} <= maps
    # Rows pass from key to key in the steps that are taken again.
    changed = (expected["ids/item/keys"] != before["ids/item/keys"]) & (before["ids/item/keys"] != 0)
    assert changed.sum() > 10
    for ranks in (2, 3):
        again = tmp_path / f"again-{ranks}"
        shutil.copytree(whole, again)
        more = (*settings, "evaluation.every_steps=4")
        found_losses = losses(train(again, ranks, *more, recipe="own_log", options=("--from-step", "6")))
        found = read_checkpoint(again / "checkpoints" / "step-00000009")
        assert found.keys() == expected.keys()
        exact = expected.keys() if ranks == 2 else maps
        assert [name for name in exact if not torch.equal(found[name], expected[name])] == []
        for name in expected:
            torch.testing.assert_close(found[name], expected[name], rtol=1e-4, atol=1e-5)
        assert found_losses == pytest.approx(expected_losses, abs=0 if ranks == 2 else 1e-5)


def test_learns_a_drifting_catalogue_better_than_a_hash_of_as_many_rows(tmp_path: Path) -> None:
    scores = {}
    for way in ("unbounded", "hash"):
        spaces = {"item": f"rows = 128\n{way} = true"}
        data = make(tmp_path, spaces, events=12_000, alive=60, lives=10)
        settings = (f"data.path={data}", *COMMON, "sparse_optimizer.learning_rate=0.3")
        train(tmp_path / way, 1, *settings, recipe="own_log")
        scores[way] = read_lines(tmp_path / way / "eval.jsonl")[-1]["ne/click"]
    # Most of the evaluated items are new to both, as the log goes on: what is left differs by so much.
    assert scores["unbounded"] < scores["hash"] - 0.01
