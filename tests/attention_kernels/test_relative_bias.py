"""Attention with relative biases: the formula pair by pair, gradients, and what a query may know."""

import math

import torch
from torch import Tensor

from attention_kernels.rectangle import make_rectangle
from attention_kernels.relative_bias import RelativePlaces, log_bucket, make_places, relative_attention

LENS, HEADS, QK, V, POSITIONS, BUCKETS = [3, 1, 5], 2, 4, 3, 4, 6
USER_T = torch.repeat_interleave(torch.arange(3), torch.tensor(LENS))
INDEX_T = torch.cat([torch.arange(n) for n in LENS])
TIME_T = torch.tensor([0, 1, 7, 3, 2, 2, 60, 61, 4000])
ASKED_T = torch.tensor([1, 7, 7, 3, 2, 60, 61, 4000, 4000])


def places_of(rows: slice = slice(None)) -> RelativePlaces:
    rectangle = make_rectangle(USER_T[rows], INDEX_T[rows], num_users=3, longest=5)
    return make_places(rectangle, TIME_T[rows], ASKED_T[rows], num_buckets=BUCKETS)


def inputs() -> list[Tensor]:
    torch.manual_seed(0)
    shapes = [(9, HEADS, QK), (9, HEADS, QK), (9, HEADS, V), (HEADS, POSITIONS), (HEADS, BUCKETS)]
    return [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]


def attend(q: Tensor, k: Tensor, v: Tensor, position: Tensor, time: Tensor) -> Tensor:
    return relative_attention(q, k, v, places_of(), position_HM=position, time_HG=time, scale=0.5, max_len=8)


def test_output_is_the_formula_pair_by_pair() -> None:
    q, k, v, position, time = inputs()
    out = attend(q, k, v, position, time)
    for query in range(9):
        for head in range(HEADS):
            expected = torch.zeros(V, dtype=torch.float64)
            for key in range(query - int(INDEX_T[query]), query + 1):
                bucket = min(BUCKETS - 1, int(math.log(max(1, abs(int(ASKED_T[query] - TIME_T[key])))) / 0.301))
                score = 0.5 * q[query, head] @ k[key, head]
                score = score + position[head, min(query - key, POSITIONS - 1)] + time[head, bucket]
                expected = expected + score * torch.sigmoid(score) / 8 * v[key, head]
            torch.testing.assert_close(out[query, head], expected)


def test_gradients_are_those_of_differences() -> None:
    assert torch.autograd.gradcheck(attend, inputs())


def test_buckets_are_logarithmic_and_the_last_takes_the_rest() -> None:
    assert log_bucket(torch.tensor([-5, 0, 1, 2, 60, 10**9]), BUCKETS).tolist() == [0, 0, 0, 2, 5, 5]


def test_a_later_event_changes_no_earlier_output() -> None:
    q, k, v, position, time = (x.detach() for x in inputs())
    earlier = slice(0, 8)
    short = relative_attention(
        q[earlier], k[earlier], v[earlier], places_of(earlier), position_HM=position, time_HG=time, scale=0.5, max_len=8
    )
    torch.testing.assert_close(short, attend(q, k, v, position, time)[earlier])
