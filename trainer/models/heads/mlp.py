"""The ranker's head: a norm, hidden layers, and the outputs of all labels.

Shapes: C candidates, D width of the tower's outputs, K outputs of all labels.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class MlpHead(nn.Module):
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
        """[C, K] float32."""
        hidden_CD = self.layers(hidden_CD)
        # In bfloat16 many candidates would have the same score.
        with torch.autocast(hidden_CD.device.type, enabled=False):
            outputs_CK: Tensor = self.output(hidden_CD.float())
        return outputs_CK
