"""The retriever: predict the next item of a user's events among all items.

Causal layers over item tokens; the output at each event predicts the event behind it.  Training scores the true item
against sampled ones (sampled softmax); evaluation ranks it among all items (`trainer.evaluation.next_item`).

Shapes: B users, S events of all users, P predictions, N negatives, D model width, E row width of the item table.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from attention_kernels.relative_bias import log_bucket
from embeddings.tables import Rows, Tables, rows_by_feature
from pipelines.features import ITEM_ID
from trainer.models.config import ModelConfig
from trainer.models.heads.build import build_similarity
from trainer.models.heads.similarity import Similarity
from trainer.models.hstu import build_tower
from trainer.models.layout import EventTimes, SequenceLayout, enumerate_users, make_layout, take_rows
from trainer.models.model import Model
from trainer.models.negatives import NEGATIVE_FEATURE, RetrievalBatch, SequenceInputs
from trainer.models.precision import compute_dtype
from trainer.models.relative import RelativeTower
from trainer.models.rows import combine, learned_vectors
from trainer.models.softmax import SoftmaxTower


@dataclass(frozen=True, slots=True)
class EventOutputs:
    """What the tower says at every event of a batch."""

    vectors: Tensor
    """[S, E]: to be compared with items by the tower's similarity."""
    layout: SequenceLayout
    """Where each user's events lie."""


class EventTower(Protocol):
    """Causal layers over tokens of events."""

    def at_events(self, x_TD: Tensor, layout: SequenceLayout, times: EventTimes) -> Tensor:
        """The output at every event of a batch of nothing but events, [T, D]."""


