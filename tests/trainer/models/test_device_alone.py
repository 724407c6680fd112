"""Parts of a recorded step that no model of `test_recording.py` has: none waits for the device or copies to it."""

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.support.device_alone import DeviceAlone, without_autocast
from tests.trainer.labels.test_kinds import KINDS, NUMBERS
from tests.trainer.labels.test_kinds import build as build_kind
from tests.trainer.models.heads.test_rank_heads import DIM, HEADS, OUTPUTS
from tests.trainer.models.heads.test_similarity import SIMILARITIES, WIDTH
from tests.trainer.models.test_rates import make_numbers, make_rates
from trainer.labels.config import LabelConfig
from trainer.labels.loss import RankingLoss
from trainer.models.heads.build import build_rank_head

META = torch.device("meta")
pytestmark = pytest.mark.usefixtures("no_autocast")


@pytest.fixture
def no_autocast(monkeypatch: pytest.MonkeyPatch) -> None:
    without_autocast(monkeypatch)


def differentiate(module: torch.nn.Module, result: Tensor, *inputs: Tensor) -> None:
    torch.autograd.grad(result.sum(), [*inputs, *module.parameters()], allow_unused=True)


@pytest.mark.parametrize("case", KINDS)
@pytest.mark.parametrize("keep_rate", ["weight", "shift", "ignore"])
def test_labels_with_weights_and_keep_rates(case: str, keep_rate: Any) -> None:
    name, settings = KINDS[case]
    if keep_rate == "shift" and "kind" in settings:
        return
    config = LabelConfig(name=name, keep_rate=keep_rate, **settings)
    loss = RankingLoss([build_kind(name, **settings)], [config], weight="weight", keep_rate="kept").to(META).train()
    values = {**NUMBERS.values, "weight": torch.ones(4).double(), "kept": torch.ones(4).double()}
    labels = SimpleNamespace(
        action=NUMBERS.action.int().to(META),
        values={key: value.to(META) for key, value in values.items()},
        loss_denominator=torch.ones((), device=META),
    )
    inputs = SimpleNamespace(padded=True, num_candidates=torch.ones(3, dtype=torch.long, device=META))
    outputs = torch.randn(4, loss.num_outputs, device=META, requires_grad=True)
    with DeviceAlone():
        differentiate(loss, loss(outputs, None, SimpleNamespace(labels=labels, inputs=inputs)), outputs)


@pytest.mark.parametrize("name", SIMILARITIES)
def test_similarities(name: str) -> None:
    similarity = copy.deepcopy(SIMILARITIES[name]).to(META)
    outputs, rows = (torch.randn(count, WIDTH, device=META, requires_grad=True) for count in (6, 9))
    with DeviceAlone():
        differentiate(similarity, similarity(similarity.queries(outputs), similarity.items(rows)), outputs, rows)


@pytest.mark.parametrize("name", HEADS)
def test_rank_heads(name: str) -> None:
    head = build_rank_head(HEADS[name], dim=DIM, num_outputs=OUTPUTS).to(META)
    hidden = torch.randn(7, DIM, device=META, requires_grad=True)
    with DeviceAlone():
        differentiate(head, head(hidden), hidden)


def test_rates_of_counts() -> None:
    rates = make_rates("item", "user").to(META)
    numbers = {name: value.to(META) for name, value in make_numbers(rates.counts, size=7).items()}
    with DeviceAlone():
        of_tokens, of_logits = rates(numbers)
        differentiate(rates, of_tokens.sum() + of_logits.sum())
