"""A batch as the retriever reads it: all events in one sequence a user, and the items to score against.

Negatives are uniform over all rows of the items' table, those of no item too, and a function of (seed, global batch)
and, where each prediction has its own, of the user and the predicted event's place: they depend neither on the number
of ranks nor on where a run was resumed.  Two samples of one user in one batch share
theirs.

Shapes: B users, S events of all users, P predictions, N negatives.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor
from torchrec.streamable import Pipelineable

from pipelines.batches.batch import Batch, Inputs
from pipelines.batches.packed import bag_lens
from pipelines.features import ITEM_ID
from pipelines.stream.draws import DRAWN, draw_ids
from pipelines.stream.randomness import random_bits
from trainer.models.layout import enumerate_users

NEGATIVE_FEATURE = "negative_item_id"
"""Looked up in the item table too."""
OF_DEVICE = ("negative_ids", "num_evaluated", "loss_denominator", "older_ids", "older_lens")
"""What a batch has on its device besides its inputs."""


@dataclass(frozen=True, kw_only=True)
class SequenceInputs:
    """What the retriever reads: a sequence of items a sample."""

    features: KeyedJaggedTensor
    """Keys: `item_id`, all sequences' items, and `negative_item_id`, empty but in training."""
    item_ids: Tensor
    """[S] int64, each sequence oldest first."""
    action: Tensor
    """[S] int32 what was done with each item, bit i for action i."""
    time: Tensor
    """[S] int64 seconds."""
    next_time: Tensor
    """[S] int64 seconds of the event behind each; of a sequence's last event, its own."""
    lens: Tensor
    """[B] int64 items of each sequence, on the batch's device."""
    lens_host: Tensor
    """[B] likewise, in host memory."""
    padded: bool = False
    """Whether the last sample is padding, which stands for nothing."""
    bags: Mapping[tuple[str, ...], KeyedJaggedTensor] = field(default_factory=dict)
    """No table is pooled."""


@dataclass(frozen=True, kw_only=True)
class RetrievalBatch(Pipelineable):
    """One rank's share of a global batch for the retriever."""

    inputs: SequenceInputs
    """History and candidates of each sample as one sequence."""
    negative_ids: Tensor
    """[N] shared by all predictions, or [P, N] each prediction's own; int64, empty in evaluation."""
    num_evaluated: Tensor
    """[B] int64: so many of the last events are what evaluation asks for (the candidates), on the batch's device."""
    num_evaluated_host: Tensor
    """[B] likewise, in host memory."""
    loss_denominator: Tensor
    """[] float32: predictions of the global batch / number of ranks, so that the ranks' average is the global mean."""
    older_ids: Tensor
    """Items of the events before those in `inputs`, each sample's oldest first; int64, none in training."""
    older_lens: Tensor
    """[B] int64 how many each sample has of them."""

    def to(self, device: torch.device, non_blocking: bool = False) -> "RetrievalBatch":
        """The batch with all but the host tensors on `device`."""
        return self._mapped(lambda value: value.to(device, non_blocking=non_blocking))

    def record_stream(self, stream: torch.Stream) -> None:
        """Tell the allocator that `stream` uses the device tensors."""
        self._mapped(lambda value: value.record_stream(stream))

    def pin_memory(self) -> "RetrievalBatch":
        """A copy in page-locked memory, from which a device copies asynchronously."""
        return self._mapped(lambda value: value.pin_memory())

    def _mapped(self, change: Callable[[Any], Any]) -> "RetrievalBatch":
        """The batch with each tensor that belongs on the device changed."""
        inputs = {
            name: change(getattr(self.inputs, name))
            for name in ("features", "item_ids", "action", "time", "next_time", "lens")
        }
        own = {name: change(getattr(self, name)) for name in OF_DEVICE}
        return replace(self, inputs=replace(self.inputs, **inputs), **own)


