"""How the retriever's batches are padded to few sizes: `pipelines.batches.padding`, for sequences and negatives."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pipelines.batches.padding import Count, rounded
from pipelines.features import ITEM_ID
from trainer.models.layout import to_device
from trainer.models.negatives import NEGATIVE_FEATURE, RetrievalBatch, retrieval_features


@dataclass(frozen=True, slots=True)
class SequencePadding:
    """The last sequence is the padding.  Negatives, the same number in every batch, need none."""

    rectangular: bool = False
    """Whether layers pad sequences to the longest, which is then part of the size."""

    def sizes(self, batch: RetrievalBatch) -> tuple[int, ...]:
        """What batches have to share to be of one size."""
        lens = batch.inputs.lens_host
        longest = (rounded(int(lens.max()) if lens.numel() else 0),) if self.rectangular else ()
        counts = [each.padded for counts in self.lookups(batch).values() for each in counts]
        return (len(_padded_lens(batch)), *counts, *longest)

    def lookups(self, batch: RetrievalBatch) -> dict[str, Sequence[Count]]:
        """Rows of each looked-up feature."""
        events, negatives = int(batch.inputs.lens_host.sum()), batch.negative_ids.numel()
        # At least one event, so that there is a sequence.
        return {ITEM_ID: [Count(events, rounded(events + 1))], NEGATIVE_FEATURE: [Count(negatives, negatives)]}

    def kept(self, batch: RetrievalBatch, device: torch.device) -> RetrievalBatch:
        """The padded batch in memory of its own, for others of its sizes to be written over it."""
        lens = _padded_lens(batch)
        item_ids = torch.zeros(int(lens.sum()), dtype=torch.long, device=device)
        inputs = replace(
            batch.inputs,
            features=retrieval_features(item_ids[:0], item_ids[:0]),
            item_ids=item_ids,
            action=torch.zeros_like(item_ids, dtype=batch.inputs.action.dtype),
            time=torch.zeros_like(item_ids),
            next_time=torch.zeros_like(item_ids),
            lens=lens.to(device),
            lens_host=lens.clone(),
            padded=True,
        )
        kept = replace(
            batch,
            inputs=inputs,
            negative_ids=torch.zeros_like(batch.negative_ids),
            loss_denominator=torch.zeros_like(batch.loss_denominator),
        )
        self.fill(kept, batch)
        return kept

    def fill(self, kept: RetrievalBatch, batch: RetrievalBatch) -> None:
        """Write the padded batch over one of its sizes; the host does not wait for the copy to a GPU."""
        events = batch.inputs.item_ids.numel()
        for name in ("item_ids", "action", "time", "next_time"):
            getattr(kept.inputs, name)[:events].copy_(getattr(batch.inputs, name))
        kept.inputs.lens.copy_(to_device(_padded_lens(batch), kept.inputs.lens.device))
        kept.negative_ids.copy_(batch.negative_ids)
        kept.loss_denominator.copy_(batch.loss_denominator)


def _padded_lens(batch: RetrievalBatch) -> Tensor:
    """[samples with padding] int64 in host memory."""
    lens = batch.inputs.lens_host
    padded = lens.new_zeros(rounded(max(1, lens.numel()) + 1))
    padded[: lens.numel()] = lens
    events = int(lens.sum())
    padded[-1] = rounded(events + 1) - events
    return padded
