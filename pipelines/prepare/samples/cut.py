"""Cuts users' ordered events into samples: whole arrays at a time, no loop over users or events.

A sample's candidates are neighbouring events, and its history the events before them.  Candidates begin and end only
where the time changes and no request goes on: a history ends strictly before its candidates begin, and what was shown
together stays together.  Train candidates lie before the split time and evaluation candidates do not, so no sample
sees the future.  With `leave_last` each user has a split of their own, and every place in the order may be cut.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, TypeAlias

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipelines.prepare.options import SampleOptions

IntArray = NDArray[np.int64]
BoolArray = NDArray[np.bool_]
Values: TypeAlias = NDArray[Any] | pa.ListArray
"""One value each, or a list of values each."""

EXPANDED_EVENTS = 1 << 20
"""Events of histories and candidates that are written out at once, but for one sample that has more."""


@dataclass(frozen=True, kw_only=True, slots=True)
class UserEvents:
    """Events of whole users: users one after another, each user's events oldest first."""

    user_id: IntArray
    """[E]"""
    time: IntArray
    """[E] seconds, -1 where unknown."""
    request: NDArray[np.uint64]
    """[E] equal for a user's events of one request, 0 where none is known."""
    candidate: BoolArray
    """[E] whether the event's labels are known; within a user, the events without labels come first."""
    columns: Mapping[str, Values]
    """[E] values of events by name."""
    history: Mapping[str, str]
    """Which of the columns become lists of the history, by the list's name in the prepared format."""
    candidates: Mapping[str, str]
    """Which become lists of the candidates."""
    sample: Mapping[str, Values]
    """[E] columns of samples: of one that begins its candidates with this event."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Spans:
    """Samples as half-open ranges of events: a history and the candidates right after it."""

    start: IntArray
    """[S] first event of the history."""
    middle: IntArray
    """[S] end of the history and first candidate."""
    end: IntArray
    """[S] end of the candidates."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Cuts:
    """The places between events where candidates may begin or end: place p lies before event p."""

    before: IntArray
    """[E + 1] the last cut at or before each place."""
    after: IntArray
    """[E + 1] the first cut at or after each place."""


def cut(events: UserEvents, split_time: int, options: SampleOptions) -> Iterator[tuple[str, pa.Table]]:
    """The samples of `events` as tables in the prepared format, each with its split, train or eval.

    A table holds few samples where histories are long: memory does not grow with their number.
    """
    for split, samples in zip(("train", "eval"), spans(events, split_time, options), strict=True):
        lens = samples.end - samples.start
        piece = (np.cumsum(lens) - lens) // EXPANDED_EVENTS
        bounds = [*np.flatnonzero(np.diff(piece, prepend=-1)), len(lens)]
        for first, last in pairwise(bounds):
            part = slice(first, last)
            yield (
                split,
                _table(events, Spans(start=samples.start[part], middle=samples.middle[part], end=samples.end[part])),
            )


def spans(events: UserEvents, split_time: int, options: SampleOptions) -> tuple[Spans, ...]:
    """The ranges of events that make the training and then the evaluation samples, each in the order of the events."""
    starts = np.flatnonzero(np.diff(events.user_id, prepend=events.user_id[0] - 1))
    bounds = np.append(starts[1:], len(events.user_id))
    ends = np.maximum(starts, bounds - options.drop_last)
    cuts = _cuts(events, starts, by_place=options.leave_last is not None)
    unlabelled = np.add.reduceat((~events.candidate).astype(np.int64), starts)
    first = cuts.after[np.minimum(starts + np.maximum(unlabelled, options.min_history), ends)]
    if options.leave_last is None:
        splits = starts + np.add.reduceat((events.time < split_time).astype(np.int64), starts)
    else:
        splits = np.maximum(starts, ends - options.leave_last)
    # A request that goes on over the split is history of what follows, and nobody's candidates.
    begin, end = _groups(cuts, first, cuts.before[splits], options.candidates)
    newest = _newest(np.searchsorted(bounds, begin, side="right"), options.newest_samples)
    chosen = newest & (end - begin >= options.min_candidates)
    train = begin[chosen], end[chosen]

    begin = np.maximum(cuts.after[splits], first)
    end = cuts.before[np.minimum(begin + options.eval_candidates, ends)]
    end = np.where(end > begin, end, cuts.after[np.minimum(begin + 1, ends)])
    if options.eval_groups:
        evaluation = _groups(cuts, begin, end, options.candidates)
    else:
        evaluation = begin[end > begin], end[end > begin]
    return tuple(
        Spans(
            start=np.maximum(starts[np.searchsorted(bounds, begin, side="right")], begin - kept),
            middle=begin,
            end=end,
        )
        for (begin, end), kept in (
            (train, min(options.max_history, options.train_history or options.max_history)),
            (evaluation, options.max_history),
        )
    )


