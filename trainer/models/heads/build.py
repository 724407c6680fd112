"""From a head's settings to its module.  A new head is a module beside this one, its settings, and a line here."""

from collections.abc import Callable

from trainer.models.heads import dot_product, experts, mixture_of_logits, mlp
from trainer.models.heads.config import (
    DotProductConfig,
    ExpertsConfig,
    MixtureOfLogitsConfig,
    MlpConfig,
    RankHeadConfig,
    SimilarityConfig,
)
from trainer.models.heads.rank_head import RankHead
from trainer.models.heads.similarity import Similarity

SIMILARITIES: dict[type, Callable[..., Similarity]] = {
    DotProductConfig: dot_product.build,
    MixtureOfLogitsConfig: mixture_of_logits.build,
}
"""How each kind of similarity is made, by the class of its settings."""
RANK_HEADS: dict[type, Callable[..., RankHead]] = {MlpConfig: mlp.build, ExpertsConfig: experts.build}
"""The function that builds each kind of a ranker's head."""


def build_similarity(config: SimilarityConfig, *, embedding_dim: int) -> Similarity:
    """How items, rows of width `embedding_dim`, are scored."""
    return SIMILARITIES[type(config)](config, embedding_dim=embedding_dim)


def build_rank_head(config: RankHeadConfig, *, dim: int, num_outputs: int) -> RankHead:
    """The head of a ranker whose tower's outputs have the width `dim`."""
    return RANK_HEADS[type(config)](config, dim=dim, num_outputs=num_outputs)
