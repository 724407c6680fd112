"""Assembles one rank's batch from units' flat arrays.  Slices and concatenations only: no loop over events."""

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import DTypeLike

from pipelines.batches.packed import LABEL_PREFIX, LENS_PREFIX, NUMBER_PREFIX, Contents, Packed, bag_lens, pack
from pipelines.config import DataConfig
from pipelines.features import ITEM_ID, USER_ID
from pipelines.selection import Feature, Selection
from pipelines.storage.columns import AnyArray, Bags, IntArray, Samples, Values, join_values
from pipelines.storage.columns import Selection as Rows
from pipelines.stream.draws import draw_for_batch
from pipelines.stream.global_batches import BatchPlan
from pipelines.stream.hiding import hidden, sample_keys
from pipelines.stream.stochastic_length import choose_events

NO_USER = -1
"""User of the sample that stands in where a rank has none."""


class _Share:
    """One rank's samples of a global batch: which rows of which units, and which of their events."""

    def __init__(self, plan: BatchPlan, units: Mapping[tuple[int, int], Samples], config: DataConfig) -> None:
        keys = zip(plan.samples.source.tolist(), plan.samples.unit.tolist(), strict=True)
        self.units = [units[key] for key in keys]
        self.rows = plan.samples.row.tolist()
        self.events = _chosen_events(plan, self.units, self.rows, config)
        starts = [unit.candidate[ITEM_ID].offsets[row] for unit, row in zip(self.units, self.rows, strict=True)]
        lens = plan.candidates.tolist()
        self.candidates = [slice(start, start + kept) for start, kept in zip(starts, lens, strict=True)]

    def of_samples(self, name: str) -> Values:
        """[B] values of a column of samples."""
        return join_values([unit.scalars[name][row : row + 1] for unit, row in zip(self.units, self.rows, strict=True)])

    def of_events(self, name: str) -> list[Values]:
        """The values of a column of events, a piece a sample."""
        return [unit.history[name].values[chosen] for unit, chosen in zip(self.units, self.events, strict=True)]

    def of_candidates(self, name: str) -> list[Values]:
        """The values of a column of candidates, a piece a sample."""
        return [unit.candidate[name].values[kept] for unit, kept in zip(self.units, self.candidates, strict=True)]


def collate(
    plan: BatchPlan,
    units: Mapping[tuple[int, int], Samples],
    items: Mapping[str, Values],
    selection: Selection,
    config: DataConfig,
    world_size: int,
) -> Packed:
    """The batch of a plan whose units were read; `items` are the columns of items by id.

    A rank without samples gets one sample with zero ids, no history and no candidates, so that every rank has something
    to look up: it adds nothing to any gradient.
    """
    share = _Share(plan, units, config)
    history, candidates = plan.history, plan.candidates
    user = share.of_samples(USER_ID)
    if not share.units:
        history = candidates = np.zeros(1, dtype=np.int64)
        user = np.full(1, NO_USER)
    ids, arrays = _columns(share, items, selection)
    if config.unknown_share and share.units:
        _hide(ids, arrays, plan, selection, config)
    if selection.draw is not None:
        drawn = draw_for_batch(selection.draw, config.seed, plan.position.batches)
        ids[selection.draw.name] = drawn
        arrays["drawn"] = (np.int64, [drawn])
        arrays["next_item_id"] = (np.int64, [_next_items(share)])
    memory, places = pack(
        {
            "ids": (np.int64, list(ids.values())),
            "bag_lens": (np.int64, [bag_lens([len(each) for each in ids.values()])]),
            "user_id": (np.int64, [np.asarray(user)]),
            "history_lens": (np.int64, [history]),
            "num_candidates": (np.int64, [candidates]),
            "action": (np.int32, _arrays(share.of_events("action"))),
            "timestamp": (np.int64, _arrays(share.of_events("timestamp") + share.of_candidates("timestamp"))),
            "candidate_action": (np.int32, _arrays(share.of_candidates("action"))),
            "loss_denominator": _denominator(plan.global_candidates, world_size),
            "next_denominator": _denominator(plan.global_followed, world_size),
            **arrays,
        }
    )
    contents = Contents(
        size_bytes=memory.numel(),
        places=places,
        lookups=tuple(ids),
        position=plan.position,
        global_samples=plan.global_samples,
        global_tokens=plan.global_tokens,
        imbalance=plan.imbalance,
    )
    return Packed(memory, (contents,))


Arrays = dict[str, tuple[DTypeLike, Sequence[AnyArray]]]


def _denominator(count: int, world_size: int) -> tuple[DTypeLike, Sequence[AnyArray]]:
    """What ranks divide their sums by for the mean over `count` of a global batch; of none, 1 over ranks, for 0."""
    return np.float32, [np.array([max(count, 1) / world_size], np.float32)]


