"""`python -m trainer export RUN_DIR --out DIR`: a checkpoint's weights as safetensors and Parquet."""

from pathlib import Path

import pyarrow as pa
import torch
from safetensors.torch import save_file
from torch import Tensor

from pipelines.features import UNKNOWN_ID
from pipelines.prepare.samples.stages import workspace
from pipelines.storage.checked_parquet import checked_writer
from trainer.checkpoint.catalogue import Catalogue, Checkpoint, open_catalogue
from trainer.checkpoint.chunks import ChunkError
from trainer.checkpoint.loading import fill
from trainer.checkpoint.manifest import DTYPE_BYTES
from trainer.checkpoint.pieces import LivePiece
from trainer.checkpoint.region import Region
from trainer.command_line import WrongUse
from trainer.export.description import (
    DENSE,
    MAPS,
    TRAINED,
    UNKNOWN,
    VALUES,
    Export,
    ExportedTable,
    TensorKind,
    table_file,
    value_type,
)
from trainer.export.keys import Identities
from trainer.run.run_dir import RunDir

PART_BYTES = 64 * 2**20
"""How much of a table is read and written at a time."""


def export_run(run_dir: Path, out: Path, *, step: int | None, data: str | None) -> Export:
    """Export the newest checkpoint of a run, or that of a step, into the new folder `out`, which appears whole or not
    at all.

    Raises:
        WrongUse: there is no such run or step, or `out` exists.
        ValueError: the data set (`data`, or else the run's) has other keys than the run was trained with.
        DamagedCheckpoint: bytes of the checkpoint are not what was written.
        OSError: it cannot be read.
    """
    run = RunDir(run_dir)
    saved, config = run.config_of_run(), run.trained_config()
    if out.exists():
        raise WrongUse(f"--out {out} exists already: remove it or name another folder")
    catalogue = open_catalogue(run, config.checkpoint.store)
    reader = CheckpointReader(catalogue, catalogue.choose(step))
    identities, known = Identities(data or config.data.path), run.saved_vocabularies()
    for name in reader.names("tables"):
        identities.check(name, known.get(name))
    out.parent.mkdir(parents=True, exist_ok=True)
    with workspace(out) as work:
        folder = work / "result"
        (folder / "tables").mkdir(parents=True)
        export = Export(
            run=str(run_dir),
            step=reader.checkpoint.step,
            config=saved,
            vocabularies=known,
            tables={name: _write_table(folder, reader, name, identities) for name in reader.names("tables")},
            dense={name: reader.kind(f"dense/{name}") for name in reader.names("dense")},
            maps={name: reader.kind(f"ids/{name}") for name in reader.names("ids")},
            optimizers={
                f"{part}/{name}": reader.kind(f"{part}/{name}")
                for part in ("tables_optimizer", "dense_optimizer")
                for name in reader.names(part)
            },
        )
        unknown = {name: table for name, table in export.tables.items() if table.first > UNKNOWN_ID}
        save_file({name: reader.rows(f"tables/{name}", UNKNOWN_ID, 1)[0] for name in unknown}, folder / UNKNOWN)
        save_file({name: reader.whole(f"dense/{name}") for name in export.dense}, folder / DENSE)
        save_file({name: reader.whole(f"ids/{name}") for name in export.maps}, folder / MAPS)
        export.write(folder)
        folder.rename(out)
    return export


class CheckpointReader:
    """Tensors of a checkpoint, whole or some rows at a time."""

    def __init__(self, catalogue: Catalogue, checkpoint: Checkpoint) -> None:
        self._catalogue, self.checkpoint = catalogue, checkpoint

    def names(self, part: str) -> list[str]:
        """Names of the tensors of a part (`tables`), without it."""
        stored = self.checkpoint.manifest.tensors
        return [name.removeprefix(f"{part}/") for name in sorted(stored) if name.startswith(f"{part}/")]

    def kind(self, name: str) -> TensorKind:
        """Type and shape of a tensor."""
        stored = self.checkpoint.manifest.tensors[name]
        return TensorKind(dtype=stored.dtype, shape=stored.shape)

    def rows(self, name: str, first: int, count: int) -> Tensor:
        """[count, ...] some rows."""
        shape = self.kind(name).shape
        return self._read(name, Region((first, *(0 for _ in shape[1:])), (count, *shape[1:])))

    def whole(self, name: str) -> Tensor:
        """The whole tensor of this name."""
        shape = self.kind(name).shape
        return self._read(name, Region((0,) * len(shape), shape))

    def _read(self, name: str, region: Region) -> Tensor:
        kind = self.kind(name)
        values = torch.empty(region.sizes, dtype=getattr(torch, kind.dtype))
        try:
            if region.numel:
                fill(self._catalogue.store, self.checkpoint, [LivePiece(name, kind.shape, region, values)])
        except (ChunkError, OSError) as error:
            raise self._catalogue.unread(self.checkpoint.step, error) from None
        return values


def _write_table(folder: Path, reader: CheckpointReader, name: str, identities: Identities) -> ExportedTable:
    kind = reader.kind(f"tables/{name}")
    rows, columns = kind.shape
    identity, first_row = identities.kind(name), identities.first_row(name)
    list_type = pa.list_(value_type(kind), columns)
    fields = (pa.field(identity, identities.type(name)), pa.field(VALUES, list_type), pa.field(TRAINED, pa.bool_()))
    schema = pa.schema(fields)
    part_rows, count = max(1, PART_BYTES // (columns * DTYPE_BYTES[kind.dtype])), 0
    # Learnt numbers do not repeat: a dictionary of them takes time and room.
    with checked_writer(table_file(folder, name), schema, compression="none", use_dictionary=False) as writer:
        for first, part in identities.parts(name, rows=rows, part_rows=part_rows):
            values = reader.rows(f"tables/{name}", first, len(part)).numpy().reshape(-1)
            lists = pa.FixedSizeListArray.from_arrays(pa.array(values), type=list_type)
            trained = pa.array(_trained(reader, name, first, len(part)).numpy())
            writer.write_batch(pa.record_batch([part, lists, trained], schema=schema))
            count += len(part)
    unknown_trained = bool(_trained(reader, name, UNKNOWN_ID, 1))
    return ExportedTable(kind=kind, identity=identity, first=first_row, count=count, unknown_trained=unknown_trained)


def _trained(reader: CheckpointReader, name: str, first: int, count: int) -> Tensor:
    """[count] bool: which rows of a table training has changed, as `embeddings.rows.trained` tells it."""
    part = f"tables_optimizer/{name}"
    states = [f"{part}/{state}" for state in reader.names(part) if reader.kind(f"{part}/{state}").shape]
    # Without any state, as of plain SGD, nobody knows better than that all rows are trained.
    trained = torch.full((count,), not states)
    for state in states:
        trained |= (reader.rows(state, first, count) != 0).unsqueeze(-1).flatten(1).any(1)
    return trained
