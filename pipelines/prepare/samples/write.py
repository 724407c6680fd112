"""Writes samples as Parquet files whose row groups hold about the same number of events, whatever the lengths."""

import json
from pathlib import Path
from types import TracebackType

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipelines.features import DatasetInfo, SplitInfo
from pipelines.prepare.options import SampleOptions
from pipelines.storage.checked_parquet import checked_writer
from pipelines.storage.dataset_json import DATASET_FILE


class SplitWriter:
    """One split's files, and the counts of what was written."""

    def __init__(self, folder: Path, row_group_events: int, file_events: int) -> None:
        folder.mkdir(parents=True)
        self._folder = folder
        self._row_group_events = row_group_events
        self._file_events = file_events
        self._writer: pq.ParquetWriter | None = None
        self._num_files = 0
        self._events_in_file = 0
        self._waiting: list[pa.Table] = []
        self._waiting_events = 0
        self.samples = 0
        self.history_events = 0
        self.candidates = 0

    def __enter__(self) -> "SplitWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.finish()
        elif self._writer is not None:
            self._writer.close()

    def add(self, table: pa.Table) -> None:
        """Append samples; they are written once there are enough of them for a row group."""
        if not table.num_rows:
            return
        history, candidates = (pc.sum(table[name]).as_py() for name in ("history_length", "num_candidates"))
        self.samples += table.num_rows
        self.history_events += history
        self.candidates += candidates
        self._waiting.append(table)
        self._waiting_events += history + candidates
        if self._waiting_events >= self._row_group_events:
            self._write_waiting()

    def finish(self) -> None:
        """Write what waits and close the file."""
        self._write_waiting()
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def sizes(self) -> SplitInfo:
        """What was written."""
        return SplitInfo(
            samples=self.samples, history_events=self.history_events, candidates=self.candidates, files=self._num_files
        )

    def _write_waiting(self) -> None:
        """Write the waiting samples, in row groups that end where their share of the events is full."""
        if not self._waiting:
            return
        table = pa.concat_tables(self._waiting)
        lens = np.add(*(table[name].to_numpy() for name in ("history_length", "num_candidates")), dtype=np.int64)
        total = np.cumsum(lens)
        group = (total - lens) // self._row_group_events
        starts = np.flatnonzero(np.diff(group, prepend=-1))
        for start, end in zip(starts, [*starts[1:], table.num_rows], strict=True):
            self._write_group(table.slice(start, end - start), int(lens[start:end].sum()))
        self._waiting, self._waiting_events = [], 0

    def _write_group(self, table: pa.Table, num_events: int) -> None:
        """Write one row group, into a new file if the present one is full."""
        if self._writer is not None and self._events_in_file >= self._file_events:
            self._writer.close()
            self._writer = None
        if self._writer is None:
            path = self._folder / f"part-{self._num_files:05d}.parquet"
            # Without a dictionary before it, compression takes four fifths of the time and makes smaller files.
            self._writer = checked_writer(
                path, table.schema, compression="zstd", compression_level=3, use_dictionary=False
            )
            self._num_files += 1
            self._events_in_file = 0
        self._writer.write_table(table.combine_chunks(), row_group_size=table.num_rows)
        self._events_in_file += num_events


def write_dataset_file(folder: Path, info: DatasetInfo, options: SampleOptions) -> None:
    """Write `dataset.json`, which makes the folder a prepared data set."""
    chosen = {name: getattr(options, name) for name in SampleOptions.__dataclass_fields__}
    values = {**info.as_dict(), "options": chosen}
    (folder / DATASET_FILE).write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
