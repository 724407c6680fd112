"""Users' events cut into samples, beside a plain reading of the rules that goes from event to event."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.prepare.options import SampleOptions
from pipelines.prepare.samples import cut as samples
from pipelines.prepare.samples.cut import UserEvents, cut, spans
from pipelines.prepare.samples.user_events import EVERYWHERE

Range = tuple[int, int, int]


@dataclass
class User:
    times: list[int]
    requests: list[int] = field(default_factory=list)
    unlabelled: int = 0

    def __post_init__(self) -> None:
        self.requests = self.requests or [0] * len(self.times)


def events_of(users: Sequence[User]) -> UserEvents:
    lens = [len(user.times) for user in users]
    time = np.array([time for user in users for time in user.times])
    return UserEvents(
        user_id=np.repeat(np.arange(len(users)), lens),
        time=time,
        request=np.array([request for user in users for request in user.requests], dtype=np.uint64),
        candidate=np.concatenate([np.arange(n) >= user.unlabelled for n, user in zip(lens, users, strict=True)]),
        columns={"item_id": np.arange(len(time)), "action": np.zeros(len(time), np.int32), "timestamp": time},
        history={f"history_{name}": name for name in EVERYWHERE},
        candidates={f"candidate_{name}": name for name in EVERYWHERE},
        sample={},
    )


def found(users: Sequence[User], split_time: int, options: SampleOptions) -> tuple[list[Range], ...]:
    """(start, middle, end) of the training and of the evaluation samples."""
    return tuple(
        list(zip(each.start.tolist(), each.middle.tolist(), each.end.tolist(), strict=True))
        for each in spans(events_of(users), split_time, options)
    )


def groups(user: User, first: int, last: int, size: int, by_place: bool) -> list[tuple[int, int]]:
    """From the newest back: whole seconds and requests, at most `size` events unless the first has more."""
    result = []
    while last > first:
        begin = last
        while begin > first:
            previous = begin - 1
            while not by_place and previous > first and not may_begin(user, previous):
                previous -= 1
            if begin < last and last - previous > size:
                break
            begin = previous
        result.append((begin, last))
        last = begin
    return result[::-1]


def may_begin(user: User, place: int) -> bool:
    """Whether no event before the place is of its second, or of a request that goes on from there."""
    before, rest = set(user.requests[:place]) - {0}, set(user.requests[place:])
    return place in (0, len(user.times)) or (user.times[place - 1] < user.times[place] and not before & rest)


def expected(users: Sequence[User], split_time: int, options: SampleOptions) -> tuple[list[Range], list[Range]]:
    train: list[Range] = []
    evaluation: list[Range] = []
    offset = 0
    for user in users:
        whole, by_place = len(user.times), options.leave_last is not None
        size = max(0, whole - options.drop_last)
        user = User(user.times[:size], user.requests[:size], user.unlabelled)
        places = [place for place in range(size + 1) if by_place or may_begin(user, place)]
        first = min((p for p in places if p >= max(user.unlabelled, options.min_history)), default=size)
        split = sum(time < split_time for time in user.times)
        if options.leave_last is not None:
            split = max(0, size - options.leave_last)
        cut_groups = groups(user, first, max(p for p in places if p <= split), options.candidates, by_place)
        limit = options.samples_per_user
        if limit is None:
            limit = 1 if by_place else 0
        cut_groups = cut_groups[-limit:]
        train += [
            (offset + max(0, b - min(options.max_history, options.train_history or 99)), offset + b, offset + e)
            for b, e in cut_groups
            if e - b >= options.min_candidates
        ]
        begin = max(first, min(p for p in places if p >= split))
        end = max([p for p in places if begin < p <= begin + options.eval_candidates], default=0) or min(
            [p for p in places if p > begin], default=begin
        )
        cut_groups = groups(user, begin, end, options.candidates, by_place) if options.eval_groups else [(begin, end)]
        evaluation += [
            (offset + max(0, b - options.max_history), offset + b, offset + e) for b, e in cut_groups if e > b
        ]
        offset += whole
    return train, evaluation


@st.composite
def logs(draw: st.DrawFn) -> list[User]:
    users = []
    for _ in range(draw(st.integers(1, 4))):
        times = sorted(draw(st.lists(st.integers(0, 12), min_size=1, max_size=25)))
        unlabelled = draw(st.integers(0, min(3, len(times))))
        requests = draw(st.lists(st.integers(0, 4), min_size=len(times), max_size=len(times)))
        # What has no labels was shown before the log begins.
        times[:unlabelled], requests[:unlabelled] = [-1] * unlabelled, [0] * unlabelled
        users.append(User(times, requests if draw(st.booleans()) else [], unlabelled))
    return users


OPTIONS = st.builds(
    SampleOptions,
    candidates=st.integers(1, 5),
    samples_per_user=st.none() | st.integers(0, 3),
    eval_candidates=st.integers(1, 7),
    eval_groups=st.booleans(),
    max_history=st.sampled_from([3, 100]),
    min_history=st.integers(0, 3),
    min_candidates=st.integers(1, 2),
    leave_last=st.sampled_from([None, None, 1, 3]),
    train_history=st.sampled_from([None, 1, 4]),
).flatmap(
    lambda options: st.sampled_from([0, 0, 1, 2] if options.leave_last is not None else [0]).map(
        lambda dropped: replace(options, drop_last=dropped)
    )
)


@given(logs(), st.integers(0, 13), OPTIONS)
@settings(max_examples=400, deadline=None)
def test_samples_are_those_of_the_rules_event_by_event(
    users: list[User], split_time: int, options: SampleOptions
) -> None:
    assert found(users, split_time, options) == expected(users, split_time, options)


@given(logs(), st.integers(0, 13), OPTIONS)
@settings(max_examples=200, deadline=None)
def test_no_history_reaches_its_candidates_time_or_request(
    users: list[User], split_time: int, options: SampleOptions
) -> None:
    if options.leave_last is not None:
        return
    events = events_of(users)
    for part, samples_of in enumerate(found(users, split_time, options)):
        for start, middle, end in samples_of:
            assert (events.time[start:middle] < events.time[middle:end].min()).all()
            shown = set(events.request[middle:end].tolist()) - {0}
            assert not shown & set(events.request[start:middle].tolist())
            assert ((events.time[middle:end] >= split_time) == bool(part)).all()
            assert len(set(events.user_id[start:end].tolist())) == 1


def test_each_users_newest_events_are_left_for_evaluation() -> None:
    users = [User(list(range(n))) for n in (4, 1, 2, 6)]
    train, evaluation = found(users, 0, SampleOptions(leave_last=1, candidates=1))
    assert evaluation == [(0, 3, 4), (5, 6, 7), (7, 12, 13)]
    # The user with two events has none left to predict from.
    assert train == [(0, 2, 3), (7, 11, 12)]
    assert found(users, 0, SampleOptions(leave_last=2, candidates=1))[1] == [
        *((0, 2, 3), (0, 3, 4)),
        *((5, 6, 7), (7, 11, 12), (7, 12, 13)),
    ]
    frozen = SampleOptions(leave_last=2, candidates=1, eval_groups=False)
    assert found(users, 0, frozen)[1] == [(0, 2, 4), (5, 6, 7), (7, 11, 13)]


def test_what_is_chosen_on_the_event_before_the_last_has_not_seen_the_last() -> None:
    users = [User(list(range(n))) for n in (4, 6)]
    train, evaluation = found(users, 0, SampleOptions(leave_last=1, drop_last=1, candidates=1))
    assert (train, evaluation) == ([(0, 1, 2), (4, 7, 8)], [(0, 2, 3), (4, 8, 9)])
    with pytest.raises(ValueError, match="--drop-last=1 has no effect without --leave-last"):
        SampleOptions(drop_last=1)


def test_pieces_of_a_long_history_train_on_each_event_once() -> None:
    pieces = SampleOptions(leave_last=1, samples_per_user=0, candidates=4, train_history=1, max_history=5)
    train, evaluation = found([User(list(range(10)))], 0, pieces)
    assert train == [(0, 1, 5), (4, 5, 9)]
    assert evaluation == [(4, 9, 10)]


def test_next_items_go_by_place_whatever_the_times() -> None:
    assert found([User([5, 5, 5])], 0, SampleOptions(leave_last=1, candidates=1)) == ([(0, 1, 2)], [(0, 2, 3)])
    assert found([User([5, 5, 5])], 9, SampleOptions(candidates=1)) == ([], [])


def test_a_split_in_time_beside_it_is_refused() -> None:
    with pytest.raises(ValueError, match="--split-time=5 has no effect with --leave-last"):
        SampleOptions(leave_last=1, split_time=5)


def test_rare_items_keep_their_ids_where_the_next_item_is_sought() -> None:
    with pytest.raises(ValueError, match="--min-count=2 would make the shared id of rare items the next item"):
        SampleOptions(leave_last=1, min_count=2)


def test_tables_stay_small_where_histories_are_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(samples, "EXPANDED_EVENTS", 1000)
    options = SampleOptions(candidates=4, samples_per_user=0, max_history=300)
    events = events_of([User(list(range(600))), User(list(range(10)))])
    tables = [table for split, table in cut(events, 10**6, options) if split == "train"]
    sizes = [sum(table["history_length"].to_pylist()) + sum(table["num_candidates"].to_pylist()) for table in tables]
    assert len(sizes) > 10
    assert max(sizes) <= 1000 + 300 + 4
    rows = [row for table in tables for row in table.to_pylist()]
    assert [row["candidate_item_id"][0] for row in rows] == [1, *range(4, 600, 4), 601, 602, 606]
    assert all(row["history_item_id"][-1] == row["candidate_item_id"][0] - 1 for row in rows)
