"""Assembles one rank's batch from units' flat arrays.  Slices and concatenations only: no loop over events."""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from pipelines.batch import ITEM_FEATURE, Batch
from pipelines.columns import AnyArray, IntArray, Samples
from pipelines.config import DataConfig
from pipelines.global_batches import BatchPlan
from pipelines.schema import DatasetInfo
from pipelines.stochastic_length import choose_events

NO_USER = -1
"""User of the sample that stands in where a rank has none."""

Selection = slice | IntArray


def collate(
    plan: BatchPlan, units: Mapping[tuple[int, int], Samples], config: DataConfig, info: DatasetInfo, world_size: int
) -> Batch:
    """The batch of a plan whose units were read.

    A rank without samples gets one sample with zero ids, no history and no candidates, because TorchRec's jagged
    tensors need at least one: it adds nothing to any gradient.
    """
    rows = [units[key] for key in zip(plan.samples.source.tolist(), plan.samples.unit.tolist(), strict=True)]
    places = plan.samples.row.tolist()
    history, candidates = plan.history, plan.candidates
    user, context = _scalars(rows, places, info)
    if not rows:
        history = candidates = np.zeros(1, dtype=np.int64)
    past = _history_selections(plan, rows, places, config)
    future = [
        slice(start, start + kept)
        for start, kept in zip(
            [int(row.candidate["item_id"].offsets[place]) for row, place in zip(rows, places, strict=True)],
            candidates.tolist(),
            strict=False,
        )
    ]
    lens = history + candidates
    features = KeyedJaggedTensor(
        keys=[*info.context_features, ITEM_FEATURE],
        values=torch.from_numpy(np.concatenate([*context, _merge(rows, past, future, "item_id", np.int64)])),
        lengths=torch.from_numpy(np.concatenate([np.ones(len(user) * len(context), dtype=np.int64), lens])),
    )
    action = torch.from_numpy(_merge(rows, past, future, "action", np.int32, zero_candidates=True))
    side = {
        name: torch.from_numpy(_merge(rows, past, future, name, _kind(rows, name), zero_candidates=True))
        for name in config.history_features
    }
    labels = [row.candidate["action"].values[chosen] for row, chosen in zip(rows, future, strict=True)]
    return Batch(
        features=features,
        user_id=torch.from_numpy(user),
        history_lens=torch.from_numpy(history),
        num_candidates=torch.from_numpy(candidates),
        history_lens_host=torch.from_numpy(history),
        num_candidates_host=torch.from_numpy(candidates),
        action=action,
        timestamp=torch.from_numpy(_merge(rows, past, future, "timestamp", np.int64)),
        side=side,
        candidate_action=torch.from_numpy(np.concatenate([np.zeros(0, dtype=np.int32), *labels])),
        loss_denominator=_denominator(plan, world_size),
        action_host=action,
        side_host=side,
        position=plan.position,
        global_samples=plan.global_samples,
        global_tokens=plan.global_tokens,
        imbalance=plan.imbalance,
    )


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


def _merge(
    rows: Sequence[Samples],
    past: Sequence[Selection],
    future: Sequence[slice],
    name: str,
    kind: type[np.generic] | np.dtype[np.generic],
    zero_candidates: bool = False,
) -> AnyArray:
    """One list column packed sample by sample: each history, then the candidates or as many zeros."""
    parts: list[AnyArray] = [np.zeros(0, dtype=kind)]
    for row, before, after in zip(rows, past, future, strict=True):
        parts.append(row.history[name].values[before])
        if zero_candidates:
            parts.append(np.zeros(after.stop - after.start, dtype=kind))
        else:
            parts.append(row.candidate[name].values[after])
    return np.concatenate(parts)


def _kind(rows: Sequence[Samples], name: str) -> np.dtype[np.generic]:
    """The type of a further history column; a batch of nothing has whole numbers."""
    return rows[0].history[name].values.dtype if rows else np.dtype(np.int64)


def _denominator(plan: BatchPlan, world_size: int) -> Tensor:
    """Candidates of the global batch over ranks; of a batch without any, 1 over ranks, for a loss of zero."""
    return torch.tensor(max(plan.global_candidates, 1) / world_size, dtype=torch.float32)
