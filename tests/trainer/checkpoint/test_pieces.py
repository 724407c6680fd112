"""What is not finite is found, and never saved."""

from pathlib import Path

import pytest
import torch

from tests.support.distributed import run_ranks
from tests.trainer.checkpoint import ranks
from trainer.checkpoint.pieces import Tensors, local_pieces, not_finite


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_numbers_are_finite_whose_sum_is_not(dtype: torch.dtype) -> None:
    largest = torch.finfo(dtype).max
    cases = {
        "empty": [],
        "large": [largest] * 9,
        "both signs": [largest, -largest, -largest],
        "nan": [1.0, torch.nan],
        "inf": [torch.inf, 1.0],
        "cancel": [torch.inf, -torch.inf],
    }
    tensors: Tensors = {name: torch.tensor(values, dtype=dtype) for name, values in cases.items()}
    tensors["scalar"], tensors["count"] = torch.tensor(-torch.inf, dtype=dtype), torch.tensor([2**62, 2**62])
    assert not_finite(local_pieces(tensors)) == ["cancel", "inf", "nan", "scalar"]


def test_a_state_that_is_not_finite_is_saved_by_no_rank_and_replaces_nothing(tmp_path: Path) -> None:
    for said, folders in run_ranks(2, ranks.save_not_finite, str(tmp_path / "run")):
        assert said.startswith(
            "tables/item is not finite after step 2, which is not saved; the newest checkpoint is of"
        )
        assert folders == ["step-00000001"]
