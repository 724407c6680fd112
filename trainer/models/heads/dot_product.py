"""The dot product of an output with an item's row, or their cosine.

Shapes as in `similarity`.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from trainer.models.heads.config import DotProductConfig
from trainer.models.heads.similarity import Similarity


class DotProduct(Similarity):
    """The dot product of both sides; it has no parameters.  `normalise` divides both by their length."""

    def __init__(self, *, normalise: bool = True) -> None:
        super().__init__()
        self.normalise = normalise

    def queries(self, outputs_PE: Tensor) -> Tensor:
        """[P, E] the predictions as they are scored."""
        return F.normalize(outputs_PE.float(), dim=-1, eps=1e-6) if self.normalise else outputs_PE.float()

    def items(self, rows_NE: Tensor) -> Tensor:
        """[N, E], scaled as outputs are."""
        return self.queries(rows_NE)

    def forward(self, queries: Tensor, items: Tensor) -> Tensor:
        """[P, N] scores."""
        # 16 bits would round a cosine of 1, over a temperature of 0.05, by 0.08.
        with torch.autocast(queries.device.type, enabled=False):
            if items.dim() == 2:
                return queries @ items.t()
            return torch.einsum("pe,pne->pn", queries, items)


def build(config: DotProductConfig, *, embedding_dim: int) -> DotProduct:
    """The dot product that the config describes; it takes any width."""
    return DotProduct(normalise=config.normalise)
