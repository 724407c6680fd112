"""A run that begins with what another has learnt: rows by key, whatever their numbers; what is new keeps its values."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from embeddings.rows.trained import TRAINED_ELSEWHERE
from pipelines.storage.dataset_json import read_dataset_info
from pipelines.storage.vocabulary import keys_digest
from tests.support.distributed import run_ranks
from tests.support.small_data import SOURCE, small_dataset
from tests.support.training import read_checkpoint, run_training, train
from trainer.checkpoint.pieces import LivePiece
from trainer.checkpoint.region import Region
from trainer.command_line import WrongUse
from trainer.warm_start import WarmStart, _by_rows

UNTOUCHED = -7.0


@pytest.mark.parametrize("seed", range(5))
def test_rows_are_taken_from_where_their_keys_lie(seed: int) -> None:
    """Against plain indexing, for a shard in the middle of a table and any map of ids."""
    draw = np.random.default_rng(seed)
    old = torch.arange(60.0).view(30, 2)
    rows = np.where(draw.random(40) < 0.3, -1, draw.integers(0, 30, 40))
    rows[10:20] = np.arange(5, 15)
    first, count = 7, 25
    live = torch.full((count, 2), UNTOUCHED)
    piece = LivePiece("tables/item", (40, 2), Region((first, 0), (count, 2)), live)
    for part in _by_rows(piece, rows):
        start, size = part.region.offsets[0], part.region.sizes[0]
        part.tensor.copy_(old[start : start + size])
    for row in range(count):
        there = rows[first + row]
        expected = old[there] if there >= 0 else torch.full((2,), UNTOUCHED)
        assert torch.equal(live[row], expected)
    assert len(list(_by_rows(piece, np.arange(40)))) == 1


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(a data set with the keys of its items, a run of three steps on two ranks over it)."""
    folder = tmp_path_factory.mktemp("trained")
    data = folder / "data"
    shutil.copytree(small_dataset(), data, dirs_exist_ok=True)
    for file in SOURCE.glob("*_ids.parquet"):
        shutil.copy(file, data)
    train(folder / "run", 2, "max_steps=3", f"data.path={data}")
    return data, folder / "run"


def renumbered(data: Path, folder: Path) -> np.ndarray:
    """The data set with items numbered anew and ten new ones; returns the old id of each new one, -1 for the new."""
    shutil.copytree(data, folder)
    table = pq.read_table(folder / "item_ids.parquet")
    draw = np.random.default_rng(0)
    keys = np.concatenate([table["item_key"].to_numpy(), 10**9 + np.arange(10)])
    order = draw.permutation(len(keys))
    ids = pa.array(np.arange(1, len(keys) + 1))
    written = pa.array(keys[order])
    pq.write_table(pa.table({"item_key": written, "item_id": ids}), folder / "item_ids.parquet")
    values = json.loads((folder / "dataset.json").read_text())
    rows = len(keys) + 1
    values["spaces"]["item"] |= {"rows": rows, "used": rows, "digest": keys_digest([written])}
    (folder / "dataset.json").write_text(json.dumps(values))
    old = np.where(order < len(table), table["item_id"].to_numpy()[np.minimum(order, len(table) - 1)], -1)
    return np.concatenate([[0], old])


def loaded(run: Path, data: str, only: tuple[str, ...], rows: int, renamed: bool = False) -> dict[str, Tensor]:
    """What a warm start fills of a model with so many items, whose encoder may be called `input`; called in a process
    group."""
    whole = read_checkpoint(max((run / "checkpoints").glob("step-*")))
    tensors = {
        name: torch.full((rows, *value.shape[1:]), UNTOUCHED)
        if name.split("/")[1] == "item"
        else torch.full_like(value, UNTOUCHED)
        for name, value in whole.items()
    }
    if renamed:
        tensors = {name.replace("/encoder.", "/input."): value for name, value in tensors.items()}
    WarmStart(run, data, read_dataset_info(data), only).load(tensors, dist.new_group(backend="gloo"))
    return tensors


