"""What `benchmarks.reuse` counts is what a checkpoint's format stores, and what so many lookups touch."""

import numpy as np
import pytest
import torch

from benchmarks.reuse import Table, zipf_touched
from trainer.checkpoint.pieces import ALIGNMENT, LivePiece
from trainer.checkpoint.region import Region

ROWS, DIM = 1000, 16


def _piece(name: str, tensor: torch.Tensor, rows: torch.Tensor | None) -> LivePiece:
    shape = tuple(tensor.shape)
    return LivePiece(name, shape, Region((0,) * len(shape), shape), tensor, rows)


@pytest.mark.parametrize("touched", [0, 7, 900, ROWS])
def test_the_bytes_are_those_of_the_format_but_for_its_alignment(touched: int) -> None:
    ids = np.random.default_rng(touched).permutation(ROWS)[:touched]
    table = Table(ROWS)
    table.look_up(np.concatenate([ids, ids]))
    delta, full = table.num_bytes(DIM)
    tensors = {"tables/t": torch.zeros(ROWS, DIM), "tables_optimizer/t/momentum": torch.zeros(ROWS)}
    rows = torch.from_numpy(np.sort(ids))
    wanted = sum(min(_piece(n, t, rows).room, _piece(n, t, None).room) for n, t in tensors.items())
    assert full == sum(tensor.nbytes for tensor in tensors.values())
    assert delta <= wanted <= delta + len(tensors) * ALIGNMENT


def test_as_many_rows_are_touched_as_draws_touch() -> None:
    weights = np.arange(1, ROWS + 1) ** -1.05
    drawn = np.random.default_rng(0).choice(ROWS, size=(50, 700), p=weights / weights.sum())
    counted = np.mean([len(set(row)) / ROWS for row in drawn])
    assert zipf_touched(ROWS, 700) == pytest.approx(counted, rel=0.02)
