"""A norm, hidden layers, and the outputs of all labels.

Shapes as in `rank_head`.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from trainer.models.heads.config import MlpConfig
from trainer.models.heads.rank_head import RankHead


class MlpHead(RankHead):
    """An MLP over a candidate's output, with SiLU behind each of the layers of width `hidden`; linear without any."""

    def __init__(self, *, dim: int, hidden: Sequence[int], num_outputs: int) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.LayerNorm(dim)]
        for width in hidden:
            layers += [nn.Linear(dim, width), nn.SiLU()]
            dim = width
        self.layers = nn.Sequential(*layers)
        self.output = nn.Linear(dim, num_outputs)

    def forward(self, hidden_CD: Tensor) -> Tensor:
        """[C, K] float32 outputs of all labels."""
        hidden_CD = self.layers(hidden_CD)
        with torch.autocast(hidden_CD.device.type, enabled=False):
            outputs_CK: Tensor = self.output(hidden_CD.float())
        return outputs_CK

    @torch.no_grad()
    def start_at(self, outputs_K: Tensor, *, alike: bool) -> None:
        """Begin with these outputs, as biases; `alike` sets the weights to 0, so that all candidates begin alike."""
        self.output.bias.copy_(outputs_K)
        if alike:
            self.output.weight.zero_()


def build(config: MlpConfig, *, dim: int, num_outputs: int) -> MlpHead:
    """The head that the config describes, over a tower of width `dim`."""
    return MlpHead(dim=dim, hidden=config.hidden, num_outputs=num_outputs)
