"""What a rank looks up a step, counted from the data where its description does not say."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import islice, pairwise
from typing import Any

import numpy as np
import torch

from embeddings.config import TableConfig
from embeddings.planning.frequencies import Frequencies
from embeddings.planning.problem import BatchLoad
from pipelines.batches.batch import Batch
from pipelines.features import ITEM_SPACE
from pipelines.reading.loader import build_loader
from trainer.resolve import Resolved

COUNTED_BATCHES = 4
"""First batches of the data that are counted."""


def lookup_load(resolved: Resolved, world_size: int) -> BatchLoad:
    """The lookups of a rank's step; the same on every rank that asks.

    How many of a table's ids are distinct is counted in the first batches, if the exchange sends those alone, and how
    many ids a row has, if there are tables that are pooled.  How often items are looked up is what the preparation
    counted; not where some are drawn at random, as negatives are.
    """
    load, deduplicates = resolved.stated_load(world_size), resolved.config.placement.exchange.deduplicate
    known = item_frequencies(resolved.info.details.get("statistics", {}).get("item_popularity", {}))
    read = {feature.name for feature in resolved.task.selection.features}
    counted = [table for table in resolved.tables if table.name == ITEM_SPACE and read.issuperset(table.features)]
    if known is not None and counted:
        load = replace(load, frequencies={ITEM_SPACE: known})
    pooled = any(table.pooled is not None for table in resolved.tables)
    if not deduplicates and not pooled:
        return load
    batches = _first_batches(resolved, world_size)
    if pooled:
        load = replace(load, ids_per_sample={**load.ids_per_sample, **_ids_per_sample(batches)})
    return replace(load, distinct=distinct_parts(batches, resolved.tables)) if deduplicates else load


def item_frequencies(popularity: Mapping[str, Any]) -> Frequencies | None:
    """From what a preparation writes of the items of events (`item_popularity`); None where it has written nothing."""
    if not popularity:
        return None
    items = float(popularity["items"])
    points = [
        (1.0, popularity["top_item_share"]),
        (0.01 * items, popularity["top_1_percent_share"]),
        (0.1 * items, popularity["top_10_percent_share"]),
        (items, 1.0),
    ]
    # With few items some of these points are the same.
    rising = [points[0], *(b for a, b in pairwise(points) if b[0] > max(a[0], 1.0) and b[1] > a[1])]
    return Frequencies(tuple(rising))


def _first_batches(resolved: Resolved, world_size: int) -> list[Batch]:
    loader = build_loader(
        replace(resolved.config.data, reader_threads=0),
        split="train",
        rank=0,
        world_size=world_size,
        selection=resolved.task.selection,
        cost=resolved.balanced_cost,
        info=resolved.info,
    )
    return list(islice(loader, COUNTED_BATCHES))


def _ids_per_sample(batches: Sequence[Batch]) -> dict[str, float]:
    """Ids a sample of each feature of many ids, taken to be at least one in all."""
    names = list(batches[0].inputs.lens) if batches else []
    samples = sum(batch.inputs.user_id.numel() for batch in batches)
    return {name: max(1, sum(batch.inputs.ids_host(name).numel() for batch in batches)) / samples for name in names}


def distinct_parts(batches: Sequence[Batch], tables: Sequence[TableConfig]) -> dict[str, float]:
    """By table, how many of the ids of the batches are distinct, as a part of them; of tables without ids, none.

    Features that are drawn as a step begins, negatives for example, are in no batch: they are taken to be distinct.
    """
    parts = {}
    for table in tables:
        ids = distinct = 0
        for batch in batches:
            features = batch.features.to_dict()
            held = [features[name].values() for name in table.features if name in features]
            joined = torch.cat(held) if held else torch.empty(0, dtype=torch.int64)
            ids, distinct = ids + joined.numel(), distinct + np.unique(joined.numpy()).size
        if ids:
            parts[table.name] = distinct / ids
    return parts
