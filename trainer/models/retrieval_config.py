"""How the next item is predicted, alone or beside ranking.  Standard library only."""

from dataclasses import dataclass, field

from trainer.models.heads.config import DotProductConfig, SimilarityConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class RetrievalConfig:
    """Next-item prediction: sampled softmax in training, the whole corpus in evaluation."""

    num_negatives: int | None = 128
    """Items drawn uniformly beside each true one; null for all items, a full softmax, for catalogues of thousands."""
    share_negatives: bool = True
    """One draw serves all predictions of a global batch; false draws for each prediction, at as many lookups."""
    temperature: float = 0.05
    """What scores are divided by before the softmax."""
    similarity: SimilarityConfig = field(default_factory=DotProductConfig)
    """How items are scored: {"kind":"dot_product"}, {"kind":"mixture_of_logits"}, and settings of that kind
    (`trainer.models.heads.config`)."""
    read_actions: bool = False
    """Whether an event's token includes its actions."""
    read_next_time: bool = False
    """Whether an event's token includes the time until the next event, which is when the next item is asked for."""
    beside_ranking: float | None = None
    """Weight of this loss beside that of the labels, in a model that ranks as well: two heads on one trunk.  Each event
    of a history predicts the one behind it, the last one the first candidate.  Null for a retriever alone."""
    exclude_seen: bool = False
    """Leave the items of a user's history (of its data.max_history_len newest events) out of the ranking: for data in
    which nobody takes an item twice."""
    newest_events: int | None = None
    """How many of the newest events the layers read in evaluation and serving; null for data.max_history_len.  Earlier
    events then only exclude their items (exclude_seen), which costs next to nothing."""
    corpus_chunk: int = 65536
    """Items that evaluation scores at a time."""

    def __post_init__(self) -> None:
        if self.corpus_chunk < 1:
            raise ValueError(f"model.retrieval.corpus_chunk must be at least 1, got {self.corpus_chunk}")
        if self.num_negatives is not None and self.num_negatives < 1:
            raise ValueError(
                f"model.retrieval.num_negatives must be at least 1, or null for all items, got {self.num_negatives}"
            )
        if self.num_negatives is None and not self.share_negatives:
            raise ValueError(
                "model.retrieval.share_negatives=false has no effect with num_negatives=null, all items: leave it out"
            )
        if self.temperature <= 0:
            raise ValueError(f"model.retrieval.temperature must be above 0, got {self.temperature}")
        if self.newest_events is not None and (self.newest_events < 1 or not self.exclude_seen):
            raise ValueError(
                f"model.retrieval.newest_events must be at least 1, and be null without exclude_seen, for which the "
                f"events before them are read, got {self.newest_events}"
            )
        if self.beside_ranking is None:
            return
        if not self.beside_ranking > 0:
            raise ValueError(
                f"model.retrieval.beside_ranking must be above 0, got {self.beside_ranking}: a ranker alone has "
                "no model.retrieval"
            )
        if not self.share_negatives:
            raise ValueError("model.retrieval.share_negatives=false cannot be with beside_ranking: leave it out")
        if self.newest_events is not None:
            raise ValueError("model.retrieval.newest_events cannot be with beside_ranking: leave it out")
        for name in ("read_actions", "read_next_time"):
            if getattr(self, name):
                raise ValueError(
                    f"model.retrieval.{name} has no effect with beside_ranking, whose events have the ranker's tokens "
                    "(model.input): leave it out"
                )
