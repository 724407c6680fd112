"""Layouts: truncation and choice of events against lists of Python, candidates and context kept."""

import torch
from torch import Tensor

from trainer.models.layout import (
    SequenceLayout,
    candidate_rows,
    count_events,
    history_rows,
    keep_events,
    keep_newest,
    make_layout,
    take_rows,
)

HISTORY, CANDIDATES, CONTEXT = [5, 0, 2, 7], [2, 3, 0, 1], 2


def labelled() -> tuple[SequenceLayout, Tensor]:
    """A layout, and for each token a number that says user, kind and place: user * 100 + kind * 10 + index."""
    history, candidates = torch.tensor(HISTORY), torch.tensor(CANDIDATES)
    layout = make_layout(history, candidates, history, candidates, num_context=CONTEXT)
    return layout, torch.tensor(
        [
            user * 100 + kind * 10 + index
            for user, (h, t) in enumerate(zip(HISTORY, CANDIDATES, strict=True))
            for kind, count in enumerate((CONTEXT, h, t))
            for index in range(count)
        ]
    )


def test_candidate_rows_are_the_candidates_in_order() -> None:
    layout, labels = labelled()
    assert [label for label in labels.tolist() if label % 100 >= 20] == labels[candidate_rows(layout)].tolist()


def test_history_rows_are_the_events_in_order() -> None:
    layout, labels = labelled()
    assert [label for label in labels.tolist() if label % 100 // 10 == 1] == labels[history_rows(layout)].tolist()


def test_truncation_keeps_newest_events_all_candidates_and_context() -> None:
    layout, labels = labelled()
    new, rows = keep_newest(layout, 3)
    expected = [label for label in labels.tolist() if label % 100 // 10 != 1 or label % 10 >= HISTORY[label // 100] - 3]
    assert labels[rows].tolist() == expected
    assert new.history_lens.tolist() == new.history_lens_host.tolist() == [3, 0, 2, 3]
    assert new.num_tokens == len(expected)


def test_chosen_events_keep_their_order_and_all_candidates_and_context() -> None:
    layout, labels = labelled()
    is_history = labels % 100 // 10 == 1
    keep = (labels % 2 == 0)[is_history]
    new, rows = keep_events(layout, keep)
    expected = [label for label in labels.tolist() if label % 100 // 10 != 1 or label % 2 == 0]
    assert labels[rows].tolist() == expected
    assert new.history_lens.tolist() == [3, 0, 1, 4]
    assert count_events(layout.history_lens_host, keep).tolist() == [3, 0, 1, 4]


def test_taking_rows_differentiates_like_indexing() -> None:
    x = torch.randn(6, 3, dtype=torch.float64, requires_grad=True)
    rows = torch.tensor([4, 0, 5])
    assert torch.autograd.gradcheck(lambda x: take_rows(x, rows), x)
    assert torch.equal(take_rows(x, rows), x[rows])
