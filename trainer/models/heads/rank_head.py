"""What a ranker's head has to give.

Shapes: C candidates, D width of the tower's outputs, K outputs of all labels.
"""

from torch import Tensor, nn


class RankHead(nn.Module):
    """From what the tower says of a candidate to the outputs of its labels."""

    def forward(self, hidden_CD: Tensor) -> Tensor:
        """[C, K] float32: in bfloat16 many candidates would have the same score."""
        raise NotImplementedError

    def start_at(self, outputs_K: Tensor, *, alike: bool) -> None:
        """Let the untrained head give about these outputs or, with `alike`, exactly these for every candidate."""
        raise NotImplementedError
