"""The mask's description and its dense form."""

import pytest
import torch

from attention_kernels import SemiLocalMask
from attention_kernels.reference import dense_mask


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        ({"local": -1}, "local"),
        ({"local": 1.5}, "local"),
        ({"local": True}, "local"),
        ({"local": 2**31}, "local"),
        ({"local": 1, "global_rows": -1}, "global_rows"),
        ({"local": 1, "global_columns": None}, "global_columns"),
        ({"num_context": "3"}, "num_context"),
        ({"global_rows": 1}, "global_rows"),
        ({"global_columns": 1}, "global_columns"),
    ],
)
def test_wrong_fields_are_named(fields: dict[str, object], name: str) -> None:
    with pytest.raises(ValueError, match=f"mask.{name}="):
        SemiLocalMask(**fields)  # type: ignore[arg-type]


def test_worked_example() -> None:
    """L = 6, K1 = K2 = 2: row 3 sees 1..3, the two newest rows see everything before them."""
    rows = [row.nonzero().flatten().tolist() for row in dense_mask(SemiLocalMask(local=2, global_rows=2), 6, 0)]
    assert rows == [[0], [0, 1], [0, 1, 2], [1, 2, 3], [0, 1, 2, 3, 4], [0, 1, 2, 3, 4, 5]]


@pytest.mark.parametrize(("k1", "k2", "n"), [(256, 256, 3072), (256, 128, 3072), (3, 5, 64)])
def test_number_of_pairs(k1: int, k2: int, n: int) -> None:
    expected = (k1 + 1) * (n - k2) - k1 * (k1 + 1) // 2 + k2 * n - k2 * (k2 - 1) // 2
    assert dense_mask(SemiLocalMask(local=k1, global_rows=k2), n, 0).sum().item() == expected


def test_window_of_the_length_is_full_causal() -> None:
    assert torch.equal(
        dense_mask(SemiLocalMask(local=9, num_context=2), 10, 3), dense_mask(SemiLocalMask(num_context=2), 10, 3)
    )


def test_table_element_by_element() -> None:
    """An independent transcription of the table, one pair at a time."""
    mask = SemiLocalMask(local=3, global_rows=2, global_columns=2, num_context=2)
    c, h, t = 2, 9, 3
    n = c + h + t
    expected = torch.zeros(n, n, dtype=torch.bool)
    for q in range(n):
        for k in range(n):
            if k >= c + h:
                expected[q, k] = q == k
            elif k < c or q < c or q >= c + h:
                expected[q, k] = True
            else:
                near = q - k <= 3 or q >= c + h - 2 or k - c < 2
                expected[q, k] = k <= q and near
    assert torch.equal(dense_mask(mask, h, t), expected)