def retrieval_batch(
    batch: Batch,
    *,
    num_items: int,
    num_negatives: int | None,
    shared: bool,
    seed: int,
    world_size: int,
    newest: int | None = None,
) -> RetrievalBatch:
    """The retriever's form of a batch in host memory; with `num_negatives` 0, as evaluation needs it, None for all
    items.  Evaluation may have no more than the `newest` events of each history read."""
    inputs = batch.inputs
    assert newest is None or num_negatives == 0, "a loss counts all events of a batch"
    history = inputs.history_lens_host
    older_lens = torch.zeros_like(history) if newest is None else (history - newest).clamp(min=0)
    rows, lens = _in_sequences(inputs), history + inputs.num_candidates_host
    user, number = enumerate_users(lens, len(rows))
    older = number < older_lens[user]
    older_ids, rows, lens = inputs.ids_host(ITEM_ID)[rows[older]], rows[~older], lens - older_lens
    item_ids, time = inputs.ids_host(ITEM_ID)[rows], inputs.timestamp[rows]
    negative_ids = torch.zeros(0, dtype=torch.long)
    key = (seed, batch.position.batches)
    if num_negatives is None:
        negative_ids = torch.arange(num_items)
    elif num_negatives and shared:
        negative_ids = torch.from_numpy(draw_ids(key, np.arange(num_negatives), num_items))
    elif num_negatives:
        predictions = (lens - 1).clamp(min=0)
        sample = np.repeat(np.arange(lens.numel()), predictions.numpy())
        place = np.arange(len(sample)) - (predictions.cumsum(0) - predictions).numpy()[sample]
        of_users = random_bits((seed, DRAWN, batch.position.batches), inputs.user_id.numpy()).astype(np.int64)
        per_prediction = of_users[sample] + place
        index = per_prediction[:, None] * num_negatives + np.arange(num_negatives)
        negative_ids = torch.from_numpy(draw_ids(key, index, num_items))
    # Every sample has an event, so that all but one of its events are predicted.
    predictions_of_all = max(1, batch.global_tokens - batch.global_samples)
    return RetrievalBatch(
        inputs=SequenceInputs(
            features=retrieval_features(item_ids, negative_ids),
            item_ids=item_ids,
            action=torch.cat([inputs.action, batch.labels.action])[rows],
            time=time,
            next_time=_next(time, lens),
            lens=lens,
            lens_host=lens,
        ),
        negative_ids=negative_ids,
        num_evaluated=inputs.num_candidates_host,
        num_evaluated_host=inputs.num_candidates_host,
        loss_denominator=torch.tensor(predictions_of_all / world_size, dtype=torch.float32),
        older_ids=older_ids,
        older_lens=older_lens,
    )


def retrieval_features(item_ids: Tensor, negative_ids: Tensor) -> KeyedJaggedTensor:
    """The lookups of these ids, int64, `negative_ids` of any shape; their bags are not samples (`packed.bag_lens`)."""
    counts = [item_ids.numel(), negative_ids.numel()]
    lens = torch.from_numpy(bag_lens(counts)).to(item_ids.device)
    ids = torch.cat([item_ids, negative_ids.flatten()])
    return KeyedJaggedTensor([ITEM_ID, NEGATIVE_FEATURE], ids, lengths=lens, length_per_key=counts)


def _in_sequences(inputs: Inputs) -> Tensor:
    """Rows of all events and then all candidates, [S], in the order of sequences: a user's events, then candidates."""
    history, candidates = inputs.history_lens_host.numpy(), inputs.num_candidates_host.numpy()
    user = np.concatenate([np.repeat(np.arange(len(lens)), lens) for lens in (history, candidates)])
    return torch.from_numpy(np.argsort(user, kind="stable"))


def _next(values: Tensor, lens: Tensor) -> Tensor:
    """[S] the value behind each within its sequence; of a sequence's last, its own."""
    following = torch.arange(1, values.numel() + 1)
    following[lens[lens > 0].cumsum(0) - 1] -= 1
    return values[following]
