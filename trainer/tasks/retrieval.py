"""Retrieve the next item: predict it behind every event, and rank it among all items, on all ranks.

The evaluated events are each sample's candidates: every one is predicted from all events in front of it, earlier
candidates included.  First every rank predicts for its share of the split, then all ranks walk over the corpus
together (`trainer.corpus`).

Shapes: P predictions of this rank.
"""

import functools
from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

from embeddings.config import TableConfig
from embeddings.tables import Tables, rows_by_feature
from pipelines.batch import Batch
from pipelines.features import ITEM_ID, DatasetInfo
from pipelines.loader import build_loader
from pipelines.selection import Selection
from trainer.baseline import popularity
from trainer.columns import item_columns, item_table
from trainer.config import TrainConfig
from trainer.corpus import Corpus, join_seen
from trainer.mesh import Mesh
from trainer.metrics import CUTOFFS, retrieval_scores
from trainer.models.config import RetrievalConfig
from trainer.models.flops import retriever_flops
from trainer.models.heads.similarity import Similarity
from trainer.models.layout import take_rows
from trainer.models.model import Model
from trainer.models.negatives import NEGATIVE_FEATURE, RetrievalBatch, retrieval_batch, retrieval_features
from trainer.models.retriever import RetrieverTower, build_retriever, evaluated_rows
from trainer.models.sequence_padding import SequencePadding
from trainer.parallelize import ParallelModel
from trainer.tasks.task import Evaluation, Flops


@dataclass(frozen=True)
class Retrieval:
    """The task of a configuration with `model.retrieval`."""

    config: TrainConfig
    info: DatasetInfo

    @property
    def settings(self) -> RetrievalConfig:
        """What the configuration says of retrieval."""
        assert self.config.model.retrieval is not None
        return self.config.model.retrieval

    @property
    def selection(self) -> Selection:
        """Item ids."""
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
        """Its item."""
        return 1

    @property
    def num_context(self) -> int:
        """The model reads none."""
        return 0

    @property
    def flops(self) -> Flops:
        """Tower, and scores of each prediction's items."""
        return functools.partial(
            retriever_flops, self.config.model, embedding_dim=self._item_width, num_items=self.info.num_items
        )

    def check_training_data(self) -> None:
        """Any events will do, under their own ids."""
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
        """The retriever."""
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
        """One more sequence."""
        return SequencePadding()

    def evaluate(self, model: ParallelModel, mesh: Mesh, unseen: int | None = None) -> Evaluation:
        """Hit rate, NDCG and MRR of each candidate's rank among all items, beside popularity.  Called by every rank.

        Memory of a rank: one query a prediction, a block of scores (`trainer.corpus`), and with `exclude_seen` two
        numbers an earlier event.
        """
        data, on_gpu = self.config.data, mesh.device.type == "cuda"
        batches = build_loader(
            data, split="eval", rank=mesh.rank, world_size=mesh.world_size, pin_memory=on_gpu, unseen=unseen
        )
        prepared = (self._form(batch, mesh, 0) for batch in batches)
        metrics, by_popularity = evaluate_retrieval(
            model, prepared, popularity(data, mesh, unseen), mesh, self.settings
        )
        return Evaluation(metrics, retrieval_table(metrics, by_popularity) if mesh.is_first else "")

    def _form(self, batch: Batch, mesh: Mesh, num_negatives: int | None) -> RetrievalBatch:
        made = retrieval_batch(
            batch,
            num_items=self.info.num_items,
            num_negatives=num_negatives,
            shared=self.settings.share_negatives,
            seed=self.config.seed,
            world_size=mesh.data_ranks,
        )
        return made.pin_memory() if mesh.device.type == "cuda" else made


