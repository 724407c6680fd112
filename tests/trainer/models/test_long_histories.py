"""Gradients of long batches: a batch of copies of one history has that history's gradients, once for each copy.

On a GPU at the sizes of the table of lengths, 32 histories of up to 65,536 events with heads of 64; elsewhere small.
"""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from trainer.models.config import StageConfig
from trainer.models.hstu import HstuTower, build_tower
from trainer.models.layer_config import LayerConfig
from trainer.models.layout import SequenceLayout, make_layout
from trainer.models.rows import combine

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
COPIES, CANDIDATES, CONTEXT, DIM = 32 if CUDA else 3, 16, 1, 128
WINDOW = {"local": 128, "global_rows": 128} if CUDA else {"local": 16, "global_rows": 16}
FULL = (StageConfig(num_layers=3),)
ULTRA = (StageConfig(num_layers=2, **WINDOW), StageConfig(num_layers=2, **WINDOW, keep_newest=512 if CUDA else 20))
LENGTHS = (4096, 16384, 65536) if CUDA else (40, 70)


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Fresh memory holds NaN, also what PyTorch's own operations take from its cache on a GPU."""
    empty, empty_like = torch.empty, torch.empty_like

    def poisoned(x: Tensor) -> Tensor:
        return x.fill_(torch.nan) if x.is_floating_point() else x

    monkeypatch.setattr(torch, "empty", lambda *arguments, **options: poisoned(empty(*arguments, **options)))
    monkeypatch.setattr(torch, "empty_like", lambda *arguments, **options: poisoned(empty_like(*arguments, **options)))
    yield
    if CUDA:
        torch.cuda.empty_cache()


def poison_cache() -> None:
    """Leave NaN in the memory that PyTorch will hand out."""
    if CUDA:
        torch.cuda.empty_cache()
        blocks = [torch.full((2**28,), torch.nan, device=DEVICE) for _ in range(48)]
        blocks += [torch.full((2**17,), torch.nan, device=DEVICE) for _ in range(64)]
        del blocks


def layout_of(copies: int, length: int, *, padded: bool) -> SequenceLayout:
    """So many histories; padded, an empty sample and the padding behind them."""
    more = [0, 7] if padded else []
    events, candidates = torch.tensor([length] * copies + more), torch.tensor([CANDIDATES] * copies + [0] * len(more))
    on_device = (x.to(DEVICE) for x in (events, candidates))
    return make_layout(*on_device, events, candidates, num_context=CONTEXT, padded=padded)


def gradients(tower: HstuTower, x_TD: Tensor, weights_CD: Tensor, layout: SequenceLayout) -> dict[str, Tensor]:
    x_TD = x_TD.clone().requires_grad_()
    named = {"x": x_TD, **dict(tower.named_parameters())}
    poison_cache()
    with torch.autocast(DEVICE.type, torch.bfloat16):
        outputs_CD = tower.at_candidates(x_TD, layout)
        found = torch.autograd.grad((outputs_CD.float() * weights_CD).sum(), list(named.values()))
    return dict(zip(named, found, strict=True))


def difference(found: Tensor, expected: Tensor) -> float:
    """Of the norms; NaN where something is not finite."""
    return float((found.detach().float() - expected.float()).norm() / expected.float().norm())


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("stages", [FULL, ULTRA], ids=["full", "ultra"])
def test_a_batch_of_copies_has_the_gradients_of_one_history_for_each(
    stages: tuple[StageConfig, ...], length: int
) -> None:
    """Layer by layer, with padding, in memory that was NaN before."""
    if length > 16384 and stages is FULL:
        pytest.skip("minutes of full attention")
    layer = LayerConfig(num_heads=2, qk_dim=64, value_dim=64)
    torch.manual_seed(0)
    tower = build_tower(dim=DIM, layer=layer, stages=stages, num_context=CONTEXT, max_len=length + 32).to(DEVICE)
    one_TD = torch.randn(CONTEXT + length + CANDIDATES, DIM, device=DEVICE).mul_(0.04).bfloat16()
    weights_CD = torch.randn(CANDIDATES, DIM, device=DEVICE)
    expected = gradients(tower, one_TD, weights_CD, layout_of(1, length, padded=False))
    padding = 2 * CONTEXT + 7
    x_TD = torch.cat([one_TD.repeat(COPIES, 1), torch.ones(padding, DIM, device=DEVICE).bfloat16()])
    found = gradients(tower, x_TD, weights_CD.repeat(COPIES, 1), layout_of(COPIES, length, padded=True))
    assert not found["x"][len(x_TD) - padding :].any()
    differences = {name: difference(found[name], COPIES * expected[name]) for name in expected if name != "x"}
    differences["x"] = difference(found["x"][: len(x_TD) - padding], expected["x"].repeat(COPIES, 1))
    assert all(each <= 2e-2 for each in differences.values()), differences


@pytest.mark.parametrize("actions", [1, 3, 8])
@pytest.mark.parametrize("events", [131072, 524288, 2097152] if CUDA else [4096])
def test_actions_of_many_events_have_their_vectors_and_gradients(events: int, actions: int) -> None:
    """A product whose gradient has few rows, each a sum over all events."""
    generator = torch.Generator().manual_seed(0)
    taken_HA = torch.randint(2, (events, actions), generator=generator).to(DEVICE)
    vectors_AD = torch.randn(actions, DIM, generator=generator).to(DEVICE).requires_grad_()
    dout_HD = torch.randn(events, DIM, generator=generator).bfloat16().to(DEVICE)
    for _ in range(3):
        poison_cache()
        rows_HD = combine(taken_HA.bfloat16(), vectors_AD)
        (found,) = torch.autograd.grad(rows_HD, vectors_AD, dout_HD)
        assert difference(rows_HD, taken_HA.double() @ vectors_AD.detach().double()) <= 1e-2
        assert difference(found, taken_HA.t().double() @ dout_HD.double()) <= 2e-2
