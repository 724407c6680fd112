"""Heads of rankers: each kind's start, learning and cost, and the experts' formula."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from trainer.models.heads.build import build_rank_head
from trainer.models.heads.config import ExpertsConfig, MlpConfig, RankHeadConfig
from trainer.models.heads.experts import ExpertsHead

DIM, OUTPUTS = 10, 3
HEADS: dict[str, RankHeadConfig] = {
    "linear": MlpConfig(),
    "mlp": MlpConfig(hidden=(8, 6)),
    "experts": ExpertsConfig(num_experts=4, hidden=5),
}


@pytest.mark.parametrize("name", HEADS)
def test_a_head_starts_as_it_is_told_and_every_parameter_learns(name: str) -> None:
    torch.manual_seed(0)
    head, start = build_rank_head(HEADS[name], dim=DIM, num_outputs=OUTPUTS), torch.tensor([-2.0, 0.0, 3.0])
    hidden = torch.randn(400, DIM)
    head.start_at(start, alike=False)
    outputs = head(hidden)
    assert outputs.dtype == torch.float32 and outputs.std(dim=0).min() > 0.01
    torch.testing.assert_close(outputs.mean(dim=0), start, rtol=0, atol=0.5)
    (outputs * torch.randn_like(outputs)).sum().backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in head.parameters())
    head.start_at(start, alike=True)
    torch.testing.assert_close(head(hidden), start.expand(400, OUTPUTS))


@pytest.mark.parametrize("name", HEADS)
def test_flops_are_those_of_the_products(name: str) -> None:
    head = build_rank_head(HEADS[name], dim=DIM, num_outputs=OUTPUTS)
    with FlopCounterMode(display=False) as counted:
        head(torch.randn(7, DIM))
    # The counter sees matrix products; the experts' last product is written as one of elements.
    last = 7 * 2 * OUTPUTS * 5 if name == "experts" else 0
    assert counted.get_total_flops() + last == 7 * HEADS[name].flops(DIM, OUTPUTS)


def test_experts_follow_their_formula() -> None:
    torch.manual_seed(0)
    head = ExpertsHead(dim=DIM, num_experts=4, hidden=5, num_outputs=OUTPUTS)
    x = torch.randn(DIM)
    normed = (x - x.mean()) / (x.var(correction=0) + 1e-5).sqrt()
    experts = (head.experts.weight @ normed + head.experts.bias).view(4, 5)
    experts = experts * torch.sigmoid(experts)
    gates = (head.gates.weight @ normed + head.gates.bias).view(OUTPUTS, 4).exp()
    for k in range(OUTPUTS):
        mixed = sum(gates[k, e] / gates[k].sum() * experts[e] for e in range(4))
        torch.testing.assert_close(head(x[None])[0, k], head.weight[k] @ mixed + head.bias[k])


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        (MlpConfig, {"hidden": (8, 0)}, r"mlp: hidden must hold widths of at least 1, got \(8, 0\)"),
        (ExpertsConfig, {"num_experts": 0}, "experts: num_experts must be at least 1, got 0"),
    ],
)
def test_settings_that_a_head_cannot_have_are_refused(kind: type, settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        kind(**settings)
