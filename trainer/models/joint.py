"""A ranker and a head for the next item on one trunk, trained on the sum of their losses.

The trunk is the ranker's, with tokens that know nothing of later events (`input.causal`).  Its candidates' rows go to
the labels' head, its events' rows to the head that scores items: each event predicts the item behind it, the last one
of a history its first candidate.  Both read the same tables; negatives are drawn with the batch (`Selection.draw`).

Shapes: C candidates and H events of all users, K outputs of all labels, D width of the trunk, E row width of the item
table, N negatives.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from embeddings.tables import Rows, rows_by_feature
from pipelines.batches.batch import Batch, Inputs
from pipelines.features import ITEM_ID
from trainer.labels.loss import RankingLoss
from trainer.models.heads.similarity import Similarity
from trainer.models.layout import repeat_users, take_rows
from trainer.models.negatives import NEGATIVE_FEATURE
from trainer.models.ranker import RankerTower
from trainer.models.retriever import SampledSoftmax


class JointOutputs(NamedTuple):
    """What the model says of a batch."""

    labels_CK: Tensor
    """[C, K] float32: the outputs of all labels at every candidate."""
    events_HE: Tensor
    """[H, E]: at every event, to be compared with items by the tower's similarity."""


class JointTower(nn.Module):
    """All of the model but its tables.

    Args:
        ranker: the trunk, and the labels' head.
        similarity: scores items against what is said at events.
        dim: D.
        embedding_dim: E; where it is not D, one linear map in front of the similarity.
    """

    def __init__(self, ranker: RankerTower, similarity: Similarity, *, dim: int, embedding_dim: int) -> None:
        super().__init__()
        self.ranker, self.similarity = ranker, similarity
        # Not items' rows, which the second head compares as they are.
        self.cast_first: frozenset[str] = ranker.cast_first - {ITEM_ID}
        self.output_projection = nn.Identity() if embedding_dim == dim else nn.Linear(dim, embedding_dim)

    def check(self, inputs: Inputs) -> None:
        """Raises ValueError where a sequence is longer than the model's constant."""
        self.ranker.check(inputs)

    def forward(self, looked_up: list[Rows], inputs: Inputs) -> JointOutputs:
        """Both heads' outputs.

        Raises:
            ValueError: a sequence is longer than the model's constant.
        """
        labels_CK, events_HD = self.ranker.with_events(looked_up, inputs)
        return JointOutputs(labels_CK, self.output_projection(events_HD))


class JointLoss(nn.Module):
    """The labels' loss plus `weight` times the sampled softmax of the item behind each event."""

    def __init__(self, ranking: RankingLoss, softmax: SampledSoftmax, *, weight: float) -> None:
        super().__init__()
        self.ranking, self.softmax, self.weight = ranking, softmax, weight

    def forward(self, outputs: JointOutputs, looked_up: list[Rows], batch: Batch) -> Tensor:
        """This rank's part of the sum."""
        ranking: Tensor = self.ranking(outputs.labels_CK, looked_up, batch)
        return ranking + self.weight * self.of_next_items(outputs.events_HE, looked_up, batch)

    def of_next_items(self, events_HE: Tensor, looked_up: list[Rows], batch: Batch) -> Tensor:
        """The sum over every event that something follows, over `next_denominator`; 0, with zero gradients, where
        there is none."""
        rows, labels = rows_by_feature(looked_up), batch.labels
        followed_H = labels.next_item_id >= 0
        losses_H = self.softmax.of_predictions(
            events_HE,
            take_rows(rows[ITEM_ID].values(), torch.where(followed_H, next_rows(batch.inputs), -1)),
            rows[NEGATIVE_FEATURE].values(),
            labels.drawn == labels.next_item_id[:, None],
        )
        return torch.where(followed_H, losses_H, 0).sum() / labels.next_denominator


def next_rows(inputs: Inputs) -> Tensor:
    """What follows each event, [H], as a row of all events and then all candidates: the next event or, behind the last
    one, the first candidate; -1 for nothing."""
    lens, candidates, total = inputs.history_lens, inputs.num_candidates, int(inputs.history_lens_host.sum())
    user_H, row_H = repeat_users(lens, total), torch.arange(total, device=lens.device)
    first_candidate_B = torch.where(candidates > 0, total + torch.cumsum(candidates, 0) - candidates, -1)
    last_B = torch.cumsum(lens, 0) - 1
    return torch.where(row_H == last_B[user_H], first_candidate_B[user_H], row_H + 1)
