"""Weights leave a run as files of other tools and come back bit for bit; what was edited wrongly is refused."""

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file, save_file

from embeddings.config import TableConfig
from embeddings.rows.initial import fill
from tests.support.small_data import SOURCE, small_dataset
from tests.support.training import read_checkpoint, train
from trainer.command_line import WrongUse
from trainer.export import rows, write
from trainer.export.read import import_run
from trainer.export.write import export_run
from trainer.run.run_dir import RunDir

ROOM = 20
"""Rows of the table of items that are no item's yet."""


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of three steps on two ranks whose newest checkpoint is a delta.  Its items have rows of 16 bits and
    room for more, its users no keys."""
    folder = tmp_path_factory.mktemp("trained")
    data = folder / "data"
    shutil.copytree(small_dataset(), data)
    for file in SOURCE.glob("*_ids.parquet"):
        shutil.copy(file, data)
    values = json.loads((data / "dataset.json").read_text())
    values["spaces"]["item"]["rows"] += ROOM
    del values["spaces"]["user"]["keys"], values["spaces"]["user"]["digest"]
    (data / "dataset.json").write_text(json.dumps(values))
    train(
        folder / "run",
        2,
        f"data.path={data}",
        "max_steps=3",
        "checkpoint.every_steps=2",
        "checkpoint.deltas=1",
        'tables={"item":{"dtype":"float16"}}',
        'placement.sharding_types=["row_wise"]',
    )
    assert json.loads((newest(folder / "run") / "manifest.json").read_text())["base"] == 2
    return folder / "run"


@pytest.fixture(scope="module")
def exported(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("exported") / "out"
    export_run(trained, out, step=None, data=None)
    return out


def newest(run: Path) -> Path:
    return max((run / "checkpoints").glob("step-*"))


def assert_same_weights(one: Path, other: Path, but: tuple[str, ...] = ()) -> None:
    """Bit for bit, and optimizer state of the other is zero but for marks that the first update swallows: at the very
    rows that are trained, for others read the row of the unknown id."""
    before, after = read_checkpoint(newest(one)), read_checkpoint(newest(other))
    assert set(before) == set(after)
    for name, value in before.items():
        if name.split("/")[0] in ("tables", "dense") and name not in but:
            assert value.dtype == after[name].dtype, name
            assert value.numpy().tobytes() == after[name].numpy().tobytes(), name
        elif name.startswith("tables_optimizer/") and value.dim():
            rows = len(value)
            assert torch.equal((after[name] != 0).reshape(rows, -1).any(1), (value != 0).reshape(rows, -1).any(1)), name
            assert after[name].max() < 1e-29, name
        elif name not in but:
            assert not after[name].any(), name


def test_what_is_exported_comes_back_bit_for_bit(trained: Path, exported: Path, tmp_path: Path) -> None:
    import_run(exported, tmp_path / "run", data=None)
    assert_same_weights(trained, tmp_path / "run")
    manifest = json.loads((newest(tmp_path / "run") / "manifest.json").read_text())
    assert manifest["progress"]["step"] == 0
    ours, theirs = RunDir(tmp_path / "run"), RunDir(trained)
    assert ours.saved_config() == theirs.saved_config() and ours.saved_vocabularies() == theirs.saved_vocabularies()
    assert ours.identity() != theirs.identity(), "it is another run"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]


def test_any_tool_reads_rows_by_key_and_weights_by_name(trained: Path, exported: Path) -> None:
    state = read_checkpoint(newest(trained))
    keys = pq.read_table(SOURCE / "item_ids.parquet")
    found = dict(duckdb.sql(f"SELECT key, values FROM '{exported}/tables/item.parquet'").fetchall())
    for place in (0, 1, 17, len(keys) - 1):
        key, row = keys["item_key"][place].as_py(), keys["item_id"][place].as_py()
        assert found[key] == state["tables/item"][row].tolist()
    assert len(found) == len(keys)
    users = pq.read_table(exported / "tables" / "user.parquet")
    assert users["row"].to_pylist() == list(range(len(state["tables/user"])))
    assert np.array_equal(np.stack(users["values"].to_numpy()), state["tables/user"].numpy())
    dense = load_file(exported / "dense.safetensors")
    assert {f"dense/{name}" for name in dense} == {name for name in state if name.startswith("dense/")}
    assert all(torch.equal(state[f"dense/{name}"], value) for name, value in dense.items())
    assert torch.equal(load_file(exported / "unknown.safetensors")["item"], state["tables/item"][0])


def test_a_table_goes_through_in_parts(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that none has to fit into memory."""
    monkeypatch.setattr(write, "PART_BYTES", 100 * 8 * 4)
    monkeypatch.setattr(rows, "PART_ROWS", 77)
    export_run(trained, tmp_path / "out", step=None, data=None)
    file = pq.ParquetFile(tmp_path / "out" / "tables" / "user.parquet")
    assert max(file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)) == 100
    import_run(tmp_path / "out", tmp_path / "run", data=None)
    assert_same_weights(trained, tmp_path / "run")


