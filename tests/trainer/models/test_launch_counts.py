"""What a step launches, counted on any machine: layers run on tensors without data, and launches are written down.

Such tensors refuse to be read, so a tower that passes does not wait for the device either.
"""

import sys
from typing import Any

import pytest
import torch

from attention_kernels import SemiLocalMask, rows
from attention_kernels.attention import interface
from attention_kernels.attention.hopper import launchers as hopper
from attention_kernels.attention.portable import launchers as portable
from attention_kernels.layer import linear, operations
from trainer.models import hstu, relative
from trainer.models.hstu import HstuLayer, HstuTower, Stage
from trainer.models.layer import LayerSpec
from trainer.models.layer_config import LayerConfig
from trainer.models.layout import EventTimes, SequenceLayout, make_layout
from trainer.models.relative import RelativeTower
from trainer.models.relative_config import RelativeBiasConfig

DIM, LAYERS = 128, 3
FULL, WINDOW = SemiLocalMask(num_context=2), SemiLocalMask(local=256, global_rows=256, num_context=2)


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of kernels as a Hopper GPU would be given them."""
    names: list[str] = []

    def record(kernel: Any, grid: Any, *arguments: Any, **constants: Any) -> None:
        names.append(kernel.__name__)

    for name, module in list(sys.modules.items()):
        if name.startswith("attention_kernels.") and hasattr(module, "launch") and name != "attention_kernels.launcher":
            monkeypatch.setattr(module, "launch", record)
    for module in (rows, hopper, linear):
        monkeypatch.setattr(module, "is_hopper", lambda device: True)
    monkeypatch.setattr(operations, "layer_backend", lambda x: "triton")
    monkeypatch.setattr(interface, "_choose_backend", lambda *x, biased=False: portable if biased else hopper)
    # Autocast knows no device without data.
    for module in (hstu, relative):
        monkeypatch.setattr(module, "compute_dtype", lambda x: torch.bfloat16)
    return names


def tower_of(mask: SemiLocalMask) -> HstuTower:
    spec = LayerSpec(num_heads=2, qk_dim=64, value_dim=64, max_len=4096)
    with torch.device("meta"):
        layers = [HstuLayer(dim=DIM, spec=spec) for _ in range(LAYERS)]
    return HstuTower(layers, [Stage(num_layers=LAYERS, mask=mask)]).bfloat16()


def layout(*, padded: bool = False) -> SequenceLayout:
    history, candidates = torch.tensor([3000, 0, 700]), torch.tensor([3, 1, 64])
    return make_layout(history.to("meta"), candidates.to("meta"), history, candidates, num_context=2, padded=padded)


@pytest.mark.parametrize(
    ("mask", "padded", "forward", "backward"),
    [
        # Norm, the product of V, Q and K, attention, gated norm, output product; backward gated norm, the first two
        # once more, attention's three, norm.
        (FULL, False, 5, 7),
        (WINDOW, False, 5, 7),
        # Zeros behind the last sequence.
        (WINDOW, True, 6, 8),
    ],
)
def test_launches_of_a_layer_and_of_its_stage(
    mask: SemiLocalMask, padded: bool, forward: int, backward: int, launches: list[str]
) -> None:
    """A table of tiles is written once a stage and direction, however many layers there are."""
    tower, tokens = tower_of(mask), layout(padded=padded)
    x = torch.randn(tokens.num_tokens, DIM, device="meta", dtype=torch.bfloat16, requires_grad=True)
    out, _ = tower(x, tokens)
    assert launches.count("schedule_kernel") == 1
    assert len(launches) == 1 + LAYERS * forward
    launches.clear()
    out.backward(torch.empty_like(out))
    assert launches.count("schedule_kernel") == 1
    assert len(launches) == 1 + LAYERS * backward


def test_layers_with_biases_launch_two_kernels_more_backward(launches: list[str]) -> None:
    """And one a stage that looks the buckets of all pairs up."""
    config = LayerConfig(num_heads=2, qk_dim=64, value_dim=64, relative_bias=RelativeBiasConfig())
    tower = RelativeTower(dim=DIM, layer=config, num_layers=LAYERS, max_len=4096).to("meta")
    history, none = torch.tensor([3000, 0, 700]), torch.zeros(3, dtype=torch.int64)
    tokens = make_layout(history.to("meta"), none.to("meta"), history, none)
    time = torch.empty(tokens.num_tokens, dtype=torch.int64, device="meta")
    x = torch.randn(tokens.num_tokens, DIM, device="meta", dtype=torch.bfloat16, requires_grad=True)
    out = tower.at_events(x, tokens, EventTimes(time, time))
    assert launches.count("schedule_kernel") == launches.count("bucket_kernel") == 1
    assert launches.count("forward_kernel") == LAYERS and len(launches) == 2 + LAYERS * 5
    launches.clear()
    out.backward(torch.empty_like(out))
    assert launches.count("pair_sums_kernel") == launches.count("add_found_kernel") == LAYERS
    assert launches.count("schedule_kernel") == 1 and len(launches) == 1 + LAYERS * (7 + 2)
    assert all(parameter.grad is not None for parameter in tower.parameters())


def test_a_ranker_computes_its_last_layer_at_candidates(launches: list[str]) -> None:
    """Its attention has tables of its own, and no kernel is given a row of a token that is none."""
    tower = tower_of(WINDOW)
    x = torch.randn(layout().num_tokens, DIM, device="meta", dtype=torch.bfloat16, requires_grad=True)
    out = tower.at_candidates(x, layout())
    assert out.shape == (68, DIM)
    assert launches.count("schedule_kernel") == 2 and launches.count("hopper_forward_kernel") == LAYERS
    # One more than of a whole layer: the product of Q apart from that of V and K.
    assert len(launches) == 2 + 5 * LAYERS + 1
    launches.clear()
    out.backward(torch.empty_like(out))
    assert launches.count("schedule_kernel") == 2 and launches.count("hopper_dq_kernel") == LAYERS
    assert len(launches) == 2 + 7 * LAYERS + 1
