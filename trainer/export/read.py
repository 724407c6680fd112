"""`python -m trainer import DIR --out RUN_DIR`: an export, edited or not, as a run at step 0.

    lines of Parquet, rows by key -> a file of each table -> checkpoint of step 0

The run directory appears when all of it has been checked and written.
"""

import os
from collections.abc import Mapping
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from embeddings.config import TableConfig
from embeddings.lookups.key_map import UNKNOWN_KEY, WAYS, slots_of
from embeddings.rows.initial import fill
from embeddings.rows.trained import TRAINED_ELSEWHERE
from pipelines.prepare.engine import connect
from pipelines.prepare.samples.stages import workspace
from trainer.checkpoint.catalogue import open_catalogue
from trainer.checkpoint.checkpointer import Checkpointer
from trainer.checkpoint.layout import dtype_name
from trainer.checkpoint.pieces import Tensors
from trainer.checkpoint.progress import Progress
from trainer.command_line import WrongUse
from trainer.config import CheckpointConfig, TableSettings, TrainConfig
from trainer.export.description import (
    DENSE,
    MAPS,
    UNKNOWN,
    Export,
    ExportedTable,
    TensorKind,
    read_description,
    table_file,
)
from trainer.export.keys import Identities
from trainer.export.rows import TableRows
from trainer.parallel.mesh import Mesh, joined
from trainer.run.run_dir import RunDir, config_that_trained
from trainer.typed_values import to_dict

MEMORY_GIB = 2.0
"""What DuckDB may take to find rows by their keys."""


def import_run(folder: Path, run_dir: Path, *, data: str | None) -> Export:
    """Make the new run directory `run_dir` of an export; it appears whole or not at all.

    Raises:
        WrongUse: `folder` holds no export, or `run_dir` exists.
        ValueError: a tensor is missing, unknown, of another type or shape or not finite; a row is missing, unknown or
            there twice; or the data set (`data`, or else the exported run's) has other keys.
    """
    export = read_description(folder)
    if run_dir.exists():
        raise WrongUse(f"--out {run_dir} exists already: name a new run directory")
    try:
        config = config_that_trained(dict(export.config))
    except ValueError as error:
        raise WrongUse(
            f"{folder} is of a run of another version of the code: {error}; use the version that trained it"
        ) from None
    identities = Identities(data or config.data.path)
    tensors: Tensors = {f"dense/{name}": value for name, value in _read_dense(folder / DENSE, export.dense).items()}
    tensors |= {f"ids/{name}": value for name, value in _read_maps(folder / MAPS, export.maps).items()}
    unknown = _read_dense(folder / UNKNOWN, _unknown_rows(export))
    files = {name: TableRows(table_file(folder, name), name, table) for name, table in export.tables.items()}
    for name, rows in files.items():
        identities.check(name, export.vocabularies.get(name))
        rows.check_columns(identities)
    for file in sorted((folder / "tables").iterdir()):
        if file.stem not in files:
            raise ValueError(f"{file} is of no table: the tables are {', '.join(files)}")
    run_dir.parent.mkdir(parents=True, exist_ok=True)
    with workspace(run_dir) as work:
        trained: dict[str, Tensor] = {}
        for name, table in export.tables.items():
            marks = TensorKind(dtype="bool", shape=table.kind.shape[:1])
            trained[name] = _mapped(work / f"{name}-trained.bin", marks)
            target = tensors[f"tables/{name}"] = _mapped(work / f"{name}.bin", table.kind)
            scratch = work / name
            scratch.mkdir()
            with connect(scratch, MEMORY_GIB, None) as connection:
                files[name].match(identities, connection)
                files[name].copy_into(target, trained[name], connection)
            _fill_rest(target, name, table, config)
            if name in unknown:
                target[0], trained[name][0] = unknown[name], table.unknown_trained
        for number, (name, kind) in enumerate(export.optimizers.items()):
            tensors[name] = _mapped(work / f"optimizer-{number}.bin", kind)
            part, table_name = name.split("/")[:2]
            if part == "tables_optimizer" and kind.shape:
                tensors[name][trained[table_name]] = TRAINED_ELSEWHERE
        _write_run(work / "result", config, export, tensors)
        (work / "result").rename(run_dir)
    return export


