"""What a rank looks up a step, counted from the data where its description does not say."""

from dataclasses import replace
from itertools import islice

import numpy as np
import torch

from embeddings.problem import BatchLoad
from pipelines.batch import Batch
from pipelines.loader import build_loader
from trainer.resolve import Resolved

COUNTED_BATCHES = 4
"""First batches of the data that are counted."""


def lookup_load(resolved: Resolved, world_size: int) -> BatchLoad:
    """The lookups of a rank's step; the same on every rank that asks.

    How many of a table's ids are distinct is counted in the first batches, if the exchange sends those alone.
    """
    load = resolved.lookup_load(world_size)
    if not resolved.config.placement.exchange.deduplicate:
        return load
    return replace(load, distinct=distinct_parts(resolved, world_size))


def distinct_parts(resolved: Resolved, world_size: int) -> dict[str, float]:
    """By table, how many of the ids of rank 0's batches are distinct, as a part of them; of tables without ids, none.

    Features that are drawn as a step begins, negatives for example, are in no batch: they are taken to be distinct.
    """
    loader = build_loader(
        replace(resolved.config.data, reader_threads=0),
        split="train",
        rank=0,
        world_size=world_size,
        selection=resolved.task.selection,
        cost=resolved.balanced_cost,
    )
    batches: list[Batch] = list(islice(loader, COUNTED_BATCHES))
    parts = {}
    for table in resolved.tables:
        ids = distinct = 0
        for batch in batches:
            features = batch.features.to_dict()
            held = [features[name].values() for name in table.features if name in features]
            joined = torch.cat(held) if held else torch.empty(0, dtype=torch.int64)
            ids, distinct = ids + joined.numel(), distinct + np.unique(joined.numpy()).size
        if ids:
            parts[table.name] = distinct / ids
    return parts
