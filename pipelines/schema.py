"""The description of a prepared data set: `dataset.json`, read and checked.  No torch, no Parquet."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any

import pyarrow as pa
from pyarrow import fs

FORMAT_VERSION = 1
DATASET_FILE = "dataset.json"
UNKNOWN_TIME = -1
"""Timestamp of an event whose time is not known; such events come first in a history."""
MAX_ACTIONS = 31
"""Bits of an action mask, a positive int32."""
LENGTH_COLUMNS = ("history_length", "num_candidates")
"""Optional int32 columns with the lengths of a row's lists: with them, ranks balance without reading the lists."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SplitInfo:
    """Sizes of one split."""

    samples: int
    """Rows."""
    history_events: int
    """Events in all histories."""
    candidates: int
    """Labelled candidates."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DatasetInfo:
    """What a model and a reader must know of a prepared data set."""

    name: str
    """Short name of the data set."""
    num_items: int
    """Item ids lie in [0, num_items)."""
    context_features: Mapping[str, int]
    """Number of values of each context feature, in the order of the context tokens; ids lie in [0, number)."""
    actions: tuple[str, ...]
    """Name of each bit of an action mask, lowest bit first."""
    history_features: tuple[str, ...]
    """Further history lists, without the prefix history_."""
    splits: Mapping[str, SplitInfo]
    """Sizes of `train` and `eval`."""
    source: str
    """Where the data comes from, with its attribution."""
    licence: str
    """Terms under which the data may be used."""
    details: Mapping[str, Any] = field(default_factory=dict)
    """Everything else that the preparation wrote down: split times, statistics, its own options."""

    def action_bit(self, action: str) -> int:
        """Position of an action's bit.  Raises ValueError if there is no such action."""
        if action not in self.actions:
            raise ValueError(f"unknown action {action!r}; {self.name} has {', '.join(self.actions)}")
        return self.actions.index(action)


def open_filesystem(path: str) -> tuple[fs.FileSystem, str]:
    """The filesystem of a local path or of an s3://, gs:// or hdfs:// address, and the path within it.

    Raises ValueError if the address cannot be opened.
    """
    if "://" in path:
        try:
            filesystem, inner = fs.FileSystem.from_uri(path)
        except (pa.ArrowException, OSError) as error:
            # Without Java, the rest are the hundred places where it was sought.
            reason = str(error).splitlines()[0]
            needs = "; hdfs:// needs Hadoop's client: JAVA_HOME, HADOOP_HOME and CLASSPATH (hadoop classpath --glob)"
            raise ValueError(f"{path} cannot be opened: {reason}{needs * path.startswith('hdfs://')}") from error
        return filesystem, inner
    return fs.LocalFileSystem(), path


def read_dataset_info(path: str) -> DatasetInfo:
    """Read `dataset.json` of the prepared data set at `path`.

    Raises ValueError, naming the file, if it is missing, is not JSON or lacks a field.
    """
    filesystem, folder = open_filesystem(path)
    name = str(PurePosixPath(folder) / DATASET_FILE)
    if filesystem.get_file_info(name).type != fs.FileType.File:
        raise ValueError(f"{name} does not exist: data.path must be a folder written by `python -m pipelines.prepare`")
    with filesystem.open_input_stream(name) as stream:
        text = stream.read().decode("utf-8", errors="replace")
    try:
        values = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{name} is not valid JSON: {error}") from error
    return parse_dataset_info(values, name)


def parse_dataset_info(values: Any, name: str) -> DatasetInfo:
    """Check the content of a `dataset.json`; `name` is the file's, for messages."""
    if not isinstance(values, dict):
        raise ValueError(f"{name} must hold a JSON object, got {type(values).__name__}")
    types = {"format_version": int, "name": str, "num_items": int, "context_features": dict, "actions": list}
    types |= {"history_features": list, "splits": dict, "source": str, "licence": str}
    for key, kind in types.items():
        if not isinstance(values.get(key), kind):
            raise ValueError(f"{name}: field {key!r} must be present and of type {kind.__name__}")
    if values["format_version"] != FORMAT_VERSION:
        raise ValueError(f"{name}: format_version is {values['format_version']}, this version reads {FORMAT_VERSION}")
    _check_names(values, name)
    sizes = {"num_items": values["num_items"], **values["context_features"]}
    for key, size in sizes.items():
        if not isinstance(size, int) or size < 1:
            raise ValueError(f"{name}: the number of values of {key!r} must be a whole number above 0, got {size!r}")
    splits = {split: _parse_split(sizes, f"{name}: split {split!r}") for split, sizes in values["splits"].items()}
    return DatasetInfo(
        name=values["name"],
        num_items=values["num_items"],
        context_features=dict(values["context_features"]),
        actions=tuple(values["actions"]),
        history_features=tuple(values["history_features"]),
        splits=splits,
        source=values["source"],
        licence=values["licence"],
        details={key: value for key, value in values.items() if key not in types},
    )


def _check_names(values: Mapping[str, Any], name: str) -> None:
    """Names of actions and features: strings, distinct, few enough for a bit mask, none that is taken."""
    for key, limit in (("actions", MAX_ACTIONS), ("history_features", 64)):
        names = values[key]
        if not all(isinstance(item, str) and item for item in names) or len(set(names)) != len(names):
            raise ValueError(f"{name}: {key!r} must hold distinct names, got {names}")
        if len(names) > limit:
            raise ValueError(f"{name}: {key!r} may hold at most {limit} names, got {len(names)}")
    if not values["actions"]:
        raise ValueError(f"{name}: 'actions' must name at least one action")
    if "item_id" in values["context_features"]:
        raise ValueError(f"{name}: a context feature must not be called 'item_id', which names the item table's ids")
    taken = {"item_id", "action", "timestamp", "length"} & set(values["history_features"])
    if taken:
        raise ValueError(f"{name}: 'history_features' must not contain {sorted(taken)}, which every data set has")


def _parse_split(sizes: Any, where: str) -> SplitInfo:
    """Check one entry of `splits`."""
    fields = tuple(SplitInfo.__dataclass_fields__)
    if not isinstance(sizes, dict) or any(not isinstance(sizes.get(key), int) or sizes[key] < 0 for key in fields):
        raise ValueError(f"{where} must give {', '.join(fields)} as whole numbers, got {sizes!r}")
    return SplitInfo(**{key: sizes[key] for key in fields})
