"""What heads are made of: the settings of each kind, and its FLOPs.  Standard library only.

`trainer.models.heads.build` turns these values into modules.
"""

import itertools
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True, slots=True)
class DotProductConfig:
    """Score an item by the dot product of its row with a prediction (`trainer.models.heads.dot_product`)."""

    kind: Literal["dot_product"] = "dot_product"
    """The word that chooses this head."""
    normalise: bool = True
    """L2-normalise outputs and item vectors: scores are then cosines."""

    @property
    def pair_values(self) -> int:
        """Numbers kept of a prediction and an item, besides their score."""
        return 0

    def query_flops(self, embedding_dim: int) -> int:
        """Forward FLOPs of a prediction's side."""
        return 0

    def item_flops(self, embedding_dim: int) -> int:
        """Forward FLOPs of an item's side."""
        return 0

    def pair_flops(self, embedding_dim: int) -> int:
        """Forward FLOPs of a prediction and an item, both sides given."""
        return 2 * embedding_dim


@dataclass(frozen=True, kw_only=True, slots=True)
class MixtureOfLogitsConfig:
    """Score an item by a gated mixture of small dot products (`trainer.models.heads.mixture_of_logits`)."""

    kind: Literal["mixture_of_logits"] = "mixture_of_logits"
    """The word that chooses this head."""
    query_vectors: int = 8
    """Vectors of a prediction."""
    item_vectors: int = 4
    """Vectors of an item; every one meets every vector of the prediction."""
    dim: int = 32
    """Width of a vector."""
    hidden: int = 128
    """Width of the hidden layers of the gate's networks."""
    normalise: bool = True
    """L2-normalise the vectors: the mixed scores are then cosines."""

    def __post_init__(self) -> None:
        for name in ("query_vectors", "item_vectors", "dim", "hidden"):
            if getattr(self, name) < 1:
                raise ValueError(f"mixture_of_logits: {name} must be at least 1, got {getattr(self, name)}")

    @property
    def products(self) -> int:
        """Dot products of a pair."""
        return self.query_vectors * self.item_vectors

    @property
    def pair_values(self) -> int:
        """Numbers kept of a prediction and an item, besides their score: products, gates, the gate's network."""
        return 3 * self.products + 2 * self.hidden

    def query_flops(self, embedding_dim: int) -> int:
        """Vectors, and the gate's network."""
        return self._side_flops(embedding_dim, self.query_vectors)

    def item_flops(self, embedding_dim: int) -> int:
        """Vectors, and the gate's network."""
        return self._side_flops(embedding_dim, self.item_vectors)

    def _side_flops(self, embedding_dim: int, vectors: int) -> int:
        return 2 * (embedding_dim * vectors * self.dim + self.hidden * (embedding_dim + self.products))

    def pair_flops(self, embedding_dim: int) -> int:
        """Dot products, and the gate's network on them."""
        return 2 * (self.products * self.dim + 2 * self.products * self.hidden)


SimilarityConfig = DotProductConfig | MixtureOfLogitsConfig
"""How a retriever scores items."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MlpConfig:
    """Hidden layers, then the outputs of all labels (`trainer.models.heads.mlp`)."""

    kind: Literal["mlp"] = "mlp"
    """The word that chooses this head."""
    hidden: tuple[int, ...] = ()
    """Widths of the hidden layers; without any, outputs are linear in what the tower says of a candidate."""

    def __post_init__(self) -> None:
        if any(width < 1 for width in self.hidden):
            raise ValueError(f"mlp: hidden must hold widths of at least 1, got {self.hidden}")

    def flops(self, dim: int, num_outputs: int) -> int:
        """Forward FLOPs of a candidate."""
        return 2 * sum(below * above for below, above in itertools.pairwise([dim, *self.hidden, num_outputs]))


@dataclass(frozen=True, kw_only=True, slots=True)
class ExpertsConfig:
    """Hidden layers side by side, which every output mixes by a gate of its own (`trainer.models.heads.experts`)."""

    kind: Literal["experts"] = "experts"
    """The word that chooses this head."""
    num_experts: int = 4
    """Hidden layers side by side."""
    hidden: int = 64
    """Width of each expert's hidden layer."""

    def __post_init__(self) -> None:
        for name in ("num_experts", "hidden"):
            if getattr(self, name) < 1:
                raise ValueError(f"experts: {name} must be at least 1, got {getattr(self, name)}")

    def flops(self, dim: int, num_outputs: int) -> int:
        """Forward FLOPs of a candidate: experts and gates, the mixtures, and an output of each."""
        layers = self.num_experts * (self.hidden + num_outputs)
        return 2 * (dim * layers + num_outputs * self.hidden * (self.num_experts + 1))


RankHeadConfig = MlpConfig | ExpertsConfig
"""From what a ranker's tower says of a candidate to the outputs of its labels."""
