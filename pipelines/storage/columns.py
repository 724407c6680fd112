"""Samples as flat arrays: what a source hands to the assembly of batches."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

IntArray = NDArray[np.int64]
AnyArray = NDArray[Any]
Selection = slice | IntArray
"""Which rows of a column: a range, or their numbers."""


@dataclass(frozen=True, slots=True)
class Bags:
    """A column of any number of ids a row, packed one row after another."""

    values: AnyArray
    """All rows' ids, one row after another."""
    offsets: IntArray
    """[rows + 1] where each row's ids begin in `values`."""

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, rows: Selection) -> "Bags":
        """Some of the rows; those of a range are not copied."""
        if isinstance(rows, slice):
            start, stop, step = rows.indices(len(self))
            assert step == 1, "ranges have no steps"
            offsets = self.offsets[start : max(start, stop) + 1]
            return Bags(self.values[offsets[0] : offsets[-1]], offsets - offsets[0])
        lens = self.lens()[rows]
        offsets = np.concatenate(([0], np.cumsum(lens)))
        places = np.repeat(self.offsets[:-1][rows] - offsets[:-1], lens) + np.arange(offsets[-1])
        return Bags(self.values.take(places), offsets)

    def lens(self) -> IntArray:
        """[rows] ids of each row."""
        return np.diff(self.offsets)


Values = AnyArray | Bags
"""One value a row, or any number of ids a row."""


def join_values(parts: Sequence[Values]) -> Values:
    """Rows of several pieces of one column, one piece after another."""
    if not parts:
        return np.zeros(0, dtype=np.int64)
    bags = [part for part in parts if isinstance(part, Bags)]
    if not bags:
        joined: AnyArray = np.concatenate([part for part in parts if not isinstance(part, Bags)])
        return joined
    lens = np.concatenate([each.lens() for each in bags])
    return Bags(np.concatenate([each.values for each in bags]), np.concatenate(([0], np.cumsum(lens))))


@dataclass(frozen=True, kw_only=True, slots=True)
class ListColumn:
    """A column of lists, packed one row after another."""

    values: Values
    """All rows' values, one row after another."""
    offsets: IntArray
    """[rows + 1] where each row begins in `values`."""

    @property
    def array(self) -> AnyArray:
        """`values` of a column with one value a row of its list."""
        assert not isinstance(self.values, Bags)
        return self.values

    def lens(self) -> IntArray:
        """[rows] number of values."""
        return np.diff(self.offsets)


@dataclass(frozen=True, kw_only=True, slots=True)
class Samples:
    """Some rows of a split, as flat arrays."""

    scalars: Mapping[str, Values]
    """user_id and the columns of samples, [rows]."""
    history: Mapping[str, ListColumn]
    """Lists without the prefix history_."""
    candidate: Mapping[str, ListColumn]
    """Lists without the prefix candidate_; labels with the prefix label_."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Lengths:
    """What every rank must know of every row."""

    history: IntArray
    """[rows] events of the history, before any cap."""
    candidates: IntArray
    """[rows] candidates, before any cap."""