def test_rows_follow_their_keys_and_new_ones_keep_their_values(trained: tuple[Path, Path], tmp_path: Path) -> None:
    data, run = trained
    old = renumbered(data, tmp_path / "data")
    # A delivery that came once the start had read dataset.json: its key is beyond the table.
    keys = pq.read_table(tmp_path / "data" / "item_ids.parquet")
    later = pa.table({"item_key": [2 * 10**9], "item_id": [len(old)]}, schema=keys.schema)
    pq.write_table(pa.concat_tables([keys, later]), tmp_path / "data" / "item_ids.parquet")
    [tensors] = run_ranks(1, loaded, run, str(tmp_path / "data"), (), len(old))
    whole = read_checkpoint(max((run / "checkpoints").glob("step-*")))
    assert {name.split("/")[0] for name in whole} == {"tables", "tables_optimizer", "dense", "dense_optimizer"}
    for name, value in whole.items():
        if name.split("/")[1] == "item":
            expected = torch.full_like(tensors[name], UNTOUCHED)
            expected[old >= 0] = value[old[old >= 0]]
            assert torch.equal(tensors[name], expected), name
        else:
            assert torch.equal(tensors[name], value), name


def taken(tensors: dict[str, Tensor]) -> set[str]:
    return {name for name, value in tensors.items() if not (value == UNTOUCHED).all()}


def test_only_what_is_named_is_taken(trained: tuple[Path, Path]) -> None:
    data, run = trained
    rows = read_dataset_info(str(data)).num_items
    for only, wanted in (
        (("dense/*",), lambda name: name.startswith("dense/")),
        (("tables/item", "tables_optimizer/it*"), lambda name: "/item" in name and not name.startswith("dense")),
    ):
        [tensors] = run_ranks(1, loaded, run, str(data), only, rows)
        assert taken(tensors) == {name for name in tensors if wanted(name)}


def test_what_is_named_otherwise_is_taken_by_both_names(trained: tuple[Path, Path]) -> None:
    """On two ranks, of which each fills its own memory."""
    data, run = trained
    rows = read_dataset_info(str(data)).num_items
    whole = read_checkpoint(max((run / "checkpoints").glob("step-*")))
    of_encoder = {name for name in whole if "/encoder." in name}
    for tensors in run_ranks(2, loaded, run, str(data), ("dense*/encoder.*=dense*/input.*",), rows, True):
        assert taken(tensors) == {name.replace("/encoder.", "/input.") for name in of_encoder}
        for name in of_encoder:
            assert torch.equal(tensors[name.replace("/encoder.", "/input.")], whole[name])


def test_rows_that_were_trained_count_as_trained_without_their_optimizer(trained: tuple[Path, Path]) -> None:
    """State that no update feels, at the rows that had some."""
    data, run = trained
    rows = read_dataset_info(str(data)).num_items
    [tensors] = run_ranks(1, loaded, run, str(data), ("tables/*",), rows)
    whole = read_checkpoint(max((run / "checkpoints").glob("step-*")))
    stored, found = (each["tables_optimizer/item/momentum1"] for each in (whole, tensors))
    assert 0 < (stored > 0).sum() < rows
    assert torch.equal(found, torch.where(stored > 0, torch.tensor(TRAINED_ELSEWHERE), torch.tensor(UNTOUCHED)))


def test_a_run_begins_with_what_another_has_learnt(trained: tuple[Path, Path], tmp_path: Path) -> None:
    """The first loss is that of the run gone on with, not that of an untrained model."""
    data, run = trained
    fresh = train(tmp_path / "fresh", 1, "max_steps=1", f"data.path={data}")
    started = train(tmp_path / "started", 1, "max_steps=1", f"data.path={data}", options=("--init-from", str(run)))
    learnt = read_checkpoint(max((run / "checkpoints").glob("step-*")))
    first = read_checkpoint(max((tmp_path / "started" / "checkpoints").glob("step-*")))
    assert started[0]["loss"] != fresh[0]["loss"]
    assert first["dense_optimizer/" + next(n for n in learnt if n.endswith("/step")).split("/", 1)[1]] == 4


