"""The order of a source's samples: a pure function of seed and epoch, and any place in it is found at once.

Shuffling has two levels and needs no index of all samples.  Files are permuted, and the units (row groups) within
each file; that sequence of units is divided into windows of about `window_samples` rows; within a window, runs of
`shuffle_run` neighbouring rows are permuted.
"""

from collections import OrderedDict
from dataclasses import dataclass, fields
from hashlib import sha256

import numpy as np

from pipelines.features import DatasetInfo
from pipelines.storage.columns import IntArray, Lengths
from pipelines.storage.source import Source
from pipelines.stream.position import SourcePosition
from pipelines.stream.randomness import permutation

FILES, UNITS, ROWS = 1, 2, 3
LENGTH_FILES_KEPT = 8


@dataclass(frozen=True, kw_only=True, slots=True)
class References:
    """Samples by where they lie, in order; arrays of one entry a sample."""

    source: IntArray
    """Which source of the mix."""
    epoch: IntArray
    """Which pass over that source."""
    unit: IntArray
    """Which unit of the source."""
    row: IntArray
    """Which row of the unit."""
    sample: IntArray
    """Number of the row in stored order: the sample's identity."""
    history: IntArray
    """Events of the history, before any cap."""
    candidates: IntArray
    """Candidates, before any cap."""

    def __len__(self) -> int:
        return len(self.unit)

    def select(self, index: IntArray | slice) -> "References":
        """Some of the samples, by their index."""
        return References(**{field.name: getattr(self, field.name)[index] for field in fields(self)})


def concatenate(parts: list[References]) -> References:
    """Samples of several parts, one part after another."""
    return References(**{f.name: np.concatenate([getattr(part, f.name) for part in parts]) for f in fields(References)})


@dataclass(frozen=True, kw_only=True, slots=True)
class _Epoch:
    """The arrangement of one pass."""

    units: IntArray
    """The units in the order in which they are read."""
    window_units: IntArray
    """[windows + 1] where each window begins among `units`."""
    window_rows: IntArray
    """[windows + 1] where each window begins among the samples of the pass."""


class SampleOrder:
    """The endless sequence of passes over one source."""

    def __init__(self, source: Source, key: tuple[int, int], *, shuffled: bool, window_samples: int, run: int) -> None:
        self._source = source
        self._key = key
        self._shuffled = shuffled
        self._window_samples = window_samples
        self._run = run
        self._rows = source.unit_rows
        self._first_row = np.cumsum(self._rows) - self._rows
        self._epochs: OrderedDict[int, _Epoch] = OrderedDict()
        self._windows: OrderedDict[tuple[int, int], References] = OrderedDict()
        self._lengths: OrderedDict[int, Lengths] = OrderedDict()
        self.num_samples = int(self._rows.sum())

    @property
    def info(self) -> DatasetInfo:
        """The description of the data."""
        return self._source.info

    def fingerprint(self) -> str:
        """Changes with anything that decides the order, and with what the data set says of its columns.

        Spaces may grow; what their ids mean has digests of its own.
        """
        info = self._source.info
        columns = [(column.name, column.part, column.kind, column.space) for column in info.columns]
        features = f"{columns} {info.actions}"
        rows = sha256(np.ascontiguousarray(np.stack([self._rows, self._source.unit_file])).tobytes()).hexdigest()
        text = f"{rows} {features} {self._key} {self._shuffled} {self._window_samples} {self._run}"
        return sha256(text.encode()).hexdigest()[:16]

    def units_in_window(self) -> int:
        """Units of the largest window of the first pass: what a reader should keep at hand."""
        return int(np.diff(self._epoch(0).window_units).max())

    def take(self, position: SourcePosition, count: int) -> References:
        """The `count` samples from `position` on."""
        parts = []
        while count:
            epoch = self._epoch(position.epoch)
            window = int(np.searchsorted(epoch.window_rows, position.sample, side="right")) - 1
            start = position.sample - int(epoch.window_rows[window])
            part = self._window(position.epoch, window).select(slice(start, start + count))
            parts.append(part)
            count -= len(part)
            position = self.advance(position, len(part))
        return concatenate(parts)

    def advance(self, position: SourcePosition, count: int) -> SourcePosition:
        """The position `count` samples on."""
        passes, sample = divmod(position.sample + count, self.num_samples)
        return SourcePosition(epoch=position.epoch + passes, sample=sample)

    def _epoch(self, epoch: int) -> _Epoch:
        """The arrangement of a pass, of which the last two are kept."""
        if epoch not in self._epochs:
            units = np.arange(len(self._rows))
            if self._shuffled:
                file = self._source.unit_file
                place = np.argsort(permutation((*self._key, FILES, epoch), int(file[-1]) + 1))
                units = np.lexsort((permutation((*self._key, UNITS, epoch), len(units)), place[file]))
            ends = np.cumsum(self._rows[units])
            window = (ends - self._rows[units]) // self._window_samples
            starts = np.flatnonzero(np.diff(window, prepend=-1))
            self._epochs[epoch] = _Epoch(
                units=units,
                window_units=np.append(starts, len(units)),
                window_rows=np.append(ends[starts] - self._rows[units][starts], ends[-1]),
            )
            while len(self._epochs) > 2:
                self._epochs.popitem(last=False)
        return self._epochs[epoch]

    def _window(self, epoch: int, window: int) -> References:
        """The samples of a window in order; the last two windows are kept."""
        if (epoch, window) not in self._windows:
            arrangement = self._epoch(epoch)
            units = arrangement.units[arrangement.window_units[window] : arrangement.window_units[window + 1]]
            self._windows[epoch, window] = self._arrange(units, epoch, window)
            while len(self._windows) > 2:
                self._windows.popitem(last=False)
        return self._windows[epoch, window]

    def _arrange(self, units: IntArray, epoch: int, window: int) -> References:
        """All rows of some units, shuffled in runs."""
        counts = self._rows[units]
        unit = np.repeat(units, counts)
        row = np.arange(len(unit)) - np.repeat(np.cumsum(counts) - counts, counts)
        lengths = [self._unit_lengths(int(each)) for each in units]
        references = References(
            source=np.zeros_like(unit),
            epoch=np.full_like(unit, epoch),
            unit=unit,
            row=row,
            sample=self._first_row[unit] + row,
            history=np.concatenate([each.history for each in lengths]),
            candidates=np.concatenate([each.candidates for each in lengths]),
        )
        if not self._shuffled:
            return references
        run = np.arange(len(unit)) // self._run
        place = np.argsort(permutation((*self._key, ROWS, epoch, window), int(run[-1]) + 1))
        return references.select(np.argsort(place[run], kind="stable"))

    def _unit_lengths(self, unit: int) -> Lengths:
        """Lengths of a unit's rows, read a file at a time."""
        file = int(self._source.unit_file[unit])
        if file not in self._lengths:
            self._lengths[file] = self._source.file_lengths(file)
            while len(self._lengths) > LENGTH_FILES_KEPT:
                self._lengths.popitem(last=False)
        self._lengths.move_to_end(file)
        first = int(self._first_row[np.searchsorted(self._source.unit_file, file)])
        rows = slice(int(self._first_row[unit]) - first, int(self._first_row[unit] + self._rows[unit]) - first)
        return Lengths(history=self._lengths[file].history[rows], candidates=self._lengths[file].candidates[rows])
