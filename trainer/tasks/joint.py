"""Rank candidates and predict the next item with two heads on one trunk: `model.retrieval.beside_ranking`.

The labels are those of the task of ranking alone, and so are their evaluation and its table.  The next item is
predicted behind every event of a history; evaluation ranks each sample's first candidate among all items, as predicted
from the history's last event.
"""

import functools
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from embeddings.config import TableConfig
from embeddings.rows.trained import TrainedRows
from embeddings.tables import Tables
from pipelines.batches.batch import Batch, Inputs
from pipelines.features import ITEM_ID, ITEM_SPACE
from pipelines.selection import Draw, Selection
from trainer.columns import table_configs, widths
from trainer.evaluation.metrics import RANK_METRICS
from trainer.evaluation.next_item import Predictions, items_up_to, rank_next_items, retrieval_table
from trainer.labels.loss import RankingLoss
from trainer.models.activations import MeanBatch, Memory, scoring_activations
from trainer.models.flops import joint_flops
from trainer.models.heads.build import build_similarity
from trainer.models.joint import JointLoss, JointOutputs, JointTower, next_rows
from trainer.models.layout import take_rows
from trainer.models.model import Model
from trainer.models.negatives import NEGATIVE_FEATURE
from trainer.models.ranker import RankerTower
from trainer.models.retriever import SampledSoftmax
from trainer.parallel.mesh import Mesh
from trainer.parallelize import ParallelModel
from trainer.tasks.ranking import Ranking
from trainer.tasks.task import DataTask, Evaluation, Flops, LabelOutputs, NextItems


