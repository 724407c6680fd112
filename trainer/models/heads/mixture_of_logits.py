"""Mixture of Logits: several small dot products of a prediction and an item, weighed by a gate that sees both.

    score(u, x) = sum over (i, j) of gate_ij(u, x) * <f_i(u), g_j(x)>

with I vectors f_i of the prediction and J vectors g_j of the item (Zhai et al., "Revisiting Neural Retrieval on
Accelerators", KDD 2023).  One dot product gives a matrix of scores of rank E at most, this is not bound by it.  The
gate is a softmax of silu(a(u) * b(x) + c(dot products)), where a, b and c are small networks.

Shapes: P predictions, N items, E outputs and rows, I and J vectors of width D, G = I x J dot products.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from trainer.models.heads.config import MixtureOfLogitsConfig
from trainer.models.heads.similarity import Similarity


class MixtureOfLogits(Similarity):
    """The similarity of the formula above.

    Args:
        embedding_dim: E.
        query_vectors: I.
        item_vectors: J.
        dim: D.
        hidden: width of the gate's hidden layers.
        normalise: divide each vector by its length.
    """

    rounding = 2e-6

    def __init__(
        self,
        *,
        embedding_dim: int,
        query_vectors: int,
        item_vectors: int,
        dim: int,
        hidden: int,
        normalise: bool = True,
    ) -> None:
        super().__init__()
        self.query_vectors, self.item_vectors, self.dim, self.normalise = query_vectors, item_vectors, dim, normalise
        products = query_vectors * item_vectors
        self.floats_per_pair = 3 * products + hidden
        self.query_projection = nn.Linear(embedding_dim, query_vectors * dim)
        self.item_projection = nn.Linear(embedding_dim, item_vectors * dim)
        self.query_gate = _network(embedding_dim, hidden, products)
        self.item_gate = _network(embedding_dim, hidden, products)
        self.pair_gate = _network(products, hidden, products)

    def queries(self, outputs_PE: Tensor) -> Tensor:
        """[P, I D + G]: vectors, then the gate's part."""
        return self._side(outputs_PE, self.query_projection, self.query_gate)

    def items(self, rows_NE: Tensor) -> Tensor:
        """[N, J D + G] likewise."""
        return self._side(rows_NE, self.item_projection, self.item_gate)

    def forward(self, queries: Tensor, items: Tensor) -> Tensor:
        """[P, N] scores."""
        with torch.autocast(queries.device.type, enabled=False):
            f_PID, query_gate_PG = self._split(queries, self.query_vectors)
            g_NJD, item_gate_NG = self._split(items, self.item_vectors)
            formula = "pid,njd->pnij" if items.dim() == 2 else "pid,pnjd->pnij"
            products_PNG = torch.einsum(formula, f_PID, g_NJD).flatten(2)
            gate_PNG = query_gate_PG[:, None] * item_gate_NG + self.pair_gate(products_PNG)
            scores: Tensor = (torch.softmax(F.silu(gate_PNG), dim=2) * products_PNG).sum(2)
            return scores

    def _side(self, rows: Tensor, projection: nn.Linear, gate: nn.Sequential) -> Tensor:
        with torch.autocast(rows.device.type, enabled=False):
            vectors: Tensor = torch.unflatten(projection(rows.float()), -1, (-1, self.dim))
            if self.normalise:
                vectors = F.normalize(vectors, dim=-1, eps=1e-6)
            return torch.cat([vectors.flatten(-2), gate(rows.float())], dim=-1)

    def _split(self, side: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """Vectors [..., count, D] and the gate's part [..., G]."""
        width = count * self.dim
        return torch.unflatten(side[..., :width], -1, (count, self.dim)), side[..., width:]


def _network(inputs: int, hidden: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(inputs, hidden), nn.SiLU(), nn.Linear(hidden, outputs))


def build(config: MixtureOfLogitsConfig, *, embedding_dim: int) -> MixtureOfLogits:
    """The mixture that the config describes, for rows of this width."""
    return MixtureOfLogits(
        embedding_dim=embedding_dim,
        query_vectors=config.query_vectors,
        item_vectors=config.item_vectors,
        dim=config.dim,
        hidden=config.hidden,
        normalise=config.normalise,
    )
