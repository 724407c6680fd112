"""Users skip a layer at random, and the others make up for it."""

import pytest
import torch

from trainer.models.hstu import skip_users
from trainer.models.layout import make_layout


def test_a_skipped_layer_is_the_identity_and_the_others_make_up_for_it() -> None:
    """User by user: x, or x plus what the layer adds over the probability that it runs."""
    lens, none = torch.full((400,), 3), torch.zeros(400, dtype=torch.long)
    layout = make_layout(lens, none, lens, none)
    x, added = torch.randn(1200, 4), torch.randn(1200, 4)
    torch.manual_seed(0)
    change = (skip_users(x, x + added, layout.user_T, 400, 0.25) - x).view(400, -1)
    kept = change.abs().amax(1) > 1e-4
    torch.testing.assert_close(change[kept], (added / 0.75).view(400, -1)[kept], rtol=1e-4, atol=1e-5)
    assert float(kept.double().mean()) == pytest.approx(0.75, abs=0.07)
    assert float(change[~kept].abs().max()) == 0


def test_the_factor_is_not_rounded_to_the_type_of_computation() -> None:
    """A factor in bfloat16, 1.0546875 for 1 / 0.95, would be 0.2% too large in every step."""
    lens, none = torch.full((4000,), 1), torch.zeros(4000, dtype=torch.long)
    layout = make_layout(lens, none, lens, none)
    x, output = torch.zeros(4000, 4, dtype=torch.bfloat16), torch.full((4000, 4), 190.0, dtype=torch.bfloat16)
    skipped = skip_users(x, output, layout.user_T, 4000, 0.05)
    assert skipped.dtype == torch.bfloat16
    assert skipped.unique().tolist() == [0.0, 200.0]
