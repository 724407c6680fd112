"""manifest.json: what a checkpoint holds and where, as JSON that is checked value by value as it is read."""

import hashlib
import json
import platform
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from math import prod
from typing import Any

from trainer.checkpoint.chunks import FileRecord
from trainer.checkpoint.progress import Progress, progress_from_dict
from trainer.checkpoint.region import Region

COMPLETE = "COMPLETE"
"""The file that is written last, and without which a folder is no checkpoint."""
FORMAT = 3
"""Version of the format; a reader refuses others, but for full checkpoints of version 2, which are the same: its deltas
did not say which checkpoint of a step they need."""
DTYPE_BYTES = {
    "float64": 8,
    "float32": 4,
    "float16": 2,
    "bfloat16": 2,
    "int64": 8,
    "int32": 4,
    "int16": 2,
    "int8": 1,
    "uint8": 1,
    "bool": 1,
}
"""torch's names of the types that a tensor may have -> bytes of a value."""
_FILE_NAME = re.compile(r"rank-\d{5}\.bin")


@dataclass(frozen=True, slots=True)
class StoredPiece:
    """The place of a region of a tensor: row by row, from byte `start` of `file` on."""

    file: str
    start: int
    region: Region
    rows: "StoredRows | None" = None
    """Which rows of the region are stored, if not all; the others are as in the checkpoint before."""

    @property
    def numel(self) -> int:
        """Values that are stored."""
        return self.region.numel if self.rows is None else self.rows.count * prod(self.region.sizes[1:])


@dataclass(frozen=True, slots=True)
class StoredRows:
    """Numbers of rows of the whole tensor, ascending, as int64 from byte `start` of the piece's file on."""

    start: int
    count: int


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor as its pieces, which hold each of its values once."""

    dtype: str
    shape: tuple[int, ...]
    pieces: tuple[StoredPiece, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Manifest:
    """All that a checkpoint says of itself."""

    progress: Progress
    """How far the run had come."""
    world_size: int
    """How many ranks wrote it."""
    base: int | None
    """Step of the checkpoint that holds the rows which this one leaves out; None for a full one."""
    base_digest: str | None
    """What that one's COMPLETE holds, so that no other checkpoint of the step takes its place."""
    versions: Mapping[str, str]
    """Versions of the packages that wrote it."""
    files: Mapping[str, FileRecord]
    """By name: size and checksums."""
    tensors: Mapping[str, StoredTensor]
    """By name: type, shape and place."""

    def __post_init__(self) -> None:
        for name, number in (("base", self.base), ("world_size", self.world_size)):
            if type(number) is not int and (number, name) != (None, "base"):
                raise ValueError(f"{name} must be a whole number, got {number!r}")
        if self.base is not None and not isinstance(self.base_digest, str):
            raise ValueError(f"it needs the checkpoint of step {self.base}, but does not say which")
        if self.base is not None and self.base >= self.progress.step:
            raise ValueError(f"it is of step {self.progress.step} and needs a later one, of step {self.base}")
        for name in self.files:
            if not _FILE_NAME.fullmatch(name):
                raise ValueError(f"{name!r} is no name of a file")
        for name, tensor in self.tensors.items():
            self._check(name, tensor)

    def _check(self, name: str, tensor: StoredTensor) -> None:
        for piece in tensor.pieces:
            inside = Region((0,) * len(tensor.shape), tensor.shape).overlap(piece.region) == piece.region
            end = piece.start + piece.numel * DTYPE_BYTES[tensor.dtype]
            first = piece.start
            rows = () if piece.rows is None else (piece.rows.start, piece.rows.count)
            numbers = (first, *piece.region.offsets, *piece.region.sizes, *tensor.shape, *rows)
            if any(type(number) is not int for number in numbers):
                raise ValueError(f"a piece of {name!r} lies at other than whole numbers")
            if piece.rows is not None:
                first, end = min(first, piece.rows.start), max(end, piece.rows.start + 8 * piece.rows.count)
                inside = inside and self.base is not None and 0 <= piece.rows.count <= piece.region.sizes[0]
            if not inside or first < 0 or end > self.files[piece.file].num_bytes:
                raise ValueError(f"a piece of {name!r} lies outside its tensor or file")
        held, needed = sum(piece.region.numel for piece in tensor.pieces), prod(tensor.shape)
        if held != needed:
            raise ValueError(f"{name!r} has {needed} values, its pieces hold {held}")

    @property
    def num_bytes(self) -> int:
        """Bytes of all files."""
        return sum(record.num_bytes for record in self.files.values())

    def encode(self) -> bytes:
        """The content of `manifest.json`."""
        values = {
            "format": FORMAT,
            "versions": dict(self.versions),
            "progress": self.progress.as_dict(),
            "world_size": self.world_size,
            "base": self.base,
            "base_digest": self.base_digest,
            "files": {name: {"bytes": file.num_bytes, "crc32": file.crc32} for name, file in self.files.items()},
            "tensors": {
                name: {
                    "dtype": tensor.dtype,
                    "shape": tensor.shape,
                    "pieces": [_piece_values(piece) for piece in tensor.pieces],
                }
                for name, tensor in self.tensors.items()
            },
        }
        return (json.dumps(values) + "\n").encode()


def _piece_values(piece: StoredPiece) -> dict[str, Any]:
    values = {"file": piece.file, "start": piece.start, "offsets": piece.region.offsets, "sizes": piece.region.sizes}
    return values if piece.rows is None else {**values, "rows": asdict(piece.rows)}


class OtherFormat(ValueError):
    """A manifest is whole, but of another version of the format: another code reads it."""


def decode(content: bytes) -> Manifest:
    """Read what `Manifest.encode` made.

    Raises:
        OtherFormat: another version of this code wrote it.
        ValueError: it is something else; says what is wrong.
    """
    try:
        values = json.loads(content)
        if values["format"] != FORMAT and (values["format"], values["base"]) != (2, None):
            raise OtherFormat(
                f"is of format {values['format']}, written by {values.get('versions')}; this code reads format "
                f"{FORMAT}: use the code that wrote it"
            )
        return Manifest(
            progress=progress_from_dict(values["progress"]),
            world_size=values["world_size"],
            base=values["base"],
            base_digest=values.get("base_digest"),
            versions=values["versions"],
            files={name: FileRecord(file["bytes"], tuple(file["crc32"])) for name, file in values["files"].items()},
            tensors={name: _tensor(tensor) for name, tensor in values["tensors"].items()},
        )
    except (KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise ValueError(f"its manifest lacks something or has it in another form: {error!r}") from None


def _tensor(values: Mapping[str, Any]) -> StoredTensor:
    pieces = [
        StoredPiece(
            piece["file"],
            piece["start"],
            Region(tuple(piece["offsets"]), tuple(piece["sizes"])),
            StoredRows(**piece["rows"]) if "rows" in piece else None,
        )
        for piece in values["pieces"]
    ]
    return StoredTensor(values["dtype"], tuple(values["shape"]), tuple(pieces))


def digest(content: bytes) -> str:
    """What COMPLETE holds of the manifest's content."""
    return hashlib.sha256(content).hexdigest() + "\n"


def writing_versions() -> dict[str, str]:
    """Versions of what decides the numbers, as far as it is installed."""
    found = {"python": platform.python_version()}
    for package in ("torch", "torchrec", "fbgemm-gpu", "fbgemm-gpu-cpu"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
