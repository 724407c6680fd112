"""Unbounded ids from a log's raw keys to a trained, resumed and evaluated run."""

import csv
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file, save_file

from benchmarks.made_up.drifting_log import write_drifting_log
from embeddings.lookups.key_map import SHARED_ROW, UNKNOWN_KEY
from pipelines.storage.dataset_json import read_dataset_info
from pipelines.storage.keys import read_keys
from tests.pipelines.prepare.test_prepare import prepare
from tests.support.training import losses, read_checkpoint, read_lines, run_trainer, run_training, train
from trainer.scorer import open_scorer

SCHEMA = """
user = "user"
item = "item"
time = "at"
actions = ["click"]
"""
COMMON = ("data.order=stored", "data.max_history_len=8", "data.num_epochs=1")


def make(
    folder: Path,
    spaces: dict[str, str],
    *,
    events: int,
    alive: int,
    lives: int,
    columns: str = "",
    more: tuple[str, ...] = (),
) -> Path:
    """A prepared log in order of time, whose `spaces` are made as said."""
    log = folder / "log"
    if not log.exists():
        log.mkdir()
        write_drifting_log(log / "log.csv", events=events, alive=alive, lives=lives)
    schema, out = folder / "schema.toml", folder / f"data-{len(list(folder.glob('data-*')))}"
    schema.write_text(SCHEMA + columns + "".join(f"[spaces.{name}]\n{text}\n" for name, text in spaces.items()))
    options = ("--no-counts", "--order", "time", "--max-history", "8", "--no-state", *more)
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