@dataclass(frozen=True)
class Joint(DataTask):
    """The task of a configuration with `model.retrieval` and a weight of it beside ranking."""

    def __post_init__(self) -> None:
        pairs = [(each.name, each.parts) for each in self.ranking.selection.features]
        if (ITEM_ID, ("event", "candidate")) not in pairs:
            raise ValueError(
                "model.retrieval.beside_ranking predicts items from events: model.input.event and "
                f"model.input.candidate must name {ITEM_ID}"
            )

    @functools.cached_property
    def ranking(self) -> Ranking:
        """What is predicted of candidates."""
        return Ranking(self.config, self.info)

    @property
    def selection(self) -> Selection:
        """The ranker's columns, and negatives."""
        return self._drawing(self.settings.num_negatives)

    def _drawing(self, count: int | None) -> Selection:
        draw = Draw(name=NEGATIVE_FEATURE, num_ids=self.info.num_items, count=count)
        return replace(self.ranking.selection, draw=draw)

    @functools.cached_property
    def tables(self) -> tuple[TableConfig, ...]:
        """The ranker's; negatives are looked up in the items'."""
        return table_configs(self.config, self.info, self.ranking.selection, {NEGATIVE_FEATURE: ITEM_SPACE})

    @property
    def _item_width(self) -> int:
        return widths(self.tables)[ITEM_SPACE]

    @property
    def tokens_an_event(self) -> int:
        """As many as the ranker makes."""
        return self.ranking.tokens_an_event

    @property
    def num_context(self) -> int:
        """As many as the ranker makes."""
        return self.ranking.num_context

    @property
    def flops(self) -> Flops:
        """The ranker's, all rows of its last layer, and the scores of each next item."""
        return functools.partial(
            joint_flops,
            self.config.model,
            embedding_dim=self._item_width,
            num_items=self.info.num_items,
            **self.ranking.flop_arguments,
        )

    @property
    def measured(self) -> tuple[str, ...]:
        """The metrics of both heads."""
        return (*self.ranking.measured, *RANK_METRICS)

    def activations(self, batch: MeanBatch) -> Memory:
        """The ranker's, and those of each next item's scores."""
        scores = scoring_activations(
            self.config.model, batch, embedding_dim=self._item_width, num_items=self.info.num_items
        )
        return self.ranking.activations(batch) + scores

    def check_training_data(self) -> None:
        """The ranker's checks, and that items are read under their own ids."""
        if self.config.data.unknown_share:
            raise ValueError(
                f"data.unknown_share={self.config.data.unknown_share} is for rankers alone: beside them the next item "
                "would often be the unknown one, and negatives train the rows of items that nobody took; set it to 0"
            )
        self.ranking.check_training_data()

    def ids_per_sample(self, events: float, candidates: float, samples_per_rank: int) -> dict[str, float]:
        """The ranker's, and the negatives of a step."""
        negatives = (self.settings.num_negatives or self.info.num_items) / samples_per_rank
        return self.ranking.ids_per_sample(events, candidates, samples_per_rank) | {NEGATIVE_FEATURE: negatives}

    def build(self, tables: Tables) -> Model:
        """The ranker with a second head."""
        ranker, settings = self.ranking.build(tables), self.settings
        assert isinstance(ranker.tower, RankerTower) and isinstance(ranker.loss, RankingLoss)
        similarity = build_similarity(settings.similarity, embedding_dim=self._item_width)
        tower = JointTower(ranker.tower, similarity, dim=self.config.model.dim, embedding_dim=self._item_width)
        softmax = SampledSoftmax(similarity, temperature=settings.temperature)
        assert settings.beside_ranking is not None
        return Model(tables, tower, JointLoss(ranker.loss, softmax, weight=settings.beside_ranking))

    def rank(self, model: ParallelModel, inputs: Inputs, trained: TrainedRows) -> LabelOutputs:
        """Every id reads its own row, trained or not, as in training."""
        del trained
        loss = model.model.loss
        assert isinstance(loss, JointLoss)
        found: JointOutputs = model.score(inputs)
        return LabelOutputs(loss.ranking, found.labels_CK)

    def next_items(self, model: ParallelModel, batch: Batch, mesh: Mesh) -> NextItems:
        """What each history's last event says."""
        tower = model.tower
        assert isinstance(tower, JointTower)
        inputs = batch.inputs.to(mesh.device)
        found: JointOutputs = model.score(inputs)
        return NextItems(tower.similarity, predict(found.events_HE, inputs, exclude_seen=self.settings.exclude_seen))

    def evaluate(self, model: ParallelModel, mesh: Mesh, unseen: int | None = None) -> Evaluation:
        """Metrics and tables of both heads, from one pass over the split.  Called by every rank."""
        tower, loss = model.tower, model.model.loss
        assert isinstance(tower, JointTower) and isinstance(loss, JointLoss)
        predictions: list[Predictions] = []

        def outputs(inputs: Inputs) -> Tensor:
            found: JointOutputs = model.score(inputs)
            predictions.append(predict(found.events_HE, inputs, exclude_seen=self.settings.exclude_seen))
            return found.labels_CK

        ranking = self.ranking.measure(
            model, mesh, unseen, labels=loss.ranking, outputs=outputs, selection=self._drawing(0)
        )
        metrics, by_popularity = rank_next_items(
            model,
            tower.similarity,
            predictions,
            self.baselines.popularity(mesh, unseen),
            mesh=mesh,
            settings=self.settings,
        )
        tables = [ranking.table, retrieval_table(metrics, by_popularity)]
        both = {**ranking.metrics, **metrics}
        if not mesh.is_first:
            return Evaluation(both, "")
        return Evaluation(both, "\n\n".join(tables), {**ranking.baseline, **by_popularity})


def predict(events_HE: Tensor, inputs: Inputs, *, exclude_seen: bool) -> Predictions:
    """What each history's last event says of the first candidate; of samples without either, nothing."""
    ids, total = inputs.ids(ITEM_ID), events_HE.shape[0]
    next_H = next_rows(inputs)
    rows_P = torch.nonzero(next_H >= total)[:, 0]
    seen = torch.zeros(2, 0, dtype=torch.long, device=ids.device)
    if exclude_seen:
        last_B = torch.cumsum(inputs.history_lens, 0) - 1
        lens_P = inputs.history_lens[torch.searchsorted(last_B, rows_P)]
        seen = items_up_to(ids, rows_P, lens_P)
    return Predictions(take_rows(events_HE, rows_P), ids[next_H[rows_P]], seen)
