"""Cuts users' ordered events into samples: whole arrays at a time, no loop over users or events.

Train candidates lie before the split time and evaluation candidates do not, and a history always ends before its
candidates begin, so no sample sees the future.  With `leave_last` each user has a split of their own instead.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipelines.prepare.options import SampleOptions

IntArray = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True, slots=True)
class UserEvents:
    """Events of whole users: users one after another, each user's events oldest first."""

    user_id: IntArray
    """[E]"""
    time: IntArray
    """[E] seconds, -1 where unknown."""
    candidate: NDArray[np.bool_]
    """[E] whether the event's labels are known; within a user, the events without labels come first."""
    columns: Mapping[str, NDArray[Any]]
    """[E] item_id, action, timestamp and further history columns."""
    context: Mapping[str, IntArray]
    """[E] context features, constant within a user."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Spans:
    """Samples as half-open ranges of events: a history and the candidates right after it."""

    start: IntArray
    """[S] first event of the history."""
    middle: IntArray
    """[S] end of the history and first candidate."""
    end: IntArray
    """[S] end of the candidates."""


def cut(events: UserEvents, split_time: int, options: SampleOptions) -> dict[str, pa.Table]:
    """The training and the evaluation samples of `events`, as tables in the prepared format."""
    train, evaluation = spans(events, split_time, options)
    return {"train": _table(events, train), "eval": _table(events, evaluation)}


def spans(events: UserEvents, split_time: int, options: SampleOptions) -> tuple[Spans, Spans]:
    """The ranges of events that make the training and the evaluation samples."""
    starts = np.flatnonzero(np.diff(events.user_id, prepend=events.user_id[0] - 1))
    ends = np.append(starts[1:], len(events.user_id))
    unlabelled = np.add.reduceat((~events.candidate).astype(np.int64), starts)
    if options.leave_last is None:
        splits = starts + np.add.reduceat((events.time < split_time).astype(np.int64), starts)
    else:
        splits = np.maximum(starts, ends - options.leave_last)
    first = starts + np.maximum(unlabelled, options.min_history)

    groups = -(-np.maximum(splits - first, 0) // options.candidates)
    if options.samples_per_user:
        groups = np.minimum(groups, options.samples_per_user)
    user = np.repeat(np.arange(len(starts)), groups)
    # Oldest sample of a user first, so that stored samples of one user are in order of time.
    age = np.repeat(np.cumsum(groups), groups) - 1 - np.arange(len(user))
    end = splits[user] - age * options.candidates
    middle = np.maximum(end - options.candidates, first[user])
    start = np.maximum(starts[user], middle - options.max_history)
    enough = end - middle >= options.min_candidates
    train = Spans(start=start[enough], middle=middle[enough], end=end[enough])

    middle = np.maximum(splits, starts + unlabelled)
    has = (ends > middle) & (middle - starts >= options.min_history)
    middle = middle[has]
    evaluation = Spans(
        start=np.maximum(starts[has], middle - options.max_history),
        middle=middle,
        end=np.minimum(ends[has], middle + options.eval_candidates),
    )
    return train, evaluation


def _table(events: UserEvents, samples: Spans) -> pa.Table:
    """Samples in the prepared format's columns."""
    columns: dict[str, pa.Array] = {"user_id": pa.array(events.user_id[samples.middle])}
    for name, values in events.context.items():
        if name != "user_id":
            columns[name] = pa.array(values[samples.middle])
    history, history_offsets = _ranges(samples.start, samples.middle)
    for name, values in events.columns.items():
        columns[f"history_{name}"] = pa.ListArray.from_arrays(history_offsets, pa.array(values[history]))
    candidates, candidate_offsets = _ranges(samples.middle, samples.end)
    for name in ("item_id", "action", "timestamp"):
        values = events.columns[name]
        columns[f"candidate_{name}"] = pa.ListArray.from_arrays(candidate_offsets, pa.array(values[candidates]))
    columns["history_length"] = pa.array((samples.middle - samples.start).astype(np.int32))
    columns["num_candidates"] = pa.array((samples.end - samples.middle).astype(np.int32))
    return pa.table(columns)


def _ranges(start: IntArray, end: IntArray) -> tuple[IntArray, NDArray[np.int32]]:
    """All indices of the ranges [start, end), one range after another, and the ranges' offsets in that array."""
    lens = end - start
    offsets = np.concatenate(([0], np.cumsum(lens)))
    indices = np.arange(offsets[-1]) + np.repeat(start - offsets[:-1], lens)
    return indices, offsets.astype(np.int32)
