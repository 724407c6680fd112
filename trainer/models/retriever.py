"""The retriever: predict the next item of a user's events among all items.

Causal layers over item tokens; the output at each event predicts the event behind it.  Training scores the true item
against sampled ones (sampled softmax); evaluation ranks it among all items (`trainer.tasks.retrieval`).

Shapes: B users, S events of all users, P predictions, N negatives, D model width, E row width of the item table.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from embeddings.tables import Rows, rows_by_feature
from pipelines.features import ITEM_ID
from trainer.models.config import ModelConfig
from trainer.models.hstu import build_tower
from trainer.models.layout import SequenceLayout, make_layout, repeat_users, take_rows
from trainer.models.negatives import NEGATIVE_FEATURE, RetrievalBatch
from trainer.models.precision import compute_dtype


@dataclass(frozen=True, kw_only=True, slots=True)
class RetrieverOutput:
    """What evaluation reads: predictions of the evaluated events, and the loss in training; detached."""

    outputs: Tensor
    """[P, E] float32: scores are products with item vectors."""
    rows: Tensor
    """[P] the event in front of each predicted one, an index into all S events."""


class RetrieverTower(nn.Module):
    """All of the retriever but its table: from looked-up rows to outputs and loss.

    Args:
        tower: causal layers over tokens of width `dim`.
        dim: D.
        embedding_dim: E; where it is not D, one linear map before the tower and one behind it.
        max_len: the longest sequence that the tower's attention is made for.
        num_positions: position vectors, counted from the oldest event; later events share the last.
        temperature: divides the scores.
        normalise: L2-normalise outputs and items, so that scores are cosines over the temperature.
        dropout: probability of zeroing an element of the tokens while training.
    """

    def __init__(
        self,
        tower: nn.Module,
        *,
        dim: int,
        embedding_dim: int,
        max_len: int,
        num_positions: int,
        temperature: float = 0.05,
        normalise: bool = True,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.tower, self.max_len, self.dropout = tower, max_len, dropout
        self.temperature, self.normalise = temperature, normalise
        same = embedding_dim == dim
        self.item_projection = nn.Identity() if same else nn.Linear(embedding_dim, dim)
        self.output_projection = nn.Identity() if same else nn.Linear(dim, embedding_dim)
        self.position_vectors = nn.Parameter(torch.empty(num_positions, dim).normal_(std=0.02))
        # As in the HSTU papers' code, so that items outweigh positions.
        self.item_factor = dim**0.5

    def forward(self, looked_up: list[Rows], batch: RetrievalBatch) -> tuple[Tensor, RetrieverOutput]:
        """This rank's part of the loss, and the predictions of the events that the batch evaluates.

        In training the loss is the sum of the sampled softmax over every event that has one behind it, over
        `batch.loss_denominator`; 0 where there is none, with zero gradients.  In evaluation there are no negatives, and
        it is 0.
        """
        embedded = rows_by_feature(looked_up)
        items_SE = embedded[ITEM_ID].values()
        outputs_SE, layout = self.encode(items_SE, batch.lens, batch.lens_host)
        if not self.training:
            rows_P = evaluated_rows(layout, batch.num_evaluated, batch.num_evaluated_host)
            return outputs_SE.sum() * 0, RetrieverOutput(outputs=take_rows(outputs_SE, rows_P).detach(), rows=rows_P)
        rows_P = rows_with_next(layout)
        negatives = embedded[NEGATIVE_FEATURE].values()
        own = batch.negative_ids.dim() == 2
        losses_P = self.sampled_softmax(
            take_rows(outputs_SE, rows_P),
            take_rows(items_SE, rows_P + 1),
            negatives.view(*batch.negative_ids.shape, negatives.shape[1]) if own else negatives,
            batch.negative_ids == batch.item_ids[rows_P + 1][:, None],
        )
        output = RetrieverOutput(outputs=outputs_SE[:0].detach(), rows=rows_P[:0])
        # The last terms keep every parameter and row in the graph of a batch without predictions.
        unused = (outputs_SE.sum() + negatives.sum()) * 0 if not rows_P.numel() else 0
        return losses_P.sum() / batch.loss_denominator + unused, output

    def encode(self, items_SE: Tensor, lens: Tensor, lens_host: Tensor) -> tuple[Tensor, SequenceLayout]:
        """The output at every event, [S, E] float32, normalised if asked for.

        Raises:
            ValueError: a sequence is longer than the model's constant.
        """
        layout = make_layout(lens, torch.zeros_like(lens), lens_host, torch.zeros_like(lens_host))
        if layout.longest > self.max_len:
            raise ValueError(
                f"a sequence has {layout.longest} events, more than model.max_len={self.max_len}: raise max_len, or "
                "lower data.max_history_len or data.max_candidates"
            )
        dtype = compute_dtype(self.position_vectors)
        position_S = layout.index_T.clamp(max=self.position_vectors.shape[0] - 1)
        tokens_SD = self.item_projection(items_SE.to(dtype)) * self.item_factor
        tokens_SD = tokens_SD + F.embedding(position_S, self.position_vectors.to(dtype))
        outputs_SD, layout = self.tower(F.dropout(tokens_SD, self.dropout, self.training), layout)
        return self.unit(self.output_projection(outputs_SD)), layout

    def unit(self, vectors: Tensor) -> Tensor:
        """Vectors as they are scored: float32, of length 1 if the model normalises."""
        return F.normalize(vectors.float(), dim=-1, eps=1e-6) if self.normalise else vectors.float()

    def sampled_softmax(self, outputs_PE: Tensor, positives_PE: Tensor, negatives: Tensor, hits_PN: Tensor) -> Tensor:
        """Loss of each prediction, [P]; a negative that is the true item (`hits_PN`) is left out of its sum.

        `outputs_PE` come from `encode`, items as rows of the table: `negatives` [N, E] serve all predictions,
        [P, N, E] are each one's own.
        """
        # 16 bits would round a cosine of 1, over a temperature of 0.05, by 0.08.
        with torch.autocast(outputs_PE.device.type, enabled=False):
            positive_P1 = (outputs_PE * self.unit(positives_PE)).sum(1, keepdim=True)
            vectors = self.unit(negatives)
            if vectors.dim() == 2:
                negative_PN = outputs_PE @ vectors.t()
            else:
                negative_PN = torch.einsum("pe,pne->pn", outputs_PE, vectors)
            logits = torch.cat([positive_P1, negative_PN.masked_fill(hits_PN, float("-inf"))], dim=1) / self.temperature
            return logits.logsumexp(1) - logits[:, 0]


def rows_with_next(layout: SequenceLayout) -> Tensor:
    """Every event but each user's last, [P]; for layouts without context and candidates."""
    count, count_host = ((lens - 1).clamp(min=0) for lens in (layout.history_lens, layout.history_lens_host))
    return _rows(layout.offsets[:-1], count, count_host)


