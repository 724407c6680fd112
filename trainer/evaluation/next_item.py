"""Score the next item among all items, on all ranks, beside popularity.

First every rank predicts for its share of the split, then all ranks walk over the corpus together
(`trainer.evaluation.corpus`).

Shapes: P predictions of this rank.
"""

import functools
from collections.abc import Iterable
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from embeddings.tables import Tables, rows_by_feature
from pipelines.batches.packed import bag_lens
from pipelines.features import ITEM_ID
from trainer.evaluation.corpus import Corpus, join_seen
from trainer.evaluation.metrics import rank_means, rank_sums
from trainer.models.heads.similarity import Similarity
from trainer.models.layout import enumerate_users
from trainer.models.retrieval_config import RetrievalConfig
from trainer.parallel.mesh import Mesh
from trainer.parallelize import ParallelModel


class Predictions(NamedTuple):
    """What a model says of some next items."""

    outputs_PE: Tensor
    """[P, E]: to be compared with items by its similarity."""
    targets_P: Tensor
    """[P] int64 the items that came next."""
    seen: Tensor
    """[2, pairs] of (prediction, item) to leave out of the ranking."""


def items_up_to(item_ids: Tensor, last_P: Tensor, lens_P: Tensor) -> Tensor:
    """[2, pairs] of (prediction, item): of each prediction the `lens_P` items that end with row `last_P`."""
    prediction, number = enumerate_users(lens_P, int(lens_P.sum()))
    return torch.stack([prediction, item_ids[(last_P - lens_P + 1)[prediction] + number]])


@torch.no_grad()
def rank_next_items(
    model: ParallelModel,
    similarity: Similarity,
    batches: Iterable[Predictions],
    counts: Tensor,
    *,
    mesh: Mesh,
    settings: RetrievalConfig,
) -> tuple[dict[str, float], dict[str, float]]:
    """The `RANK_METRICS` of the model and of the items' `counts`.

    Called by every rank, each with as many batches as the others; one may have no predictions.  The model is in
    evaluation mode while the batches are asked for.
    """
    was_training = model.module.training
    model.module.eval()
    try:
        parts = [each._replace(outputs_PE=similarity.queries(each.outputs_PE)) for each in batches]
        corpus = corpus_of(model, similarity, counts, mesh=mesh, settings=settings)
        seen = join_seen([part.seen for part in parts], [part.targets_P.numel() for part in parts])
        queries, targets = (torch.cat([part[index] for part in parts]) for index in (0, 1))
        with model.caches.undisturbed():
            ranks = corpus.ranks(queries, targets, seen)
    finally:
        model.module.train(was_training)
    sums = torch.stack([rank_sums(rank) for rank in ranks])
    dist.all_reduce(sums)  # every rank; two rows of sums over predictions
    of_model, of_popularity = sums
    return rank_means(of_model), rank_means(of_popularity)


def corpus_of(
    model: ParallelModel, similarity: Similarity, counts: Tensor, *, mesh: Mesh, settings: RetrievalConfig
) -> Corpus:
    """The items of a model, each of whose ids occurs `counts` [items + FIRST] times."""
    items = functools.partial(_items, model.tables, similarity, mesh.device)
    return Corpus(similarity=similarity, items=items, counts=counts, chunk=settings.corpus_chunk)


def retrieval_table(model: dict[str, float], popularity: dict[str, float]) -> str:
    """The model's metrics beside popularity's."""
    header = f"{'':<12}" + "".join(f"{name:>10}" for name in model)
    rows = [
        f"{name:<12}" + "".join(f"{value:>10.4f}" for value in values.values())
        for name, values in (("model", model), ("popularity", popularity))
    ]
    return "\n".join([header, "-" * len(header), *rows])


def _items(tables: Tables, similarity: Similarity, device: torch.device, first: int, last: int) -> Tensor:
    """The items from `first` on as the similarity sees them, [last - first, ...].

    A collective: every rank asks for the same rows, whatever its number of predictions.
    """
    keys = [feature for table in tables.configs for feature in table.features]
    counts = [last - first if key == ITEM_ID else 0 for key in keys]
    features = KeyedJaggedTensor(
        keys,
        torch.arange(first, last, device=device),
        lengths=torch.from_numpy(bag_lens(counts)).to(device),
        length_per_key=counts,
    )
    return similarity.items(rows_by_feature(tables(features))[ITEM_ID].values())