def test_what_was_edited_comes_back_in_any_order(trained: Path, exported: Path, tmp_path: Path) -> None:
    """Rows rewritten by DuckDB, which knows no numbers of 16 bits, and weights by safetensors."""
    folder = copied(exported, tmp_path)
    for table in ("item", "author"):
        file = folder / "tables" / f"{table}.parquet"
        doubled = "list_transform(values, lambda x: CAST(2 * x AS FLOAT))"
        query = f"SELECT key, {doubled} AS values, trained FROM '{file}' ORDER BY key DESC"
        duckdb.sql(f"COPY ({query}) TO '{folder}/new.parquet'")
        (folder / "new.parquet").replace(file)
    dense = load_file(folder / "dense.safetensors")
    name = next(name for name, value in dense.items() if value.is_floating_point())
    save_file({**dense, name: torch.full_like(dense[name], 0.5)}, folder / "dense.safetensors")
    import_run(folder, tmp_path / "run", data=None)
    before, after = read_checkpoint(newest(trained)), read_checkpoint(newest(tmp_path / "run"))
    keys = pq.read_metadata(SOURCE / "item_ids.parquet").num_rows
    assert torch.equal(after["tables/item"][1 : 1 + keys], 2 * before["tables/item"][1 : 1 + keys])
    assert torch.equal(after["tables/item"][0], before["tables/item"][0])
    assert torch.equal(after["tables/author"][1:], 2 * before["tables/author"][1:])
    assert (after[f"dense/{name}"] == 0.5).all()
    assert_same_weights(trained, tmp_path / "run", ("tables/item", "tables/author", f"dense/{name}"))
    initial = torch.empty(ROOM, 8, dtype=torch.float16)
    config = TableConfig(name="item", num_embeddings=1 + keys + ROOM, embedding_dim=8, features=("item_id",))
    fill(initial, config, 1 + keys, 0, seed=0)
    assert torch.equal(after["tables/item"][1 + keys :], initial)


def copied(exported: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(exported, tmp_path / "edited"))


def edited(change: Callable[[pa.Table], pa.Table]) -> Callable[[Path], None]:
    """Change the table of authors."""

    def edit(folder: Path) -> None:
        file = folder / "tables" / "author.parquet"
        pq.write_table(change(pq.read_table(file)), file)

    return edit


def with_column(name: str, change: Callable[[pa.ChunkedArray], pa.Array]) -> Callable[[Path], None]:
    return edited(lambda table: table.set_column(table.column_names.index(name), name, change(table[name])))


def values_with(row: list[float | None] | None, at: int = 3) -> Callable[[Path], None]:
    """Put `row` in place of the values of one line."""

    def change(values: pa.ChunkedArray) -> pa.Array:
        lists = values.to_pylist()
        lists[at] = row
        return pa.array(lists, pa.list_(pa.float32()))

    return with_column("values", change)


def dense_with(change: Callable[[dict[str, torch.Tensor]], None], file: str = "dense") -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        tensors = load_file(folder / f"{file}.safetensors")
        change(tensors)
        save_file(tensors, folder / f"{file}.safetensors")

    return edit


def first_of(tensors: dict[str, torch.Tensor]) -> str:
    return min(tensors, key=lambda name: (tensors[name].dim() < 2, name))


def without_setting(name: str) -> Callable[[Path], object]:
    def change(folder: Path) -> None:
        values = json.loads((folder / "export.json").read_text())
        del values["config"][name]
        (folder / "export.json").write_text(json.dumps(values))

    return change