def evaluated_rows(layout: SequenceLayout, count: Tensor, count_host: Tensor) -> Tensor:
    """The event in front of each of a user's last `count` [B] events, [P]; a user's first event has none."""
    limit, limit_host = (layout.history_lens - 1).clamp(min=0), (layout.history_lens_host - 1).clamp(min=0)
    count = torch.minimum(count, limit)
    return _rows(layout.offsets[:-1] + limit - count, count, torch.minimum(count_host, limit_host))


def _rows(first: Tensor, count: Tensor, count_host: Tensor) -> Tensor:
    """`count` [B] rows from `first` [B] on, user by user."""
    total = int(count_host.sum())
    user_P = repeat_users(count, total)
    index_P = torch.arange(total, device=user_P.device) - (torch.cumsum(count, 0) - count)[user_P]
    return first[user_P] + index_P


def build_retriever_tower(config: ModelConfig, *, embedding_dim: int) -> RetrieverTower:
    """The retriever's tower that the config describes."""
    assert config.retrieval is not None
    return RetrieverTower(
        build_tower(dim=config.dim, layer=config.layer, stages=config.stages, num_context=0, max_len=config.max_len),
        dim=config.dim,
        embedding_dim=embedding_dim,
        max_len=config.max_len,
        num_positions=config.input.num_positions,
        temperature=config.retrieval.temperature,
        normalise=config.retrieval.normalise,
        dropout=config.input.dropout,
    )
