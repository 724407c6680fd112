"""The reference against autograd of the formula."""

import pytest
import torch

from attention_kernels import SemiLocalMask, hstu_attention, reference
from tests.attention_kernels.attention.cases import Case, errors, exact, plain

MASKS = [SemiLocalMask(num_context=2), SemiLocalMask(local=3, global_rows=2, global_columns=1, num_context=2)]


@pytest.mark.parametrize("mask", MASKS)
def test_equals_autograd_of_the_formula(mask: SemiLocalMask, monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(mask=mask, histories=(None, 0, 9, 30), targets=(0, 3, 0, 5), heads=2, value_size=8, dtype=torch.float64)
    expected = plain(case, "cpu")
    assert max(errors(exact(case, "cpu"), expected).values()) < 1e-14
    # In blocks of a few rows, as for sequences too long for one block.
    monkeypatch.setattr(reference, "_MAX_BLOCK_ELEMENTS", 200)
    assert max(errors(exact(case, "cpu"), expected).values()) < 1e-14


def test_gradients_are_numerically_right() -> None:
    q, k, v = (torch.randn(12, 1, size, dtype=torch.float64, requires_grad=True) for size in (3, 3, 2))
    offsets, targets = torch.tensor([0, 0, 12]), torch.tensor([0, 2])
    assert torch.autograd.gradcheck(lambda *x: hstu_attention(*x, offsets, MASKS[1], targets, max_len=12), (q, k, v))
