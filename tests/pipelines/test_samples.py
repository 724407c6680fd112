"""Users' events cut into samples where each user's newest events are left for evaluation."""

import numpy as np
import pytest

from pipelines.prepare.options import SampleOptions
from pipelines.prepare.samples import Spans, UserEvents, spans

LENS = [4, 1, 2, 6]


def ranges(options: SampleOptions) -> tuple[list[tuple[int, int, int]], list[tuple[int, int, int]]]:
    """(start, middle, end) of the training and of the evaluation samples of users with so many events."""
    user_id = np.repeat(np.arange(len(LENS)), LENS)
    events = UserEvents(
        user_id=user_id,
        time=np.arange(len(user_id)),
        candidate=np.ones(len(user_id), dtype=bool),
        columns={},
        context={},
    )

    def rows(found: Spans) -> list[tuple[int, int, int]]:
        return list(zip(found.start.tolist(), found.middle.tolist(), found.end.tolist(), strict=True))

    train, evaluation = spans(events, 0, options)
    return rows(train), rows(evaluation)


def test_each_users_newest_events_are_left_for_evaluation() -> None:
    train, evaluation = ranges(SampleOptions(leave_last=1, candidates=1))
    assert evaluation == [(0, 3, 4), (5, 6, 7), (7, 12, 13)]
    # The user with two events has none left to predict from.
    assert train == [(0, 2, 3), (7, 11, 12)]
    assert ranges(SampleOptions(leave_last=2, candidates=1))[1] == [(0, 2, 4), (7, 11, 13)]


def test_a_split_in_time_beside_it_is_refused() -> None:
    with pytest.raises(ValueError, match="--split-time=5 has no effect with --leave-last"):
        SampleOptions(leave_last=1, split_time=5)
