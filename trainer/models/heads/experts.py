"""Experts that all outputs share, and a gate an output that mixes them.

    output_k(x) = b_k + <w_k, sum over experts e of softmax(gate_k(norm(x)))_e * silu(expert_e(norm(x)))>

as in Ma et al., "Modeling Task Relationships in Multi-task Learning with Multi-gate Mixture-of-Experts" (KDD 2018),
with one layer an expert and a linear map an output.  Labels that contradict each other may read different experts.

Shapes as in `rank_head`; X experts, H width of an expert.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from trainer.models.heads.config import ExpertsConfig
from trainer.models.heads.rank_head import RankHead


class ExpertsHead(RankHead):
    """The formula above.

    Args:
        dim: D.
        num_experts: X.
        hidden: H.
        num_outputs: K.
    """

    def __init__(self, *, dim: int, num_experts: int, hidden: int, num_outputs: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.experts = nn.Linear(dim, num_experts * hidden)
        self.gates = nn.Linear(dim, num_outputs * num_experts)
        self.weight = nn.Parameter(torch.empty(num_outputs, hidden).normal_(std=hidden**-0.5))
        self.bias = nn.Parameter(torch.zeros(num_outputs))
        self.num_experts = num_experts

    def forward(self, hidden_CD: Tensor) -> Tensor:
        """[C, K] float32 outputs of all labels."""
        normed_CD = self.norm(hidden_CD)
        experts, gates = F.silu(self.experts(normed_CD)), self.gates(normed_CD)
        with torch.autocast(hidden_CD.device.type, enabled=False):
            experts_CXH = torch.unflatten(experts.float(), 1, (self.num_experts, -1))
            gates_CKX = torch.unflatten(gates.float(), 1, (-1, self.num_experts)).softmax(dim=2)
            return ((gates_CKX @ experts_CXH) * self.weight).sum(2) + self.bias

    @torch.no_grad()
    def start_at(self, outputs_K: Tensor, *, alike: bool) -> None:
        """Begin with these outputs, as biases; `alike` sets the weights to 0, so that all candidates begin alike."""
        self.bias.copy_(outputs_K)
        if alike:
            self.weight.zero_()


def build(config: ExpertsConfig, *, dim: int, num_outputs: int) -> ExpertsHead:
    """The head that the config describes, over a tower of width `dim`."""
    return ExpertsHead(dim=dim, num_experts=config.num_experts, hidden=config.hidden, num_outputs=num_outputs)
