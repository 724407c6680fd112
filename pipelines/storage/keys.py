"""From the keys of a log to the ids of a space, as the preparation numbered them; what it has not seen is unknown."""

import hashlib
from collections.abc import Callable, Iterable, Mapping
from pathlib import PurePosixPath
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipelines.features import NUMBER_KEYS, TEXT_KEYS, UNKNOWN_ID, Space
from pipelines.storage.checked_parquet import open_checked, readable
from pipelines.storage.dataset_json import open_filesystem

HASH = "md5"
"""The hash of a key: the last eight bytes of the MD5 of its text in UTF-8, as a little-endian number."""
LOWEST = -(1 << 63)
"""The lowest signed 64-bit number, which stands for the key 0 where ids are unbounded."""

ToId = Callable[[Any], int]
"""The id of a key, or of None, which is missing; raises TypeError for a key of another type than the space's."""


def read_keys(path: str, space: Space) -> tuple[ToId, str]:
    """(from keys to ids of a space of the data set at `path`, what its keys are, for a message).

    Of a space with neither keys nor a hash that is known here, ids are the keys.  Memory: some 100 bytes a key.

    Raises ValueError if the file of keys cannot be read.
    """
    if space.keys is not None:
        known, is_text = _dictionary(path, space.keys, space.used)
        if is_text:
            return lambda key: known.get(_text(key), UNKNOWN_ID), "text"
        return lambda key: known.get(_number(key), UNKNOWN_ID), "whole numbers"
    if space.unbounded:
        kinds = {TEXT_KEYS: "text", NUMBER_KEYS: "whole numbers of 64 bits"}
        what = kinds.get(space.key_kind or "", " or ".join(kinds.values()))
        return lambda key: _key_itself(key, space.key_kind), what
    if space.hash == HASH:
        return lambda key: _hashed(key, space.rows), "text or whole numbers"
    return _number, f"ids, whole numbers in [0, {space.rows})"


def read_names(path: str, space: Space) -> Callable[[int], Any]:
    """From ids of a space to keys; where ids have none to be found (no file of keys), they are their own.

    Raises ValueError if the file of keys cannot be read.
    """
    if space.keys is None:
        return lambda number: number
    known, _ = _dictionary(path, space.keys, space.used)
    names = {number: key for key, number in known.items()}
    return names.__getitem__


def open_keys(path: str, file: str) -> pq.ParquetFile:
    """A space's file of keys in the data set at `path`: a key and its id a row.

    Raises ValueError if it cannot be read.
    """
    filesystem, folder = open_filesystem(path)
    name = str(PurePosixPath(folder) / file)
    with readable(name):
        return open_checked(name, filesystem)


def key_columns(path: str, file: str, used: int) -> tuple[pa.ChunkedArray, pa.ChunkedArray]:
    """(keys, their ids) of the file of `open_keys`, of those in [0, used); raises as that does."""
    opened = open_keys(path, file)
    with readable(f"{file} of {path}"):
        keys, ids = opened.read().columns[:2]
    # A delivery that has come since the data set was described has given further ones, which a model does not know.
    given = pc.less(ids, used)
    return keys.filter(given), ids.filter(given)


def _dictionary(path: str, file: str, used: int) -> tuple[Mapping[Any, int], bool]:
    """The id of each key, of those in [0, used), and whether keys are text."""
    keys, ids = key_columns(path, file, used)
    is_text = not (pa.types.is_integer(keys.type) or pa.types.is_decimal(keys.type))
    # Earlier versions kept dates and the like as such.
    names: Iterable[Any] = keys.cast(pa.string()).to_pylist() if is_text else map(int, keys.to_pylist())
    return dict(zip(names, ids.to_pylist(), strict=True)), is_text


def _text(key: Any) -> str | None:
    key = _as_written(key)
    if key is None or isinstance(key, str):
        return key
    raise TypeError


def _as_written(key: Any) -> Any:
    """True and False as the text that the preparation made of them."""
    return str(key).lower() if isinstance(key, bool | np.bool_) else key


def _number(key: Any) -> int:
    if key is None:
        return UNKNOWN_ID
    if isinstance(key, int | np.integer) and not isinstance(key, bool):
        return int(key)
    raise TypeError


def _hashed(key: Any, rows: int) -> int:
    if key is None:
        return UNKNOWN_ID
    key = _as_written(key)
    text = key if isinstance(key, str) else str(_number(key))
    return UNKNOWN_ID + 1 + _digest(text) % (rows - 1)


def _key_itself(key: Any, kind: str | None) -> int:
    """Whole numbers with their 64 bits, the digest of a text as such a number, and `LOWEST` for the key 0."""
    if key is None:
        return UNKNOWN_ID
    key = _as_written(key)
    if kind is not None and isinstance(key, str) != (kind == TEXT_KEYS):
        raise TypeError
    number = _digest(key) if isinstance(key, str) else _number(key)
    if not LOWEST < number < 1 << 64:
        raise TypeError
    signed = number - (1 << 64) if number >= 1 << 63 else number
    return LOWEST if signed == UNKNOWN_ID else signed


def _digest(text: str) -> int:
    return int.from_bytes(hashlib.md5(text.encode()).digest()[8:], "little")
