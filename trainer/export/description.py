"""export.json: what an export holds."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa

from trainer.command_line import WrongUse

DESCRIPTION = "export.json"
DENSE = "dense.safetensors"
UNKNOWN = "unknown.safetensors"
MAPS = "maps.safetensors"
VALUES = "values"
"""Parquet column of a table's rows."""
TRAINED = "trained"
"""Parquet column that says whether training has changed a row; an id of another row reads that of the unknown id."""
FORMAT = 3

Identity = Literal["key", "row"]
"""Parquet column that says which row of a table is meant: the key behind its id, or its number."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TensorKind:
    """What must be true of a tensor."""

    dtype: str
    """torch's name of its type."""
    shape: tuple[int, ...]
    """The tensor's shape."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ExportedTable:
    """A table as a file of an export."""

    kind: TensorKind
    """Type and shape of the whole table, [rows, columns]."""
    identity: Identity
    """How the file's rows are told apart."""
    first: int
    """Number of the first row that the file holds: 1 where row 0 is the unknown one."""
    count: int
    """Rows that the file holds, with those numbers one after another; later ones are room for keys to come."""
    unknown_trained: bool
    """Whether training has changed row 0."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Export:
    """All that an export says of itself."""

    run: str
    """The run directory that it was made of."""
    step: int
    """The step whose checkpoint it was made of."""
    config: Mapping[str, Any]
    """The run's configuration."""
    vocabularies: Mapping[str, str]
    """The digest of the keys of each space that has keys."""
    tables: Mapping[str, ExportedTable]
    """The tables by their names."""
    dense: Mapping[str, TensorKind]
    """The dense tensors by their names."""
    maps: Mapping[str, TensorKind]
    """The maps of tables of unbounded ids, by TABLE/PART."""
    optimizers: Mapping[str, TensorKind]
    """State that the run's optimizers have, which is not exported."""

    def write(self, folder: Path) -> None:
        """Write the description of an export in `folder`."""
        (folder / DESCRIPTION).write_text(json.dumps({"format": FORMAT, **asdict(self)}, indent=2) + "\n")


def table_file(folder: Path, name: str) -> Path:
    """Where the rows of a table lie in an export."""
    return folder / "tables" / f"{name}.parquet"


def value_type(kind: TensorKind) -> pa.DataType:
    """Arrow's type of a table's values."""
    return {"float32": pa.float32(), "float16": pa.float16()}[kind.dtype]


def read_description(folder: Path) -> Export:
    """Read what `Export.write` wrote.

    Raises:
        WrongUse: there is none, or one that this code does not read.
    """
    file = folder / DESCRIPTION
    if not file.is_file():
        raise WrongUse(f"{folder} holds no {DESCRIPTION}: name a folder that `python -m trainer export` wrote")
    try:
        values = json.loads(file.read_text())
        if values.pop("format") != FORMAT:
            raise ValueError(f"it is of another format than {FORMAT}")
        tables = {
            name: ExportedTable(**{**table, "kind": _kind(table["kind"])})
            for name, table in values.pop("tables").items()
        }
        dense, maps, optimizers = (
            {name: _kind(kind) for name, kind in values.pop(part).items()} for part in ("dense", "maps", "optimizers")
        )
        return Export(tables=tables, dense=dense, maps=maps, optimizers=optimizers, **values)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise WrongUse(f"{file} is not what `python -m trainer export` writes ({error!r}): export again") from None


def _kind(values: Mapping[str, Any]) -> TensorKind:
    return TensorKind(dtype=values["dtype"], shape=tuple(values["shape"]))