def _columns(share: _Share, items: Mapping[str, Values], selection: Selection) -> tuple[dict[str, AnyArray], Arrays]:
    """(the ids of each feature of ids, the further arrays of all features and labels)."""
    event_items, candidate_items = (
        np.asarray(join_values(pieces)) for pieces in (share.of_events(ITEM_ID), share.of_candidates(ITEM_ID))
    )
    item_ids = {"event": event_items, "candidate": candidate_items}
    ids: dict[str, AnyArray] = {}
    arrays: Arrays = {}
    for feature in selection.features:
        values = _values(feature, share, items, item_ids)
        if feature.kind == "number":
            arrays[NUMBER_PREFIX + feature.name] = (np.float32, [np.asarray(values)])
        elif isinstance(values, Bags):
            ids[feature.name] = values.values
            arrays[LENS_PREFIX + feature.name] = (np.int64, [values.lens()])
        else:
            ids[feature.name] = values
    for label in selection.labels:
        kind = np.float64 if label.kind == "number" else np.int64
        arrays[LABEL_PREFIX + label.name] = (kind, [np.asarray(join_values(share.of_candidates(label.stored)))])
    return ids, arrays


def _next_items(share: _Share) -> IntArray:
    """What follows each event: the next one's item or, behind the last one, the first candidate's; -1 for nothing."""
    following = [np.zeros(0, np.int64)]
    for events, candidates in zip(share.of_events(ITEM_ID), share.of_candidates(ITEM_ID), strict=True):
        both = np.concatenate([np.asarray(events), np.asarray(candidates)[:1], [-1]])
        following.append(both[1 : 1 + len(events)])
    return np.concatenate(following)


def _hide(ids: dict[str, AnyArray], arrays: Arrays, plan: BatchPlan, selection: Selection, config: DataConfig) -> None:
    """Let a share of the ids of every feature stand for the unknown one, in `ids`.

    What an item's id leads to has been joined by then: of a new item its own columns are known.
    """
    keys = sample_keys(plan.samples, config.seed)
    rows = {"sample": np.ones_like(plan.history), "event": plan.history, "candidate": plan.candidates}
    salts = {"sample": 0, "event": 0, "candidate": 1}
    for number, feature in enumerate(selection.features):
        if feature.name not in ids:
            continue
        bounds = np.concatenate([[0], *(rows[part] for part in feature.parts)]).cumsum()
        if feature.kind == "ids":
            (lens,) = arrays[LENS_PREFIX + feature.name][1]
            bounds = np.concatenate(([0], np.cumsum(lens)))[bounds]
        salted = np.concatenate([keys ^ salts[part] for part in feature.parts])
        ids[feature.name] = hidden(ids[feature.name], bounds, salted, config.unknown_share, number)


def _values(feature: Feature, share: _Share, items: Mapping[str, Values], item_ids: Mapping[str, IntArray]) -> Values:
    """A feature's values over its rows: events, then candidates, or samples."""
    if feature.parts == ("sample",):
        if share.units:
            return share.of_samples(feature.column)
        return Bags(np.zeros(0, np.int64), np.zeros(2, np.int64)) if feature.kind == "ids" else np.zeros(1, np.int64)
    if feature.name == ITEM_ID or (feature.of_item and feature.column in items):
        rows = np.concatenate([item_ids[part] for part in feature.parts])
        if not feature.of_item:
            return rows
        values = items[feature.column]
        return values[rows] if isinstance(values, Bags) else values.take(rows)
    pieces = share.of_events(feature.name) if "event" in feature.parts else []
    values = join_values(pieces + (share.of_candidates(feature.name) if "candidate" in feature.parts else []))
    if feature.kind == "ids" and not isinstance(values, Bags):
        return Bags(np.zeros(0, np.int64), np.zeros(1, np.int64))
    return values


def _arrays(pieces: Sequence[Values]) -> list[AnyArray]:
    """Pieces of a column with one value a row."""
    return [np.asarray(piece) for piece in pieces]


def _chosen_events(plan: BatchPlan, units: Sequence[Samples], rows: Sequence[int], config: DataConfig) -> list[Rows]:
    """Where each kept history lies in its unit: the newest events, or the choice of stochastic length."""
    chosen: list[Rows] = []
    newest = config.stochastic_length.selection == "recent"
    capped = np.minimum(plan.samples.history, config.max_history_len)
    for index, (unit, row, kept) in enumerate(zip(units, rows, plan.history.tolist(), strict=True)):
        end = int(unit.history[ITEM_ID].offsets[row + 1])
        if newest or kept == capped[index]:
            chosen.append(slice(end - kept, end))
            continue
        samples = plan.samples
        key = (config.seed, *(int(each[index]) for each in (samples.source, samples.epoch, samples.sample)))
        length = int(capped[index])
        chosen.append(end - length + choose_events(length, kept, config.stochastic_length, key))
    return chosen