@pytest.fixture(scope="module")
def learnt(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(a log of few events of many items, a run over it whose table has room for all items of its training split)."""
    folder = tmp_path_factory.mktemp("learnt")
    data = make(folder, {"item": "rows = 500\nunbounded = true"}, events=1500, alive=40, lives=4)
    train(folder / "run", 2, f"data.path={data}", *COMMON, recipe="own_log")
    return data, folder / "run"


def newest(run: Path) -> dict[str, torch.Tensor]:
    return read_checkpoint(max((run / "checkpoints").glob("step-*")))


def samples(data: Path, split: str) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for file in sorted((data / split).glob("*.parquet")):
        rows += pq.read_table(file).to_pylist()
    return rows


def keys_of(rows: list[dict[str, Any]]) -> set[int]:
    return {key for row in rows for part in ("history", "candidate") for key in row[f"{part}_item_id"]}


def test_every_key_that_was_trained_has_a_row_and_later_ones_none(learnt: tuple[Path, Path]) -> None:
    data, run = learnt
    held = set(newest(run)["ids/item/keys"].tolist()) - {UNKNOWN_KEY}
    assert held == keys_of(samples(data, "train")) - {UNKNOWN_KEY}
    assert len(keys_of(samples(data, "eval")) - held) > 10


def test_an_evaluation_by_itself_finds_what_the_run_found(learnt: tuple[Path, Path]) -> None:
    """With the map of the checkpoint, on another number of ranks; never-seen keys are measured apart."""
    _, run = learnt
    (of_run,) = read_lines(run / "eval.jsonl")
    assert 0.05 < of_run["unknown_share"] < 1
    again = run.with_name("evaluated")
    shutil.copytree(run, again)
    (again / "eval.jsonl").unlink()
    code, output = run_trainer("evaluate", str(again))
    assert code == 0, output
    (found,) = read_lines(again / "eval.jsonl")
    assert found == pytest.approx(of_run, abs=1e-5, nan_ok=True)


def test_requests_are_scored_by_raw_keys_and_all_never_seen_ones_alike(learnt: tuple[Path, Path]) -> None:
    data, run = learnt
    asked = samples(data, "eval")[:6]
    info = read_dataset_info(str(data))
    contexts = [column.name for column in info.columns if column.part == "sample"]
    to_id, _ = read_keys(str(data), info.spaces["item"])
    with (data.parent / "log" / "log.csv").open(newline="") as log:
        key_of = {to_id(row["item"]): row["item"] for row in csv.DictReader(log)}
    requests: list[dict[str, Any]] = [
        {
            "sample": dict.fromkeys(contexts),
            "event": {
                "item_id": [key_of[item] for item in sample["history_item_id"]],
                "action": [["click"] if mask else [] for mask in sample["history_action"]],
                "timestamp": sample["history_timestamp"],
            },
            "candidate": {
                "item_id": [*(key_of[item] for item in sample["history_item_id"][-1:]), None, "12345", "never seen"],
                "timestamp": [sample["candidate_timestamp"][0]] * (3 + bool(sample["history_item_id"])),
            },
        }
        for sample in asked
    ]
    with open_scorer(run) as scorer:
        scores = [each["click"] for each in scorer.score(requests)]
        rows = scorer.model.known(scorer.inputs(requests)).ids("item_id").tolist()
    row_of = {int(key): slot + 1 for slot, key in enumerate(newest(run)["ids/item/keys"]) if key != UNKNOWN_KEY}
    histories = [key for sample in asked for key in sample["history_item_id"][-8:]]
    assert rows[: len(histories)] == [row_of.get(key, SHARED_ROW) for key in histories]
    assert len(set(rows)) > 10
    for *_, unknown, other, another in scores:
        assert unknown == other == another
    assert any(each[0] != each[-1] for each in scores)


def test_another_run_begins_with_the_rows_and_the_map_that_says_whose_they_are(learnt: tuple[Path, Path]) -> None:
    """Rows of keys that its one step does not look up are to the bit those of the other run, on other ranks too."""
    data, run = learnt
    next_run = run.with_name("next")
    lines = train(
        next_run,
        1,
        f"data.path={data}",
        *COMMON,
        "max_steps=1",
        "data.global_batch_size=2",
        recipe="own_log",
        options=("--init-from", str(run)),
    )
    assert len(lines) == 1
    before, after = newest(run), newest(next_run)
    keys = before["ids/item/keys"]
    assert torch.equal(after["ids/item/keys"], keys)
    assert int(after["ids/item/now"]) == int(before["ids/item/now"]) + 1
    used = after["ids/item/counts"] != before["ids/item/counts"]
    assert 2 < used.sum() < len(keys) // 2
    for name in ("tables/item", "tables_optimizer/item/momentum1"):
        changed = (after[name] != before[name]).view(len(keys) + 1, -1).any(1)[1:]
        assert torch.equal(changed, used), name


def test_rows_without_their_map_are_refused_before_anything_begins(learnt: tuple[Path, Path], tmp_path: Path) -> None:
    data, run = learnt
    only = ("--init-from", str(run), "--init-only", "tables/item")
    alone = tmp_path / "alone"
    status, output = run_training(alone, 1, f"data.path={data}", *COMMON, recipe="own_log", options=only)
    assert status != 0
    assert "name 'tables/item' and 'ids/item/*' together by --init-only" in output.splitlines()[-1]
    assert "Traceback" not in output


def test_an_export_holds_the_map_and_comes_back_as_it_was(learnt: tuple[Path, Path], tmp_path: Path) -> None:
    _, run = learnt
    out, back = tmp_path / "out", tmp_path / "back"
    assert run_trainer("export", str(run), "--out", str(out))[0] == 0
    trained, maps = newest(run), load_file(out / "maps.safetensors")
    values = pq.read_table(out / "tables" / "item.parquet").column("values").to_pylist()
    keys = maps["item/keys"].tolist()
    # The key of a slot has the row after it.
    for slot in (keys.index(key) for key in keys if key != UNKNOWN_KEY):
        assert values[slot + 1] == trained["tables/item"][slot + 1].tolist()
    assert run_trainer("import", str(out), "--out", str(back))[0] == 0
    again = newest(back)
    for name in trained:
        if name.startswith(("ids/", "tables/", "dense/")):
            assert torch.equal(again[name], trained[name]), name
    maps["item/keys"] = maps["item/keys"].roll(64)
    save_file(maps, out / "maps.safetensors")
    code, output = run_trainer("import", str(out), "--out", str(tmp_path / "wrong"))
    assert code != 0 and "Traceback" not in output and not (tmp_path / "wrong").exists()
    assert re.search(r"key -?\d+ of 'item/keys' cannot have row \d+: leave maps alone", output.splitlines()[-1])


def test_learns_a_drifting_catalogue_better_than_a_hash_of_as_many_rows(tmp_path: Path) -> None:
    scores = {}
    for way in ("unbounded", "hash"):
        spaces = {"item": f"rows = 128\n{way} = true"}
        # Three quarters of what is evaluated are items that were trained.
        data = make(tmp_path, spaces, events=12_000, alive=60, lives=10, more=("--train-fraction", "0.96"))
        settings = (f"data.path={data}", *COMMON, "sparse_optimizer.learning_rate=0.3")
        train(tmp_path / way, 1, *settings, recipe="own_log")
        scores[way] = read_lines(tmp_path / way / "eval.jsonl")[-1]["ne/click"]
    assert scores["unbounded"] < scores["hash"] - 0.04
