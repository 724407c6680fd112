"""Layers with relative biases: their own backward against the plain layer that autograd differentiates."""

from typing import Any

import pytest
import torch
from torch import Tensor

from attention_kernels.attention import checks, interface
from attention_kernels.attention.portable import launchers as portable
from attention_kernels.layer import operations
from trainer.models.layer import LayerBatch, plain_layer
from trainer.models.layer_config import LayerConfig
from trainer.models.layout import EventTimes, SequenceLayout, make_layout
from trainer.models.relative import RelativeLayer, RelativeTower
from trainer.models.relative_config import MAX_TIME_BUCKETS, RelativeBiasConfig

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DIM, LENS, PADDING = 16, [9, 0, 17, 1], 4
KEPT: dict[str, Any] = {"recompute_normed": False, "recompute_uvqk": False, "recompute_gated": False}


def tower_of(**settings: Any) -> RelativeTower:
    torch.manual_seed(0)
    biases = RelativeBiasConfig(num_time_buckets=9)
    config = LayerConfig(num_heads=2, qk_dim=8, value_dim=12, relative_bias=biases, **settings)
    tower = RelativeTower(dim=DIM, layer=config, num_layers=2, max_len=20)
    for parameter in tower.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return tower.double()


def events(*, padded: bool = False) -> tuple[Tensor, SequenceLayout, EventTimes]:
    generator = torch.Generator().manual_seed(1)
    lens = torch.tensor([*LENS, PADDING] if padded else LENS)
    layout = make_layout(lens, torch.zeros_like(lens), lens, torch.zeros_like(lens), padded=padded)
    x, time, asked = (torch.randn(31, size, generator=generator).double() for size in (DIM, 1, 1))
    rows = layout.num_tokens
    # Seconds of every order.
    times = EventTimes(*((20 * y).exp().long().abs()[:rows, 0] for y in (time, asked)))
    return x[:rows].requires_grad_(), layout, times


def differentiated(tower: RelativeTower, out: Tensor, x: Tensor) -> list[Tensor]:
    dout = torch.linspace(-1, 1, out.numel(), dtype=out.dtype, device=out.device).view(out.shape)
    return [out.detach(), *torch.autograd.grad(out, [x, *tower.parameters()], dout)]


def plain(tower: RelativeTower) -> list[Tensor]:
    x, layout, times = events()
    out = x
    for layer in tower.layers:
        assert isinstance(layer, RelativeLayer)
        out = plain_layer(out, layer.parameter_set(), layer.spec, LayerBatch(plan=tower._plan(layout, times)))
    return differentiated(tower, out, x)


@pytest.mark.parametrize("settings", [{}, KEPT, {"scale": 1.0}])
def test_a_layers_own_backward_is_that_of_autograd(settings: dict[str, Any]) -> None:
    tower = tower_of(**settings)
    x, layout, times = events()
    found = differentiated(tower, tower.at_events(x, layout, times), x)
    for actual, expected in zip(found, plain(tower), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-7, atol=1e-9)


def test_kernels_equal_the_plain_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    """In float32 against float64; padding behind the sequences changes nothing."""
    tower = tower_of()
    wanted = plain(tower)
    monkeypatch.setattr(operations, "layer_backend", lambda x: "triton")
    monkeypatch.setattr(interface, "_choose_backend", lambda *_, biased: portable if biased else None)
    tower.to(DEVICE, torch.float32)
    x, layout, times = events(padded=True)
    of_lens = (each.to(DEVICE) for each in (layout.history_lens, layout.num_candidates))
    layout = make_layout(*of_lens, layout.history_lens_host, layout.num_candidates_host, padded=True)
    x = x.detach().to(DEVICE, torch.float32).requires_grad_()
    out = tower.at_events(x, layout, EventTimes(*(each.to(DEVICE) for each in times)))[: sum(LENS)]
    found = differentiated(tower, out, x)
    found[1] = found[1][: sum(LENS)]
    for actual, expected in zip(found, wanted, strict=True):
        scale = float(expected.abs().max())
        torch.testing.assert_close(actual.double().cpu() / scale, expected / scale, rtol=0, atol=1e-4)


@pytest.mark.parametrize("count", [0, 257])
def test_as_many_time_buckets_as_a_byte_tells_apart(count: int) -> None:
    assert MAX_TIME_BUCKETS == checks.MAX_TIME_BUCKETS
    with pytest.raises(ValueError, match=f"num_time_buckets must lie in 1 to 256, got {count}"):
        RelativeBiasConfig(num_time_buckets=count)


def test_what_is_kept_of_a_layer_has_no_pair_of_events_in_it() -> None:
    tower = tower_of()
    x, layout, times = events()
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda y: kept.append(y) or y, lambda y: y):
        tower.at_events(x, layout, times)
    own = {parameter.data_ptr() for parameter in tower.parameters()}
    # The input, U before SiLU and the attention output.
    assert {tuple(y.shape) for y in kept if y.data_ptr() not in own} == {(27, DIM), (27, 24)}
