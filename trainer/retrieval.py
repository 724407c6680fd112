"""Rank the next item among all items, on all ranks, beside popularity.

The evaluated events are each sample's candidates: every one is predicted from all events in front of it, earlier
candidates included.  First every rank predicts for its share of the split, then all ranks walk over the corpus
together, a chunk of looked-up rows at a time, and count the items that score at least as high as the true one.

Shapes: P predictions of this rank, E row width, I items of a chunk.
"""

import functools
from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

from embeddings.tables import rows_by_feature
from pipelines.baseline import item_counts
from pipelines.batch import ITEM_FEATURE, Batch
from pipelines.config import DataConfig
from trainer.config import TrainConfig
from trainer.mesh import Mesh
from trainer.metrics import CUTOFFS, retrieval_scores
from trainer.models.negatives import RetrievalBatch, retrieval_batch, retrieval_features
from trainer.models.retriever import RetrieverTower
from trainer.parallelize import ParallelModel

PREDICTIONS = 4096
"""Predictions that a rank scores at a time."""


@torch.no_grad()
def evaluate_retrieval(
    model: ParallelModel, batches: Iterable[Batch], config: TrainConfig, num_items: int, mesh: Mesh
) -> tuple[dict[str, float], dict[str, float]]:
    """`hr@10`, `hr@50`, `ndcg@10`, `ndcg@50` and `mrr` of the model and of popularity.  Called by every rank.

    Every rank must get the same number of batches; a batch may be empty.  Memory of a rank: E floats a prediction, the
    scores of `PREDICTIONS` predictions for `corpus_chunk` items, and with `exclude_seen` two numbers an earlier event.
    """
    assert config.model.retrieval is not None
    was_training = model.module.training
    model.module.eval()
    try:
        parts = [
            _predict(model, retriever_batch(batch, config, num_items, mesh), config, mesh.device)
            for batch in tqdm(batches, desc="evaluating", unit="batch", leave=False, disable=not mesh.is_first)
        ]
        outputs, targets = (torch.cat([part[index] for part in parts]) for index in (0, 1))
        seen = _join_seen([part[2] for part in parts], [part[0].shape[0] for part in parts])
        counts = _popularity(config.data, mesh)
        ranks = _count_better(model, outputs, targets, seen, counts, config.model.retrieval.corpus_chunk)
    finally:
        model.module.train(was_training)
    sums = torch.stack([retrieval_scores(rank) for rank in ranks])
    dist.all_reduce(sums)  # every rank; two rows of sums over predictions
    return tuple(_means(row) for row in sums)  # type: ignore[return-value]  # two rows


def retriever_batch(
    batch: Batch, config: TrainConfig, num_items: int, mesh: Mesh, *, train: bool = False
) -> RetrievalBatch:
    """The retriever's form of a batch, with negatives for training."""
    retrieval = config.model.retrieval
    assert retrieval is not None
    made = retrieval_batch(
        batch,
        num_items=num_items,
        num_negatives=retrieval.num_negatives if train else 0,
        shared=retrieval.share_negatives,
        seed=config.seed,
        world_size=mesh.world_size,
    )
    return made.pin_memory() if mesh.device.type == "cuda" else made


def retrieval_table(model: dict[str, float], popularity: dict[str, float]) -> str:
    """The model's metrics beside popularity's."""
    header = f"{'':<12}" + "".join(f"{name:>10}" for name in model)
    rows = [
        f"{name:<12}" + "".join(f"{value:>10.4f}" for value in values.values())
        for name, values in (("model", model), ("popularity", popularity))
    ]
    return "\n".join([header, "-" * len(header), *rows])