def _unknown_rows(export: Export) -> dict[str, TensorKind]:
    """Row 0 of each table whose file does not hold it."""
    return {
        name: TensorKind(dtype=table.kind.dtype, shape=table.kind.shape[1:])
        for name, table in export.tables.items()
        if table.first
    }


def _read_dense(file: Path, needed: Mapping[str, TensorKind]) -> dict[str, Tensor]:
    """The tensors of a safetensors file; raises ValueError unless they are those that are needed, and finite."""
    try:
        tensors = load_file(file)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{file} cannot be read: {error}") from None
    for name in sorted(set(needed) ^ set(tensors)):
        raise ValueError(f"{file} {'lacks' if name in needed else 'holds the unknown'} {name!r}")
    for name, kind in needed.items():
        value = tensors[name]
        if (dtype_name(value.dtype), tuple(value.shape)) != (kind.dtype, kind.shape):
            raise ValueError(
                f"{file}: {name!r} has the shape {tuple(value.shape)} and type {dtype_name(value.dtype)}, it must have "
                f"{kind.shape} and {kind.dtype}"
            )
        if value.is_floating_point() and not value.isfinite().all():
            raise ValueError(f"{file}: {name!r} has a value that is not finite")
    return tensors


def _read_maps(file: Path, needed: Mapping[str, TensorKind]) -> Tensors:
    """The maps of unbounded ids; raises ValueError where a key stands in a row in which it would not be looked for."""
    maps = _read_dense(file, needed)
    for name, keys in maps.items():
        if name.split("/")[1] in ("keys", "waiting_keys"):
            slots = torch.arange(len(keys))
            astray = (keys != UNKNOWN_KEY) & (slots_of(keys, len(keys)) // WAYS != slots // WAYS)
            if astray.any():
                slot = int(astray.nonzero()[0])
                raise ValueError(
                    f"{file}: key {int(keys[slot])} of {name!r} cannot have row {slot + 1}: leave maps alone"
                )
    return dict(maps)


def _mapped(file: Path, kind: TensorKind) -> Tensor:
    """Zeros that lie in a new file, for which there is room.  Raises OSError if there is none."""
    size, dtype = torch.Size(kind.shape).numel(), getattr(torch, kind.dtype)
    with file.open("xb") as new:
        os.posix_fallocate(new.fileno(), 0, max(1, size * dtype.itemsize))
    return torch.from_file(str(file), shared=True, size=size, dtype=dtype).view(kind.shape)


def _fill_rest(target: Tensor, name: str, table: ExportedTable, config: TrainConfig) -> None:
    """Rows for keys to come have the values that a new run gives them."""
    first = table.first + table.count
    rows, columns = table.kind.shape
    bound = config.tables.get(name, TableSettings()).initial_bound
    like = TableConfig(name=name, num_embeddings=rows, embedding_dim=columns, features=(name,), initial_bound=bound)
    fill(target[first:], like, first, 0, seed=config.seed)


def _write_run(path: Path, config: TrainConfig, export: Export, tensors: Tensors) -> None:
    """A run directory with a checkpoint of step 0, which lies in it wherever the exported run's did."""
    run, mesh = RunDir(path), Mesh(rank=0, world_size=1, local_world_size=1, device=torch.device("cpu"))
    path.mkdir()
    here = replace(config, checkpoint=replace(config.checkpoint, store=None))
    run.save_config(to_dict(here), dict(export.vocabularies))
    with joined(mesh):
        writing = CheckpointConfig(asynchronous=False)
        with closing(Checkpointer(run, open_catalogue(run, None), mesh, lambda: tensors, writing)) as checkpointer:
            checkpointer.save(Progress())