WRONG: dict[str, tuple[Callable[[Path], object], str]] = {
    "a row less": (edited(lambda table: table.slice(1)), "author.parquet: key .* of the table is missing"),
    "a row twice": (edited(lambda t: pa.concat_tables([t, t.slice(4, 1)])), "author.parquet: key .* stands twice"),
    "an unknown key": (
        with_column("key", lambda keys: pa.array([-5, *keys.to_pylist()[1:]])),
        "author.parquet: key -5 is none of the table's",
    ),
    "no key": (with_column("key", lambda keys: pa.array([None, *keys.to_pylist()[1:]])), "line 0 has no key"),
    "keys as text": (
        with_column("key", lambda keys: keys.cast(pa.string())),
        "key is of type string, it must be int64",
    ),
    "other numbers": (
        with_column("values", lambda v: v.cast(pa.list_(pa.float64(), 8))),
        "values is of type fixed_size_list.*double.*, it must be a list of float",
    ),
    "another width": (values_with([0.0] * 7), "the row of key .* needs 8 values"),
    "no values": (values_with(None), "the row of key .* needs 8 values"),
    "a value less": (values_with([0.0] * 7 + [None]), "the row of key .* has a value that is missing or not finite"),
    "NaN": (values_with([0.0] * 7 + [float("nan")]), "the row of key .* has a value that is missing or not finite"),
    "another column": (
        edited(lambda table: table.append_column("more", table["key"])),
        "has the columns key, values, trained, more: it needs key, values and trained and no other",
    ),
    "marks as numbers": (
        with_column("trained", lambda marks: marks.cast(pa.int8())),
        "trained is of type int8, it must be bool",
    ),
    "a mark less": (
        with_column("trained", lambda marks: pa.array([None, *marks.to_pylist()[1:]])),
        "the row of key .* lacks trained",
    ),
    "no table": (lambda folder: (folder / "tables" / "author.parquet").unlink(), "author.parquet does not exist"),
    "another table": (
        lambda folder: shutil.copy(folder / "tables" / "author.parquet", folder / "tables" / "autor.parquet"),
        "autor.parquet is of no table: the tables are .*author",
    ),
    "no Parquet": (lambda folder: (folder / "tables" / "author.parquet").write_text("no"), "is no Parquet file"),
    "a weight less": (dense_with(lambda tensors: tensors.pop(first_of(tensors))), "dense.safetensors lacks"),
    "an unknown weight": (
        dense_with(lambda tensors: tensors.update(other=torch.zeros(1))),
        "dense.safetensors holds the unknown 'other'",
    ),
    "a weight's shape": (
        dense_with(lambda tensors: tensors.update({first_of(tensors): torch.zeros(3)})),
        r"has the shape \(3,\) and type float32, it must have",
    ),
    "a weight's type": (
        dense_with(lambda tensors: tensors.update({first_of(tensors): tensors[first_of(tensors)].double()})),
        "and type float64, it must have",
    ),
    "NaN in a weight": (dense_with(lambda tensors: tensors[first_of(tensors)].fill_(torch.nan)), "that is not finite"),
    "no unknown row": (dense_with(lambda t: t.pop("item"), "unknown"), "unknown.safetensors lacks 'item'"),
    "no safetensors": (
        lambda folder: (folder / "dense.safetensors").write_text("no"),
        "dense.safetensors cannot be read",
    ),
    "no description": (lambda folder: (folder / "export.json").unlink(), "holds no export.json"),
    "a setting less": (
        without_setting("precision"),
        "is of a run of another version of the code: key 'precision' is missing; use the version that trained it",
    ),
    "a torn description": (
        lambda folder: (folder / "export.json").write_text("{"),
        "is not what `python -m trainer exp",
    ),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_what_was_edited_wrongly_is_refused_and_leaves_nothing(wrong: str, exported: Path, tmp_path: Path) -> None:
    change, message = WRONG[wrong]
    folder = copied(exported, tmp_path)
    change(folder)
    with pytest.raises(ValueError, match=message) as refused:
        import_run(folder, tmp_path / "run", data=None)
    assert "\n" not in str(refused.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["edited"]


def test_where_a_table_has_no_room_nothing_is_left(
    exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*arguments: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(ValueError, match=r"has no room for .*No space left on device; choose another --out"):
        import_run(exported, tmp_path / "run", data=None)
    assert not list(tmp_path.iterdir())


def test_neither_replaces_what_is_there(trained: Path, exported: Path, tmp_path: Path) -> None:
    with pytest.raises(WrongUse, match="exists already"):
        export_run(trained, tmp_path, step=None, data=None)
    with pytest.raises(WrongUse, match="exists already"):
        import_run(exported, tmp_path, data=None)
    with pytest.raises(WrongUse, match=r"holds no config\.json"):
        export_run(tmp_path, tmp_path / "out", step=None, data=None)


def test_keys_that_were_numbered_anew_are_refused(trained: Path, exported: Path, tmp_path: Path) -> None:
    data = Path(shutil.copytree(trained.parent / "data", tmp_path / "data"))
    values = json.loads((data / "dataset.json").read_text())
    values["spaces"]["author"]["digest"] = "0" * 16
    (data / "dataset.json").write_text(json.dumps(values))
    for action, source in ((import_run, exported), (lambda *a, data: export_run(*a, step=None, data=data), trained)):
        with pytest.raises(ValueError, match=r"ids of table 'author' mean something else in .*--data"):
            action(source, tmp_path / "out", data=str(data))


def test_an_imported_run_trains_on(exported: Path, trained: Path, tmp_path: Path) -> None:
    """On other ranks than exported it, from the start of the data."""
    import_run(exported, tmp_path / "run", data=None)
    lines = train(
        tmp_path / "run",
        1,
        f"data.path={trained.parent / 'data'}",
        "max_steps=1",
        "checkpoint.every_steps=2",
        "checkpoint.deltas=1",
        'tables={"item":{"dtype":"float16"}}',
    )
    assert [line["step"] for line in lines] == [1]
    state = read_checkpoint(newest(tmp_path / "run"))
    assert {float(value) for name, value in state.items() if name.endswith("/step")} == {1.0}