def _predict(
    model: ParallelModel, batch: RetrievalBatch, config: TrainConfig, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """(outputs [P, E], true items [P], pairs (prediction, earlier item) as [2, pairs]) of a batch."""
    assert config.model.retrieval is not None
    on_device = batch.to(device, non_blocking=True)
    _, output = model.forward(on_device)
    rows = output.rows
    seen = torch.zeros(2, 0, dtype=torch.long, device=device)
    if config.model.retrieval.exclude_seen and rows.numel():
        ends = torch.cumsum(on_device.lens, 0)
        starts = (ends - on_device.lens)[torch.searchsorted(ends, rows, right=True)]
        lens = rows + 1 - starts
        prediction = torch.repeat_interleave(torch.arange(rows.numel(), device=device), lens)
        place = torch.arange(prediction.numel(), device=device) - (torch.cumsum(lens, 0) - lens)[prediction]
        seen = torch.stack([prediction, on_device.item_ids[starts[prediction] + place]])
    return output.outputs, on_device.item_ids[rows + 1], seen


def _join_seen(parts: list[Tensor], sizes: list[int]) -> Tensor:
    """Pairs of all batches, each once, in the order of the items."""
    first = 0
    for part, size in zip(parts, sizes, strict=True):
        part[0] += first
        first += size
    pairs: Tensor = torch.unique(torch.cat(parts, dim=1).flip(0), dim=1)
    return pairs.flip(0)


def _count_better(
    model: ParallelModel,
    outputs: Tensor,
    targets: Tensor,
    seen: Tensor,
    counts: Tensor,
    chunk: int,
) -> tuple[Tensor, Tensor]:
    """Rank of each true item by the model and by popularity, [P], 1 for the best; ties count against it."""
    device = outputs.device
    num_items = counts.numel()
    # All of one width, which rounding depends on, so that equal items tie: the last may begin in the one before.
    width = min(chunk, num_items)
    chunks = [(first, min(first + width, num_items)) for first in range(0, num_items, width)]
    blocks = [slice(first, first + PREDICTIONS) for first in range(0, targets.numel(), PREDICTIONS)]
    wanted = torch.full((targets.numel(),), -torch.inf, device=device)
    for first, last in chunks:
        start = last - width
        # A pass of its own: a score must be the same number here and where it is compared.
        items = _item_vectors(model, start, last, device)
        for block in blocks:
            here = (targets[block] >= first) & (targets[block] < last)
            place = (targets[block] - start).clamp(0, width - 1)
            mine = (outputs[block] @ items.t()).gather(1, place[:, None])[:, 0]
            wanted[block] = torch.where(here, mine, wanted[block])
    better, more_popular = (torch.zeros_like(targets) for _ in range(2))
    popularity = counts[targets]
    for first, last in chunks:
        start = last - width
        items, item_ids = _item_vectors(model, start, last, device), torch.arange(start, last, device=device)
        if seen.numel():
            bounds = torch.searchsorted(seen[1].contiguous(), torch.tensor([first, last], device=device))
            prediction, item = seen[:, bounds[0] : bounds[1]]
        for block in blocks:
            counted = (item_ids >= first) & (item_ids != targets[block][:, None])
            if seen.numel():
                mine = (prediction >= block.start) & (prediction < block.stop)
                counted[prediction[mine] - block.start, item[mine] - start] = False
            # Not ">=", which a score that is not a number would pass as the best.
            better[block] += (~(outputs[block] @ items.t() < wanted[block][:, None]) & counted).sum(1)
            more_popular[block] += ((counts[start:last] >= popularity[block][:, None]) & counted).sum(1)
    return better + 1, more_popular + 1


def _item_vectors(model: ParallelModel, first: int, last: int, device: torch.device) -> Tensor:
    """Vectors of the items from `first` on, [last - first, E].

    A collective: every rank asks for the same rows, whatever its number of predictions.
    """
    item_ids = torch.arange(first, last, device=device)
    features = retrieval_features(item_ids, item_ids[:0])
    rows = rows_by_feature(model.tables(features))[ITEM_FEATURE].values()
    assert isinstance(model.dense, RetrieverTower)
    return model.dense.unit(rows)


def _popularity(data: DataConfig, mesh: Mesh) -> Tensor:
    """How often each item stands in the training split, of which every rank reads its share."""
    counts = _item_counts(data, mesh.rank, mesh.world_size).to(mesh.device, copy=True)
    dist.all_reduce(counts)  # every rank
    return counts


@functools.cache
def _item_counts(data: DataConfig, rank: int, world_size: int) -> Tensor:
    """The same at every evaluation of a run."""
    return torch.from_numpy(item_counts(data, rank, world_size))


def _means(sums: Tensor) -> dict[str, float]:
    names = [*(f"{kind}@{k}" for kind in ("hr", "ndcg") for k in CUTOFFS), "mrr"]
    total = float(sums[-1])
    # Without predictions there is no mean: NaN, which files write as null.
    return {name: float(value) / total if total else float("nan") for name, value in zip(names, sums, strict=False)}