@torch.no_grad()
def evaluate_retrieval(
    model: ParallelModel, batches: Iterable[RetrievalBatch], counts: Tensor, mesh: Mesh, settings: RetrievalConfig
) -> tuple[dict[str, float], dict[str, float]]:
    """`hr@10`, `hr@50`, `ndcg@10`, `ndcg@50` and `mrr` of the model and of the items' `counts`.

    Called by every rank, each with as many batches as the others; a batch may be empty.
    """
    was_training = model.module.training
    model.module.eval()
    try:
        parts = [
            _predict(model, batch.to(mesh.device, non_blocking=True), exclude_seen=settings.exclude_seen)
            for batch in tqdm(batches, desc="evaluating", unit="batch", leave=False, disable=not mesh.is_first)
        ]
        queries, targets = (torch.cat([part[index] for part in parts]) for index in (0, 1))
        corpus = Corpus(
            similarity=_similarity(model),
            items=functools.partial(_items, model),
            counts=counts,
            chunk=settings.corpus_chunk,
        )
        seen = join_seen([part[2] for part in parts], [part[0].shape[0] for part in parts])
        ranks = corpus.ranks(queries, targets, seen)
    finally:
        model.module.train(was_training)
    sums = torch.stack([retrieval_scores(rank) for rank in ranks])
    dist.all_reduce(sums)  # every rank; two rows of sums over predictions
    of_model, of_popularity = (_means(row) for row in sums)
    return of_model, of_popularity


def retrieval_table(model: dict[str, float], popularity: dict[str, float]) -> str:
    """The model's metrics beside popularity's."""
    header = f"{'':<12}" + "".join(f"{name:>10}" for name in model)
    rows = [
        f"{name:<12}" + "".join(f"{value:>10.4f}" for value in values.values())
        for name, values in (("model", model), ("popularity", popularity))
    ]
    return "\n".join([header, "-" * len(header), *rows])


def _predict(model: ParallelModel, batch: RetrievalBatch, *, exclude_seen: bool) -> tuple[Tensor, Tensor, Tensor]:
    """(queries [P, ...], true items [P], pairs (prediction, earlier item) as [2, pairs]) of a batch on the device."""
    outputs = model.score(batch.inputs)
    rows = evaluated_rows(outputs.layout, batch.num_evaluated, batch.num_evaluated_host)
    item_ids, lens, device = batch.inputs.item_ids, batch.inputs.lens, rows.device
    seen = torch.zeros(2, 0, dtype=torch.long, device=device)
    if exclude_seen and rows.numel():
        ends = torch.cumsum(lens, 0)
        starts = (ends - lens)[torch.searchsorted(ends, rows, right=True)]
        earlier = rows + 1 - starts
        prediction = torch.repeat_interleave(torch.arange(rows.numel(), device=device), earlier)
        place = torch.arange(prediction.numel(), device=device) - (torch.cumsum(earlier, 0) - earlier)[prediction]
        seen = torch.stack([prediction, item_ids[starts[prediction] + place]])
    return _similarity(model).queries(take_rows(outputs.vectors, rows)), item_ids[rows + 1], seen


def _items(model: ParallelModel, first: int, last: int) -> Tensor:
    """The items from `first` on as the similarity sees them, [last - first, ...].

    A collective: every rank asks for the same rows, whatever its number of predictions.
    """
    item_ids = torch.arange(first, last, device=next(model.dense.parameters()).device)
    features = retrieval_features(item_ids, item_ids[:0])
    return _similarity(model).items(rows_by_feature(model.tables(features))[ITEM_ID].values())


def _similarity(model: ParallelModel) -> Similarity:
    assert isinstance(model.dense, RetrieverTower)
    return model.dense.similarity


def _means(sums: Tensor) -> dict[str, float]:
    names = [*(f"{kind}@{k}" for kind in ("hr", "ndcg") for k in CUTOFFS), "mrr"]
    total = float(sums[-1])
    # Without predictions there is no mean: NaN, which files write as null.
    return {name: float(value) / total if total else float("nan") for name, value in zip(names, sums, strict=False)}
