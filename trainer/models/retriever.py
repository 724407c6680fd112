"""The retriever: predict the next item of a history among all items.

Causal layers over item tokens; the output at each event predicts the event behind it.  Training scores the true item
against sampled ones (sampled softmax); evaluation ranks it among all items, a chunk of the corpus at a time.

Shapes: B users, T events of all users, P predictions, N negatives, I items, D width.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from trainer.models.layout import SequenceLayout, make_layout


class Retriever(nn.Module):
    """Item table, tower and sampled softmax.

    The table is a plain embedding, also the output matrix.  With `share_negatives` the N negatives of a step serve all
    its predictions, otherwise each prediction draws its own; both uniformly.  A negative that happens to be the true
    item is left out of the sum.

    Args:
        num_items: I; id 0 is an item like any other.
        dim: D.
        tower: causal layers over tokens of width D.
        num_positions: learned positions; later events share the last.
        num_negatives: N.
        temperature: divides the scores.
        normalise: L2-normalise outputs and items, so that scores are cosines over the temperature.
        dropout: on the tower's input.
    """

    def __init__(
        self,
        *,
        num_items: int,
        dim: int,
        tower: nn.Module,
        num_positions: int,
        num_negatives: int = 128,
        share_negatives: bool = True,
        temperature: float = 0.05,
        normalise: bool = True,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if temperature <= 0:
            raise ValueError(f"temperature must be above 0, got {temperature}")
        if num_negatives < 1:
            raise ValueError(f"num_negatives must be at least 1, got {num_negatives}")
        self.tower, self.num_negatives, self.share_negatives = tower, num_negatives, share_negatives
        self.temperature, self.normalise, self.dropout = temperature, normalise, dropout
        self.items = nn.Embedding(num_items, dim)
        self.positions = nn.Embedding(num_positions, dim)
        nn.init.normal_(self.items.weight, std=0.02)
        nn.init.normal_(self.positions.weight, std=0.02)

    def encode(
        self, item_ids: Tensor, history_lens: Tensor, history_lens_host: Tensor
    ) -> tuple[Tensor, SequenceLayout]:
        """The tower's output at every event, [T, D], normalised if asked for."""
        layout = _history_layout(history_lens, history_lens_host)
        position_T = layout.index_T.clamp(max=self.positions.num_embeddings - 1)
        # Scaled as in the HSTU papers' code, so that items outweigh positions.
        tokens_TD = self.items(item_ids) * self.items.embedding_dim**0.5 + self.positions(position_T)
        tokens_TD = F.dropout(tokens_TD, self.dropout, self.training)
        outputs_TD, layout = self.tower(tokens_TD, layout)
        outputs_TD = outputs_TD.float()
        return (F.normalize(outputs_TD, dim=1, eps=1e-6) if self.normalise else outputs_TD), layout

    def forward(self, item_ids: Tensor, history_lens: Tensor, history_lens_host: Tensor) -> Tensor:
        """Mean sampled-softmax loss over every event that has one behind it; 0 if there is none."""
        outputs_TD, layout = self.encode(item_ids, history_lens, history_lens_host)
        # Every event but a history's last predicts the one behind it; their number is known on the host.
        predictions = int((history_lens_host - 1).clamp(min=0).sum())
        has_next = layout.index_T + 1 < layout.history_lens[layout.user_T]
        rows_P = torch.argsort(~has_next, stable=True)[:predictions]
        targets_P = item_ids[rows_P + 1]
        outputs_PD = outputs_TD[rows_P]
        positive_P = (outputs_PD * self._vectors(targets_P)).sum(1)
        shape = (self.num_negatives,) if self.share_negatives else (predictions, self.num_negatives)
        sampled = torch.randint(self.items.num_embeddings, shape, device=item_ids.device)
        negatives = self._vectors(sampled)
        if self.share_negatives:
            negative_PN = outputs_PD @ negatives.t()
        else:
            negative_PN = torch.einsum("pd,pnd->pn", outputs_PD, negatives)
        negative_PN = negative_PN.masked_fill(sampled == targets_P[:, None], float("-inf"))
        logits = torch.cat([positive_P[:, None], negative_PN], dim=1) / self.temperature
        loss = logits.logsumexp(1) - logits[:, 0]
        return loss.sum() / max(1, predictions)

    def _vectors(self, item_ids: Tensor) -> Tensor:
        vectors: Tensor = self.items(item_ids).float()
        return F.normalize(vectors, dim=-1, eps=1e-6) if self.normalise else vectors

    @torch.no_grad()
    def ranks(
        self,
        item_ids: Tensor,
        history_lens: Tensor,
        history_lens_host: Tensor,
        targets_B: Tensor,
        *,
        chunk_items: int = 65536,
    ) -> Tensor:
        """Rank of each user's target after the whole history among all items, [B], 1 for the best; users need events.

        Ties count against the target.  Memory is B x `chunk_items` scores.
        """
        if not bool((history_lens_host > 0).all()):
            raise ValueError("a user without events has nothing to predict from: leave such users out")
        outputs_TD, layout = self.encode(item_ids, history_lens, history_lens_host)
        users_BD = outputs_TD[layout.offsets[1:] - 1]
        wanted_B1 = (users_BD * self._vectors(targets_B)).sum(1, keepdim=True)
        better_B = torch.zeros_like(targets_B)
        for start in range(0, self.items.num_embeddings, chunk_items):
            ids = torch.arange(start, min(start + chunk_items, self.items.num_embeddings), device=targets_B.device)
            scores = users_BD @ self._vectors(ids).t()
            better_B += ((scores >= wanted_B1) & (ids != targets_B[:, None])).sum(1)
        return better_B + 1


@dataclass(frozen=True, kw_only=True, slots=True)
class RetrievalMetrics:
    """Means over users, from ranks."""

    hit_rates: dict[int, float]
    """Share of users whose target is among the best K, by K."""
    ndcg: dict[int, float]
    """1 / log2(1 + rank) within the best K, by K."""
    mrr: float
    """1 / rank."""


def retrieval_metrics(ranks: Tensor, cutoffs: tuple[int, ...] = (10, 50)) -> RetrievalMetrics:
    """HR@K, NDCG@K and MRR of one target a user."""
    if ranks.numel() == 0:
        raise ValueError("ranks is empty: there is no user to average over")
    wide = ranks.double()
    gain = 1 / torch.log2(1 + wide)
    return RetrievalMetrics(
        hit_rates={k: float((wide <= k).double().mean()) for k in cutoffs},
        ndcg={k: float(torch.where(wide <= k, gain, 0.0).mean()) for k in cutoffs},
        mrr=float((1 / wide).mean()),
    )


def _history_layout(history_lens: Tensor, history_lens_host: Tensor) -> SequenceLayout:
    return make_layout(
        history_lens, torch.zeros_like(history_lens), history_lens_host, torch.zeros_like(history_lens_host)
    )
