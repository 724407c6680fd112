"""Samples in the order of their first candidates' times: sorted runs on disk, merged piece by piece."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipelines.prepare.samples.write import SplitWriter
from pipelines.storage.columns import IntArray

PIECE_EVENTS = 1 << 14
"""Events that are read of a run at once, about, but for one sample that has more: all runs are read side by side."""


class TimeOrder:
    """Takes samples in any order, hands them back by time; equal times stay in the order in which they came."""

    def __init__(self, folder: Path, run_events: int) -> None:
        """Runs of about `run_events` events, which are sorted in memory, go into the new folder `folder`."""
        self._folder = folder
        self._run_events = run_events
        self._waiting: list[pa.Table] = []
        self._waiting_events = 0
        self._num_runs = 0

    def add(self, table: pa.Table) -> None:
        """Take more samples."""
        if not table.num_rows:
            return
        self._waiting.append(table)
        self._waiting_events += sum(pc.sum(table[name]).as_py() for name in ("history_length", "num_candidates"))
        if self._waiting_events >= self._run_events:
            self._write_run()

    def read(self) -> Iterator[pa.Table]:
        """All samples, in order."""
        self._write_run()
        runs = [self._pieces(number) for number in range(self._num_runs)]
        # What is in hand of each run, oldest first, and the times of its samples.
        heads = {number: next(run) for number, run in enumerate(runs)}
        while heads:
            # No run has anything left before the end of what is in hand of the run that ends first.
            end, last = min((int(_times(head)[-1]), number) for number, head in heads.items())
            due = []
            for number, head in list(heads.items()):
                place = int(np.searchsorted(_times(head), end, side="right" if number <= last else "left"))
                due.append(head.slice(0, place))
                rest = head.slice(place) if place < head.num_rows else next(runs[number], None)
                if rest is None:
                    del heads[number]
                else:
                    heads[number] = rest
            yield _sorted(pa.concat_tables(due))

    def _write_run(self) -> None:
        if not self._waiting:
            return
        table = _sorted(pa.concat_tables(self._waiting))
        self._waiting, self._waiting_events = [], 0
        with SplitWriter(self._run_folder(self._num_runs), PIECE_EVENTS, file_events=1 << 62) as writer:
            writer.add(table)
        self._num_runs += 1

    def _pieces(self, run: int) -> Iterator[pa.Table]:
        [file] = self._run_folder(run).iterdir()
        with pq.ParquetFile(file) as stored:
            for group in range(stored.num_row_groups):
                yield stored.read_row_group(group, use_threads=False)

    def _run_folder(self, run: int) -> Path:
        return self._folder / f"run-{run:06d}"


def _times(table: pa.Table) -> IntArray:
    """[samples] time of each one's first candidate."""
    times: IntArray = pc.list_element(table["candidate_timestamp"], 0).to_numpy()
    return times


def _sorted(table: pa.Table) -> pa.Table:
    return table.take(pa.array(np.argsort(_times(table), kind="stable")))
