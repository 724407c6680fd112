"""Initial values: the kernel writes the definition's bits, whatever the block and its type."""

import random

import pytest
import torch

from embeddings.rows.initial import fill_on_cpu
from embeddings.rows.initial_kernel import launch_fill

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("seed", range(6))
def test_kernel_writes_the_definitions_bits(seed: int, dtype: torch.dtype) -> None:
    draw = random.Random(seed)
    dim = draw.choice([4, 12, 64, 128])
    rows, columns = draw.choice([0, 1, 37, 200]), draw.choice([dim, dim // 2])
    # A table of more than 2^31 rows, on any stream.
    first_row, key = draw.choice([0, 2**33 + 5]), draw.choice([-(2**63), -1, 7, 2**63 - 1])
    expected = torch.empty(rows, columns, dtype=dtype)
    fill_on_cpu(expected, key, dim, (first_row, dim - columns), 0.25)
    there = torch.full((rows + 1, columns + 3), 9.0, dtype=dtype, device=DEVICE)
    launch_fill(there[:rows, :columns], key, dim, (first_row, dim - columns), 0.25)
    torch.testing.assert_close(there[:rows, :columns].cpu(), expected, rtol=0, atol=0)
    # Nothing beyond the block was touched.
    assert (there[rows:] == 9).all() and (there[:, columns:] == 9).all()
