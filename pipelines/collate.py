"""Assembles one rank's batch from units' flat arrays.  Slices and concatenations only: no loop over events."""

from collections.abc import Mapping, Sequence

import numpy as np

from pipelines.columns import AnyArray, IntArray, Samples
from pipelines.config import DataConfig
from pipelines.features import DatasetInfo
from pipelines.global_batches import BatchPlan
from pipelines.packed import SIDE_PREFIX, Contents, Packed, bag_lens, pack
from pipelines.stochastic_length import choose_events

NO_USER = -1
"""User of the sample that stands in where a rank has none."""

Selection = slice | IntArray


def collate(
    plan: BatchPlan, units: Mapping[tuple[int, int], Samples], config: DataConfig, info: DatasetInfo, world_size: int
) -> Packed:
    """The batch of a plan whose units were read.

    A rank without samples gets one sample with zero ids, no history and no candidates, so that every rank has something
    to look up: it adds nothing to any gradient.
    """
    rows = [units[key] for key in zip(plan.samples.source.tolist(), plan.samples.unit.tolist(), strict=True)]
    places = plan.samples.row.tolist()
    history, candidates = plan.history, plan.candidates
    user, context = _scalars(rows, places, info)
    if not rows:
        history = candidates = np.zeros(1, dtype=np.int64)
    past = _history_selections(plan, rows, places, config)
    first = [int(row.candidate["item_id"].offsets[place]) for row, place in zip(rows, places, strict=True)]
    # Of a rank without samples, the stand-in's lengths remain.
    future = [slice(start, start + kept) for start, kept in zip(first, candidates.tolist(), strict=False)]
    items = _merge(rows, past, future, "item_id")
    num_ids = [len(user)] * len(context) + [int((history + candidates).sum())]
    memory, memory_places = pack(
        {
            "ids": (np.int64, [*context, *items]),
            "bag_lens": (np.int64, [bag_lens(num_ids)]),
            "user_id": (np.int64, [user]),
            "history_lens": (np.int64, [history]),
            "num_candidates": (np.int64, [candidates]),
            "action": (np.int32, _merge_history(rows, past, future, "action")),
            "timestamp": (np.int64, _merge(rows, past, future, "timestamp")),
            "candidate_action": (
                np.int32,
                [row.candidate["action"].values[chosen] for row, chosen in zip(rows, future, strict=True)],
            ),
            # Of a global batch without candidates, 1 over ranks, for a loss of zero.
            "loss_denominator": (np.float32, [np.array([max(plan.global_candidates, 1) / world_size], np.float32)]),
            **{
                SIDE_PREFIX + name: (_kind(rows, name), _merge_history(rows, past, future, name))
                for name in config.history_features
            },
        }
    )
    contents = Contents(
        size_bytes=memory.numel(),
        places=memory_places,
        context_names=tuple(info.context_features),
        position=plan.position,
        global_samples=plan.global_samples,
        global_tokens=plan.global_tokens,
        imbalance=plan.imbalance,
    )
    return Packed(memory, (contents,))


def _scalars(rows: Sequence[Samples], places: Sequence[int], info: DatasetInfo) -> tuple[IntArray, list[IntArray]]:
    """Users and context features of the samples, or of the one that stands in for none."""
    if not rows:
        return np.full(1, NO_USER), [np.zeros(1, dtype=np.int64) for _ in info.context_features]
    user, *context = (
        np.fromiter((row.scalars[name][place] for row, place in zip(rows, places, strict=True)), np.int64)
        for name in ("user_id", *info.context_features)
    )
    return user, context


def _history_selections(
    plan: BatchPlan, rows: Sequence[Samples], places: Sequence[int], config: DataConfig
) -> list[Selection]:
    """Where each kept history lies in its unit: the newest events, or the choice of stochastic length."""
    selections: list[Selection] = []
    newest = config.stochastic_length.selection == "recent"
    capped = np.minimum(plan.samples.history, config.max_history_len)
    for index, (row, place, kept) in enumerate(zip(rows, places, plan.history.tolist(), strict=True)):
        end = int(row.history["item_id"].offsets[place + 1])
        if newest or kept == capped[index]:
            selections.append(slice(end - kept, end))
            continue
        samples = plan.samples
        key = (config.seed, *(int(each[index]) for each in (samples.source, samples.epoch, samples.sample)))
        length = int(capped[index])
        selections.append(end - length + choose_events(length, kept, config.stochastic_length, key))
    return selections


def _merge(rows: Sequence[Samples], past: Sequence[Selection], future: Sequence[slice], name: str) -> list[AnyArray]:
    """The parts of a list column packed sample by sample: each history, then the candidates."""
    parts: list[AnyArray] = []
    for row, before, after in zip(rows, past, future, strict=True):
        parts += (row.history[name].values[before], row.candidate[name].values[after])
    return parts


def _merge_history(
    rows: Sequence[Samples], past: Sequence[Selection], future: Sequence[slice], name: str
) -> list[AnyArray]:
    """As `_merge`, with zeros in the candidates' place."""
    parts: list[AnyArray] = []
    for row, before, after in zip(rows, past, future, strict=True):
        values = row.history[name].values
        parts += (values[before], np.zeros(after.stop - after.start, dtype=values.dtype))
    return parts


def _kind(rows: Sequence[Samples], name: str) -> np.dtype[np.generic]:
    """The type of a further history column; a batch of nothing has whole numbers."""
    return rows[0].history[name].values.dtype if rows else np.dtype(np.int64)
