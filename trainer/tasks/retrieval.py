"""Retrieve the next item: predict it behind every event, and rank it among all items, on all ranks.

The evaluated events are each sample's candidates: every one is predicted from all events in front of it, earlier
candidates included.
"""

import functools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from tqdm import tqdm

from embeddings.config import TableConfig
from embeddings.tables import Tables
from pipelines.batches.batch import Batch
from pipelines.features import ITEM_ID
from pipelines.reading.loader import build_loader
from pipelines.selection import Selection
from trainer.columns import item_columns, item_table
from trainer.evaluation.metrics import RANK_METRICS
from trainer.evaluation.next_item import Predictions, items_up_to, rank_next_items, retrieval_table
from trainer.models.activations import MeanBatch, Memory, retriever_activations
from trainer.models.flops import retriever_flops
from trainer.models.layout import take_rows
from trainer.models.model import Model
from trainer.models.negatives import NEGATIVE_FEATURE, RetrievalBatch, retrieval_batch
from trainer.models.retriever import EventOutputs, RetrieverTower, build_retriever, evaluated_rows
from trainer.models.sequence_padding import SequencePadding
from trainer.parallel.mesh import Mesh
from trainer.parallelize import ParallelModel
from trainer.tasks.task import DataTask, Evaluation, Flops, NextItems


@dataclass(frozen=True)
class Retrieval(DataTask):
    """The task of a configuration with `model.retrieval`."""

    @property
    def selection(self) -> Selection:
        """The item ids of events and candidates."""
        return item_columns(self.info)

    @functools.cached_property
    def tables(self) -> tuple[TableConfig, ...]:
        """The items' table, in which negatives are looked up too."""
        return item_table(self.config, self.info, NEGATIVE_FEATURE)

    @property
    def _item_width(self) -> int:
        return self.tables[0].embedding_dim

    @property
    def tokens_an_event(self) -> int:
        """One: an event is its item."""
        return 1

    @property
    def num_context(self) -> int:
        """None: the model reads no columns of samples."""
        return 0

    @property
    def events_read(self) -> int:
        """What evaluation reads of the longest history."""
        longest, newest = self.config.data.max_history_len, self.settings.newest_events
        return longest if newest is None else min(longest, newest)

    @property
    def flops(self) -> Flops:
        """Tower, and scores of each prediction's items."""
        return functools.partial(
            retriever_flops, self.config.model, embedding_dim=self._item_width, num_items=self.info.num_items
        )

    @property
    def measured(self) -> tuple[str, ...]:
        """Hits, gains and ranks of the next item."""
        return tuple(RANK_METRICS)

    def activations(self, batch: MeanBatch) -> Memory:
        """What the tower and the scores hold."""
        return retriever_activations(
            self.config.model, batch, embedding_dim=self._item_width, num_items=self.info.num_items
        )

    def check_training_data(self) -> None:
        """There is always something to learn; but items must be read under their own ids."""
        if self.config.data.unknown_share:
            raise ValueError(
                f"data.unknown_share={self.config.data.unknown_share} is for rankers: a retriever would learn to "
                "predict the unknown item, and its negatives train the rows of items that nobody took; set it to 0"
            )

    def ids_per_sample(self, events: float, candidates: float, samples_per_rank: int) -> dict[str, float]:
        """Each event's item, and the negatives: of a step, or of every prediction."""
        events = max(1.0, events + candidates)
        sharing = samples_per_rank if self.settings.share_negatives else 1 / events
        return {ITEM_ID: events, NEGATIVE_FEATURE: (self.settings.num_negatives or self.info.num_items) / sharing}

    def build(self, tables: Tables) -> Model:
        """The retriever over the items' table."""
        return build_retriever(
            self.config.model,
            tables=tables,
            embedding_dim=self._item_width,
            num_actions=len(self.info.actions),
        )

    def prepare(self, batch: Batch, mesh: Mesh) -> RetrievalBatch:
        """All events in one sequence a sample, with negatives."""
        return self._form(batch, mesh, self.settings.num_negatives)

    @property
    def padding(self) -> SequencePadding:
        """Batches are padded by one more sequence."""
        return SequencePadding(rectangular=self.config.model.is_rectangular)

    def evaluate(self, model: ParallelModel, mesh: Mesh, unseen: int | None = None) -> Evaluation:
        """Hit rate, NDCG and MRR of each candidate's rank among all items, beside popularity.  Called by every rank.

        Memory of a rank: one query a prediction, a block of scores (`trainer.evaluation.corpus`), and with
        `exclude_seen` two numbers an earlier event.
        """
        data, on_gpu = self.config.data, mesh.device.type == "cuda"
        batches = build_loader(
            data,
            split="eval",
            rank=mesh.rank,
            world_size=mesh.world_size,
            pin_memory=on_gpu,
            unseen=unseen,
            info=self.info,
        )
        assert isinstance(model.tower, RetrieverTower)
        metrics, by_popularity = rank_next_items(
            model,
            model.tower.similarity,
            self._predictions(model, batches, mesh),
            self.baselines.popularity(mesh, unseen),
            mesh=mesh,
            settings=self.settings,
        )
        if not mesh.is_first:
            return Evaluation(metrics, "")
        return Evaluation(metrics, retrieval_table(metrics, by_popularity), by_popularity)

    def _predictions(self, model: ParallelModel, batches: Iterable[Batch], mesh: Mesh) -> Iterator[Predictions]:
        for batch in tqdm(batches, desc="evaluating", unit="batch", leave=False, disable=not mesh.is_first):
            yield self.next_items(model, batch, mesh).predictions

    def next_items(self, model: ParallelModel, batch: Batch, mesh: Mesh) -> NextItems:
        """Predict every candidate from all events and candidates in front of it."""
        assert isinstance(model.tower, RetrieverTower)
        prepared = self._form(batch, mesh, 0, self.settings.newest_events).to(mesh.device, non_blocking=True)
        found = predict(model.score(prepared.inputs), prepared, exclude_seen=self.settings.exclude_seen)
        return NextItems(model.tower.similarity, found)

    def _form(self, batch: Batch, mesh: Mesh, num_negatives: int | None, newest: int | None = None) -> RetrievalBatch:
        made = retrieval_batch(
            batch,
            num_items=self.info.num_items,
            num_negatives=num_negatives,
            shared=self.settings.share_negatives,
            seed=self.config.seed,
            world_size=mesh.data_ranks,
            newest=newest,
        )
        return made.pin_memory() if mesh.device.type == "cuda" else made


def predict(outputs: EventOutputs, batch: RetrievalBatch, *, exclude_seen: bool) -> Predictions:
    """What is said of each event that evaluation asks for, on the device."""
    rows = evaluated_rows(outputs.layout, batch.num_evaluated, batch.num_evaluated_host)
    item_ids, lens, device = batch.inputs.item_ids, batch.inputs.lens, rows.device
    seen = torch.zeros(2, 0, dtype=torch.long, device=device)
    if exclude_seen and rows.numel():
        ends = torch.cumsum(lens, 0)
        sample = torch.searchsorted(ends, rows, right=True)
        of_read = items_up_to(item_ids, rows, rows + 1 - (ends - lens)[sample])
        last_older = torch.cumsum(batch.older_lens, 0) - 1
        of_older = items_up_to(batch.older_ids, last_older[sample], batch.older_lens[sample])
        seen = torch.cat([of_read, of_older], dim=1)
    return Predictions(take_rows(outputs.vectors, rows), item_ids[rows + 1], seen)
