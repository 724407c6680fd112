"""The dense tower of the Dirichlet benchmark, whose attention is the one thing that it varies."""

import torch

from attention_kernels import SemiLocalMask
from benchmarks.one_off.dirichlet import DenseTower
from trainer.models.hstu import HstuLayer, HstuTower, Stage
from trainer.models.layer import LayerSpec
from trainer.models.layout import EventTimes, make_layout


def test_dense_silu_attention_equals_the_tower_and_softmax_does_not() -> None:
    torch.manual_seed(0)
    spec = LayerSpec(num_heads=2, qk_dim=8, value_dim=8, max_len=6)
    tower = HstuTower([HstuLayer(dim=16, spec=spec)], [Stage(num_layers=1, mask=SemiLocalMask())])
    lens, none = torch.tensor([6, 6, 6]), torch.zeros(3, dtype=torch.long)
    layout = make_layout(lens, none, lens, none)
    x = torch.randn(18, 16)
    times = EventTimes(torch.arange(18), torch.arange(18))
    expected, silu, softmax = (
        each.at_events(x, layout, times) for each in (tower, *(DenseTower(tower, softmax=x) for x in (False, True)))
    )
    torch.testing.assert_close(silu, expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(softmax, expected, rtol=1e-2)
