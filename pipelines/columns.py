"""Samples as flat arrays: what a source hands to the assembly of batches."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

IntArray = NDArray[np.int64]
AnyArray = NDArray[Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class ListColumn:
    """A list a row, packed."""

    values: AnyArray
    """All rows' values, one row after another."""
    offsets: IntArray
    """[rows + 1] where each row begins in `values`."""

    def lens(self) -> IntArray:
        """[rows] number of values."""
        return np.diff(self.offsets)


@dataclass(frozen=True, kw_only=True, slots=True)
class Samples:
    """Some rows of a split."""

    scalars: Mapping[str, IntArray]
    """user_id and the context features, [rows]."""
    history: Mapping[str, ListColumn]
    """Lists without the prefix history_."""
    candidate: Mapping[str, ListColumn]
    """Lists without the prefix candidate_."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Lengths:
    """What every rank must know of every row."""

    history: IntArray
    """[rows] events of the history, before any cap."""
    candidates: IntArray
    """[rows] candidates, before any cap."""