def test_a_run_begins_with_parts_of_another_and_says_which(trained: tuple[Path, Path], tmp_path: Path) -> None:
    data, run = trained
    status, output = run_training(
        tmp_path / "run",
        1,
        "max_steps=1",
        f"data.path={data}",
        options=("--init-from", str(run), "--init-only", "tables/author", "tables/music=tables/author"),
    )
    assert status == 2
    assert "--init-only tables/music=tables/author takes 'tables/music' for 'tables/author', for which" in output
    assert not (tmp_path / "run").exists()
    wrong = ("--init-from", str(run), "--init-only", "tables/author", "tables/music=tables/autor")
    status, output = run_training(tmp_path / "run", 1, "max_steps=1", f"data.path={data}", options=wrong)
    assert status == 1
    assert "--init-only tables/music=tables/autor is nothing of this model, which has 'dense/" in output
    options = ("--init-from", str(run), "--init-only", "tables/*", "tables_optimizer/item/*")
    train(tmp_path / "run", 1, "max_steps=1", f"data.path={data}", options=options)
    log = (tmp_path / "run" / "logs" / "rank-0.log").read_text()
    rows = read_dataset_info(str(data)).num_items
    assert re.search(rf"  tables/item +taken, {rows:,} of {rows:,} rows, with its optimizer\n", log)
    assert re.search(r"  tables/author +taken, 835 of 835 rows, its optimizer anew\n", log)
    assert re.search(r"  dense/\S+ +begins anew\n", log)
    assert re.search(r"  dense/\S+ +not taken\n", log)


@pytest.mark.parametrize(
    ("only", "message"),
    [
        ("tables/itm", r"--init-only tables/itm is none of the names in .*, as 'dense/.*', 'tables/author'"),
        ("weights", "--init-only weights is none of the names"),
        ("tables/*=tables/item", r"must be NAMES, or OLD=NEW with as many \* on both sides"),
        ("=tables/item", "must be NAMES, or OLD=NEW"),
        ("tables/author=dense/author", "would make 'tables/author' another part of the model, 'dense/author'"),
        ("tables/author=tables/item", "tables/author=tables/item takes 'tables/author' for 'tables/item', for which"),
    ],
)
def test_names_that_mean_nothing_are_refused(trained: tuple[Path, Path], only: str, message: str) -> None:
    data, run = trained
    with pytest.raises(WrongUse, match=message):
        WarmStart(run, str(data), read_dataset_info(str(data)), ("tables/item", only))


def test_what_cannot_be_taken_is_refused_before_anything_is_written(trained: tuple[Path, Path], tmp_path: Path) -> None:
    data, run = trained
    info = read_dataset_info(str(data))
    with pytest.raises(WrongUse, match=r"holds no config\.json"):
        WarmStart(tmp_path, str(data), info, ())
    turned = replace(info, actions=info.actions[::-1])
    with pytest.raises(WrongUse, match="name what means the same here by --init-only"):
        WarmStart(run, str(data), turned, ())
    assert WarmStart(run, str(data), turned, ("tables/*",))
    spaces = {**info.spaces, "item": replace(info.spaces["item"], digest=None, keys=None, rows=9)}
    warm = WarmStart(run, str(data), replace(info, spaces=spaces), ())
    piece = LivePiece("tables/item", (9, 8), Region((0, 0), (9, 8)), torch.zeros(9, 8))
    with pytest.raises(ValueError, match="ids of table 'item' cannot be compared"):
        warm._found(piece)
    warm._known.clear()
    with pytest.raises(ValueError, match="ids of table 'item' cannot be compared"):
        warm._found(piece)
    wider = LivePiece("tables/item", (9, 16), Region((0, 0), (9, 16)), torch.zeros(9, 16))
    with pytest.raises(
        ValueError,
        match=r"'tables/item' has the shape .* make the models alike",
    ):
        warm._found(wider)