class RetrieverTower(nn.Module):
    """All of the retriever but its table: from looked-up rows to an output at every event.

    Args:
        tower: causal layers over tokens of width `dim`.
        similarity: scores items against outputs; part of the tower because it may hold parameters.
        dim: D.
        embedding_dim: E; where it is not D, one linear map before the tower and one behind it.
        max_len: the longest sequence that the tower's attention is made for.
        num_positions: position vectors, counted from the oldest event; later events share the last.
        num_actions: actions that tokens tell.
        num_time_buckets: vectors of the time to the next event that tokens tell; 0 for none.
        dropout: probability of zeroing an element of the tokens while training.
    """

    def __init__(
        self,
        tower: EventTower,
        similarity: Similarity,
        *,
        dim: int,
        embedding_dim: int,
        max_len: int,
        num_positions: int,
        num_actions: int = 0,
        num_time_buckets: int = 0,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.tower, self.similarity, self.max_len, self.dropout = tower, similarity, max_len, dropout
        # Nothing is cast first, since items' rows are compared as they are.
        self.cast_first: frozenset[str] = frozenset()
        same = embedding_dim == dim
        self.item_projection = nn.Identity() if same else nn.Linear(embedding_dim, dim)
        self.output_projection = nn.Identity() if same else nn.Linear(dim, embedding_dim)
        self.position_vectors = learned_vectors(num_positions, dim)
        self.action_vectors = learned_vectors(num_actions, dim) if num_actions else None
        self.next_time_vectors = learned_vectors(num_time_buckets, dim) if num_time_buckets else None
        # As in the HSTU papers' code, so that items outweigh positions.
        self.item_factor = dim**0.5

    def check(self, inputs: SequenceInputs) -> None:
        """Raises ValueError where a sequence is longer than the model's constant."""
        lens = inputs.lens_host[: inputs.lens_host.numel() - inputs.padded]
        if lens.numel() and int(lens.max()) > self.max_len:
            raise ValueError(
                f"a sequence has {int(lens.max())} events, more than model.max_len={self.max_len}: raise max_len, or "
                "lower data.max_history_len or data.max_candidates"
            )

    def forward(self, looked_up: list[Rows], inputs: SequenceInputs) -> EventOutputs:
        """The output at every event.

        Raises:
            ValueError: a sequence is longer than the model's constant.
        """
        self.check(inputs)
        return self.encode(rows_by_feature(looked_up)[ITEM_ID].values(), inputs)

    def encode(self, items_SE: Tensor, inputs: SequenceInputs) -> EventOutputs:
        """As `forward`, from the rows of the events' items, oldest first, for sequences of at most `max_len`."""
        lens, lens_host = inputs.lens, inputs.lens_host
        none, none_host = torch.zeros_like(lens), torch.zeros_like(lens_host)
        layout = make_layout(lens, none, lens_host, none_host, padded=inputs.padded)
        dtype = compute_dtype(self.position_vectors)
        position_S = layout.index_T.clamp(max=self.position_vectors.shape[0] - 1)
        tokens_SD = (self.item_projection(items_SE.to(dtype)) + self._told(inputs, dtype)) * self.item_factor
        tokens_SD = tokens_SD + F.embedding(position_S, self.position_vectors.to(dtype))
        tokens_SD = F.dropout(tokens_SD, self.dropout, self.training)
        outputs_SD = self.tower.at_events(tokens_SD, layout, EventTimes(inputs.time, inputs.next_time))
        return EventOutputs(self.output_projection(outputs_SD), layout)

    def _told(self, inputs: SequenceInputs, dtype: torch.dtype) -> Tensor | float:
        """What tokens tell of events besides their items, [S, D]; 0 for nothing."""
        told: Tensor | float = 0.0
        if self.action_vectors is not None:
            bits = torch.arange(self.action_vectors.shape[0], device=inputs.action.device)
            told = combine((inputs.action[:, None] >> bits & 1).to(dtype), self.action_vectors)
        if self.next_time_vectors is not None:
            bucket_S = log_bucket(inputs.next_time - inputs.time, self.next_time_vectors.shape[0])
            told = told + F.embedding(bucket_S, self.next_time_vectors.to(dtype))
        return told


class SampledSoftmax(nn.Module):
    """The loss of the next item behind every event: the true item against sampled ones.

    Args:
        similarity: the tower's.
        temperature: divides the scores.
    """

    def __init__(self, similarity: Similarity, *, temperature: float) -> None:
        super().__init__()
        self.similarity, self.temperature = similarity, temperature

    def forward(self, outputs: EventOutputs, looked_up: list[Rows], batch: RetrievalBatch) -> Tensor:
        """The sum over every event that has one behind it, over `batch.loss_denominator`; 0, with zero gradients, where
        there is none."""
        rows = rows_by_feature(looked_up)
        items_SE, negatives = rows[ITEM_ID].values(), rows[NEGATIVE_FEATURE].values()
        rows_P = rows_with_next(outputs.layout)
        # -1 stands for no event, and stays -1.
        next_P = rows_P + (rows_P >= 0)
        own = batch.negative_ids.dim() == 2
        losses_P = self.of_predictions(
            take_rows(outputs.vectors, rows_P),
            take_rows(items_SE, next_P),
            negatives.view(*batch.negative_ids.shape, negatives.shape[1]) if own else negatives,
            batch.negative_ids == batch.inputs.item_ids[next_P][:, None],
        )
        if outputs.layout.padded:
            losses_P = torch.where(rows_P >= 0, losses_P, 0)
        # The last terms keep every parameter and row in the graph of a batch without predictions.
        unused = (outputs.vectors.sum() + negatives.sum()) * 0 if not rows_P.numel() else 0
        return losses_P.sum() / batch.loss_denominator + unused

    def of_predictions(self, outputs_PE: Tensor, positives_PE: Tensor, negatives: Tensor, hits_PN: Tensor) -> Tensor:
        """Loss of each prediction, [P]; a negative that is the true item (`hits_PN`) is left out of its sum.

        Items are rows of the table: `negatives` [N, E] serve all predictions, [P, N, E] are each one's own.
        """
        queries = self.similarity.queries(outputs_PE)
        positive_P1 = self.similarity(queries, self.similarity.items(positives_PE[:, None]))
        negative_PN = self.similarity(queries, self.similarity.items(negatives)).masked_fill(hits_PN, float("-inf"))
        logits = torch.cat([positive_P1, negative_PN], dim=1) / self.temperature
        return logits.logsumexp(1) - logits[:, 0]


def rows_with_next(layout: SequenceLayout) -> Tensor:
    """Every event but each user's last, [P]; for layouts without context and candidates.

    Of a padded layout, as many as there are events but one: -1 behind those that another follows.
    """
    if layout.padded:
        return _padded_rows_with_next(layout)
    count, count_host = ((lens - 1).clamp(min=0) for lens in (layout.history_lens, layout.history_lens_host))
    return _rows(layout.offsets[:-1], count, count_host)


def _padded_rows_with_next(layout: SequenceLayout) -> Tensor:
    count, total = (layout.history_lens[:-1] - 1).clamp(min=0), layout.num_tokens - 1
    count = torch.cat([count, total - count.sum(0, keepdim=True)])
    user_P, index_P = enumerate_users(count, total)
    return torch.where(user_P < layout.num_users - 1, layout.offsets[user_P] + index_P, -1)


def evaluated_rows(layout: SequenceLayout, count: Tensor, count_host: Tensor) -> Tensor:
    """The event in front of each of a user's last `count` [B] events, [P]; a user's first event has none."""
    limit, limit_host = (layout.history_lens - 1).clamp(min=0), (layout.history_lens_host - 1).clamp(min=0)
    count = torch.minimum(count, limit)
    return _rows(layout.offsets[:-1] + limit - count, count, torch.minimum(count_host, limit_host))


def _rows(first: Tensor, count: Tensor, count_host: Tensor) -> Tensor:
    """`count` [B] rows from `first` [B] on, user by user."""
    user_P, index_P = enumerate_users(count, int(count_host.sum()))
    return first[user_P] + index_P


def _build_event_tower(config: ModelConfig) -> EventTower:
    dim, layer, stages, max_len = config.dim, config.layer, config.stages, config.max_len
    num_layers = sum(stage.num_layers for stage in stages)
    if layer.variant == "softmax":
        return SoftmaxTower(dim=dim, layer=layer, num_layers=num_layers)
    if layer.relative_bias is not None:
        return RelativeTower(dim=dim, layer=layer, num_layers=num_layers, max_len=max_len)
    return build_tower(dim=dim, layer=layer, stages=stages, num_context=0, max_len=max_len)


def build_retriever(config: ModelConfig, *, tables: Tables, embedding_dim: int, num_actions: int) -> Model:
    """The retriever that the config describes, for data with so many actions."""
    assert config.retrieval is not None
    tower = RetrieverTower(
        _build_event_tower(config),
        build_similarity(config.retrieval.similarity, embedding_dim=embedding_dim),
        dim=config.dim,
        embedding_dim=embedding_dim,
        max_len=config.max_len,
        num_positions=config.input.num_positions,
        num_actions=num_actions if config.retrieval.read_actions else 0,
        num_time_buckets=config.input.num_time_buckets if config.retrieval.read_next_time else 0,
        dropout=config.input.dropout,
    )
    return Model(tables, tower, SampledSoftmax(tower.similarity, temperature=config.retrieval.temperature))
