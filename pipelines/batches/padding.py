"""Pads batches to few sizes: one more sample fills a batch up to a size that many batches share.

What a model launches depends on sizes alone; steps of the same sizes can be recorded once and replayed.  The padding is
one sample at the end, whose events and candidates stand for nothing: models leave it out of attention and of the
loss.  Samples that are missing before it are empty.  Sizes are rounded up to the next of eight an octave, so that
padding adds 12.5% at most, some 5% on average.  Ids are not padded: tables look up those of the batch itself.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch

from pipelines.batches.batch import Batch
from pipelines.batches.packed import LABEL_PREFIX, LENS_PREFIX, NUMBER_PREFIX, pack, unpack
from pipelines.features import UNKNOWN_TIME
from pipelines.selection import Selection
from pipelines.storage.columns import AnyArray


class Count(NamedTuple):
    """Rows of one part of a feature or array."""

    real: int
    padded: int
    """Rows with padding, at least as many."""


class BatchPadding(Protocol):
    """How a task's batches are padded; given batches on the device."""

    def sizes(self, batch: Any) -> tuple[int, ...]:
        """What batches have to share to be of one size."""

    def lookups(self, batch: Any) -> Mapping[str, Sequence[Count]]:
        """Rows of each looked-up feature, part by part."""

    def kept(self, batch: Any, device: torch.device) -> Any:
        """The padded batch in memory of its own, for others of its sizes to be written over it."""

    def fill(self, kept: Any, batch: Any) -> None:
        """Write the padded batch over one of its sizes."""


def rounded(count: int) -> int:
    """The smallest of eight sizes an octave that holds `count`, or of the multiples of 4,096 where these are closer;
    below 16, the count itself.

    Small batches wait for launches, which few sizes spare them; large ones for what is computed, padding included.
    """
    step = min(1 << max(0, count.bit_length() - 4), 4096)
    return -(-count // step) * step


@dataclass(frozen=True, slots=True)
class Padding:
    """How batches of a selection are padded."""

    selection: Selection
    pooled: frozenset[str] = frozenset()
    """Spaces whose tables give sums in the place of many ids' rows."""
    rectangular: bool = False
    """Whether layers pad sequences to the longest, which is then part of the size."""

    def sizes(self, batch: Batch) -> tuple[int, ...]:
        """What batches have to share to be of one size."""
        lens = batch.inputs.history_lens_host + batch.inputs.num_candidates_host
        longest = (rounded(int(lens.max()) if lens.numel() else 0),) if self.rectangular else ()
        counts = [each.padded for counts in self.lookups(batch).values() for each in counts]
        return (*counts, *(each.padded for each in _parts(batch).values()), *longest)

    def lookups(self, batch: Batch) -> dict[str, Sequence[Count]]:
        """Rows of each looked-up feature, part by part."""
        parts = _parts(batch)
        found: dict[str, Sequence[Count]] = {}
        for feature in self.selection.features:
            if feature.space is None:
                continue
            found[feature.name] = [parts[part] for part in feature.parts]
            if feature.kind == "ids" and feature.space not in self.pooled:
                many = len(batch.inputs.ids_host(feature.name))
                found[feature.name] = [Count(many, rounded(many))]
        if self.selection.draw is not None:
            drawn = batch.labels.drawn.numel()
            found[self.selection.draw.name] = [Count(drawn, drawn)]
        return found

    def padded(self, batch: Batch) -> Batch:
        """The batch in host memory with its padding, without ids.  It is not trained on by itself: look `batch` up."""
        contents, memory = batch.contents, batch.host_memory
        of_rows = {each.name: each.parts for each in self.selection.features}
        parts, arrays = _parts(batch), {}
        for name, place in contents.places.items():
            rows = _parts_of(name, of_rows)
            if rows is None:
                continue
            array = unpack(memory, place).numpy()
            counts = [parts[part] for part in rows] or [Count(len(array), len(array))]
            arrays[name] = (array.dtype, list(_filled(name, array, counts)))
        for name, part in (("history_lens", "event"), ("num_candidates", "candidate")):
            # All padding goes to the last sample.
            arrays[name][1][1][-1] = parts[part].padded - parts[part].real
        padded_memory, places = pack(arrays)
        changed = replace(contents, places=places, size_bytes=padded_memory.numel(), lookups=(), padded=True)
        return Batch(changed, padded_memory)

    def kept(self, batch: Batch, device: torch.device) -> Batch:
        """The padded batch in memory of its own, for others of its sizes to be written over it.

        What it holds on the host stays that of this batch, on every device: of it, models may use what `sizes` says.
        """
        padded = self.padded(batch)
        return Batch(padded.contents, padded.host_memory, padded.host_memory.to(device, copy=True))

    def fill(self, kept: Batch, batch: Batch) -> None:
        """Write the padded batch over one of its sizes; the host does not wait for the copy to a GPU."""
        padded = self.padded(batch)
        kept.copy_(padded.pinned() if kept.inputs.history_lens.is_cuda else padded)


def _parts(batch: Batch) -> dict[str, Count]:
    """Samples, events and candidates; one sample more than there are, at least two."""
    inputs = batch.inputs
    samples = inputs.history_lens_host.numel()
    events, candidates = int(inputs.history_lens_host.sum()), int(inputs.num_candidates_host.sum())
    return {
        "sample": Count(samples, rounded(max(1, samples) + 1)),
        "event": Count(events, rounded(events)),
        "candidate": Count(candidates, rounded(candidates)),
    }


def _parts_of(name: str, of_rows: Mapping[str, Sequence[str]]) -> Sequence[str] | None:
    """The parts whose rows an array holds, none for what every batch has as many of; None for what a model does not
    read behind its tables."""
    for prefix in (NUMBER_PREFIX, LENS_PREFIX):
        if name.startswith(prefix):
            return of_rows.get(name.removeprefix(prefix))
    return ("candidate",) if name.startswith(LABEL_PREFIX) else _PARTS.get(name)


_PARTS: dict[str, tuple[str, ...]] = {
    "user_id": ("sample",),
    "history_lens": ("sample",),
    "num_candidates": ("sample",),
    "action": ("event",),
    "timestamp": ("event", "candidate"),
    "candidate_action": ("candidate",),
    "loss_denominator": (),
    "next_denominator": (),
    "next_item_id": ("event",),
    "drawn": (),
}


def _filled(name: str, array: AnyArray, counts: Sequence[Count]) -> Iterator[AnyArray]:
    """The array's parts, each with its padding behind it."""
    start = 0
    for real, padded in counts:
        yield array[start : start + real]
        yield _padding(name, array, padded - real)
        start += real


def _padding(name: str, array: AnyArray, count: int) -> AnyArray:
    """What stands for padding: unknown where there is a value for it."""
    fill: Any = 0
    if name == "timestamp":
        fill = UNKNOWN_TIME
    elif name == "next_item_id":
        fill = -1
    elif name.startswith(NUMBER_PREFIX):
        fill = np.nan
    elif name.startswith(LABEL_PREFIX):
        # A weight or a keep rate of 0 would make infinite what is then left out.
        fill = 1
    return np.full(count, fill, dtype=array.dtype)
