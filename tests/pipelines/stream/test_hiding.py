"""Ids of training samples that stand for the unknown one: how many, which, and that nothing else changes."""

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch

from pipelines.batches.batch import Batch
from pipelines.config import DataConfig
from pipelines.reading.loader import build_loader, dataset_info
from pipelines.selection import Selection, select
from pipelines.stream.hiding import hidden
from tests.support.small_data import small_dataset


@pytest.mark.parametrize("share", [0.01, 0.3])
def test_about_the_share_of_every_stretch_is_replaced(share: float) -> None:
    """By draws of each stretch alone, so long and short ones fare alike; 0 is no id that is looked for."""
    draw = np.random.default_rng(0)
    lens = draw.integers(0, 7, 300_000)
    bounds = np.concatenate(([0], lens.cumsum()))
    keys, ids = draw.integers(0, 2**62, len(lens)), np.ones(bounds[-1], dtype=np.int64)
    replaced = hidden(ids, bounds, keys, share, 3)
    places = replaced == 0
    # A place that is drawn twice is hidden once.
    assert ids.all() and 0.85 * share < places.mean() <= share * 1.1
    begins = bounds[:-1][lens == 6]
    assert all(places[begins + place].mean() == pytest.approx(places.mean(), rel=0.5) for place in range(6))
    alone = np.ones(bounds[500] - bounds[100], dtype=np.int64)
    alone = hidden(alone, bounds[100:501] - bounds[100], keys[100:500], share, 3)
    assert np.array_equal(alone, replaced[bounds[100] : bounds[500]])


Ids = dict[tuple[int, int], dict[str, list[int]]]
"""By user and time of the first candidate, the ids of each feature: events', then candidates'."""


def by_sample(batch: Batch, selection: Selection) -> Ids:
    inputs = batch.inputs
    ends = inputs.num_candidates.cumsum(0)
    times = inputs.timestamp[len(inputs.action) + ends - inputs.num_candidates]
    found: Ids = {key: {} for key in zip(inputs.user_id.tolist(), times.tolist(), strict=True)}
    rows = {"sample": torch.ones_like(inputs.history_lens), "event": inputs.history_lens}
    rows["candidate"] = inputs.num_candidates
    for feature in selection.features:
        if feature.space is None:
            continue
        ids = inputs.ids_host(feature.name).tolist()
        lens = inputs.lens[feature.name].tolist() if feature.kind == "ids" else [1] * len(ids)
        of_rows = np.cumsum([0, *lens])
        of_samples = np.cumsum([0, *(length for part in feature.parts for length in rows[part].tolist())])
        for number, (start, end) in enumerate(pairwise(of_samples)):
            sample = list(found)[number % len(found)]
            found[sample].setdefault(feature.name, []).extend(ids[of_rows[start] : of_rows[end]])
    return found


def test_samples_hide_the_same_on_any_number_of_ranks_and_evaluation_nothing() -> None:
    config = DataConfig(
        path=str(small_dataset()), global_batch_size=40, max_history_len=24, max_samples=200, reader_threads=0
    )
    selection = select(dataset_info(config))
    assert {feature.kind for feature in selection.features} == {"id", "ids", "number"}

    def stream(share: float, ranks: int, split: str = "train") -> list[Ids]:
        loaders = [
            build_loader(
                replace(config, unknown_share=share), split=split, rank=rank, world_size=ranks, selection=selection
            )  # type: ignore[call-overload]
            for rank in range(ranks)
        ]
        parts = [[by_sample(batch, selection) for batch in loader] for loader in loaders]
        return [{key: ids for part in batch for key, ids in part.items()} for batch in zip(*parts, strict=True)]

    plain, replaced = stream(0.0, 1), stream(0.2, 1)
    assert stream(0.2, 3) == replaced
    counts: dict[str, list[int]] = {}
    for before, after in zip(plain, replaced, strict=True):
        for key, features in before.items():
            for name, ids in features.items():
                changed = [new for old, new in zip(ids, after[key][name], strict=True) if old != new]
                assert not any(changed), "what is replaced is replaced by 0"
                counts.setdefault(name, [0, 0])
                counts[name][0] += len(changed)
                counts[name][1] += sum(1 for old in ids if old)
    assert all(0.1 < changed / known < 0.25 for changed, known in counts.values() if known > 400)
    assert stream(0.2, 1, "eval") == stream(0.0, 1, "eval")