def _cuts(events: UserEvents, starts: IntArray, *, by_place: bool) -> Cuts:
    """Where candidates may begin and end: between users, and where the time changes within no request."""
    size = len(events.user_id)
    allowed = np.ones(size + 1, dtype=np.bool_)
    if not by_place:
        allowed[1:size] = events.time[1:] != events.time[:-1]
        allowed[1:size] &= ~_within_request(events)[1:]
        allowed[starts] = True
    places = np.arange(size + 1)
    return Cuts(
        before=np.maximum.accumulate(np.where(allowed, places, 0)),
        after=np.minimum.accumulate(np.where(allowed, places, size)[::-1])[::-1],
    )


def _within_request(events: UserEvents) -> BoolArray:
    """[E] whether a request of the user has events both before and from this event on."""
    known = np.flatnonzero(events.request)
    change = np.zeros(len(events.user_id) + 1, dtype=np.int64)
    if not len(known):
        return change[:-1] > 0
    # Stable, so that events of one request stay in order.
    known = known[np.lexsort((events.request[known], events.user_id[known]))]
    user, request = events.user_id[known], events.request[known]
    begins = np.append(True, (user[1:] != user[:-1]) | (request[1:] != request[:-1]))
    np.add.at(change, known[begins] + 1, 1)
    np.add.at(change, known[np.append(begins[1:], True)] + 1, -1)
    within: BoolArray = np.cumsum(change[:-1]) > 0
    return within


def _groups(cuts: Cuts, first: IntArray, last: IntArray, size: int) -> tuple[IntArray, IntArray]:
    """(begin, end) of groups of candidates: each user's range [first, last), both cuts, divided from the newest back.

    A group has at most `size` events; only one that no cut divides has more.
    """
    has = last > first
    first, last = first[has], last[has]
    # From each event that may end a group, the one that ends the group before; where there is none, itself.
    ending = np.arange(len(cuts.after) - 1)
    floor = np.append(first, 0)[np.searchsorted(last, ending, side="right")]
    begin = cuts.after[np.maximum(ending + 1 - size, floor)]
    begin = np.where(begin <= ending, begin, np.maximum(cuts.before[ending], floor))
    previous = np.where(begin > floor, begin - 1, ending)
    # All that can be reached from the newest, in steps that double.
    reached = np.zeros(len(ending), dtype=np.bool_)
    reached[last - 1] = True
    while True:
        further = reached.copy()
        further[previous[reached]] = True
        if (further == reached).all():
            break
        reached, previous = further, previous[previous]
    ends = np.flatnonzero(reached)
    return begin[ends], ends + 1


def _newest(user: IntArray, count: int) -> BoolArray:
    """Which of the groups of these users, [groups] not falling, are among the `count` newest of theirs; 0 for all."""
    if not count:
        return np.ones(len(user), dtype=np.bool_)
    newest: BoolArray = np.searchsorted(user, user, side="right") - np.arange(len(user)) <= count
    return newest


def _table(events: UserEvents, samples: Spans) -> pa.Table:
    """Samples in the prepared format's columns."""
    columns: dict[str, pa.Array] = {"user_id": pa.array(events.user_id[samples.middle])}
    columns |= {name: _take(values, samples.middle) for name, values in events.sample.items()}
    for lists, start, end in (
        (events.history, samples.start, samples.middle),
        (events.candidates, samples.middle, samples.end),
    ):
        places, offsets = _ranges(start, end)
        columns |= {
            name: pa.ListArray.from_arrays(offsets, _take(events.columns[column], places))
            for name, column in lists.items()
        }
    columns["history_length"] = pa.array((samples.middle - samples.start).astype(np.int32))
    columns["num_candidates"] = pa.array((samples.end - samples.middle).astype(np.int32))
    return pa.table(columns)


def _take(values: Values, places: IntArray) -> pa.Array:
    """The values at these places."""
    return values.take(pa.array(places)) if isinstance(values, pa.ListArray) else pa.array(values[places])


def _ranges(start: IntArray, end: IntArray) -> tuple[IntArray, NDArray[np.int32]]:
    """All indices of the ranges [start, end), one range after another, and the ranges' offsets in that array."""
    lens = end - start
    offsets = np.concatenate(([0], np.cumsum(lens)))
    indices = np.arange(offsets[-1]) + np.repeat(start - offsets[:-1], lens)
    return indices, offsets.astype(np.int32)
