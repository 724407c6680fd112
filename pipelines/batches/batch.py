"""One rank's share of a global batch, as models and TorchRec use it.  Knows tensors and devices, not files.

    Batch = Inputs (what a score depends on) + Labels (what a loss compares it with) + bookkeeping of the stream

B samples, H events of all histories, C candidates in all.  Events lie sample by sample, each history oldest first;
candidates likewise; where a tensor holds both, all events come first, then all candidates.  A feature has N rows: B, H,
C or H + C.
"""

from collections.abc import Mapping
from functools import cached_property

import torch
from torch import Tensor
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor
from torchrec.streamable import Pipelineable

from pipelines.batches.packed import LABEL_PREFIX, LENS_PREFIX, NUMBER_PREFIX, Contents, unpack


class Inputs:
    """What the model reads of B >= 0 samples; the tensors are views of the batch's one piece of memory.

    Names that end in `_host` are views of the memory that the batch was read into: known without waiting for a device.
    """

    def __init__(self, contents: Contents, host_memory: Tensor, memory: Tensor, ids: Tensor | None = None) -> None:
        """`ids` take the place of those in memory."""
        self._contents, self._host_memory, self._memory, self._ids = contents, host_memory, memory, ids

    def to(self, device: torch.device) -> "Inputs":
        """The inputs with their memory on `device`."""
        ids = None if self._ids is None else self._ids.to(device, non_blocking=True)
        return Inputs(self._contents, self._host_memory, self._memory.to(device, non_blocking=True), ids)

    @property
    def padded(self) -> bool:
        """Whether the last sample is padding, which stands for nothing."""
        return self._contents.padded

    @cached_property
    def features(self) -> KeyedJaggedTensor:
        """The ids to look up: a key a feature of ids.  Bags are not rows (`packed.bag_lens`)."""
        return KeyedJaggedTensor(
            list(self._contents.lookups),
            self._all_ids,
            lengths=self._array("bag_lens"),
            # Otherwise TorchRec asks the device, and waits for it.
            length_per_key=self._lookup_counts.tolist(),
        )

    @cached_property
    def bags(self) -> Mapping[tuple[str, ...], KeyedJaggedTensor]:
        """The ids of features of many ids, a bag a row; those that have as many rows stand together under their names.
        One empty bag where there is no row."""
        return _Bags(self)

    @property
    def _all_ids(self) -> Tensor:
        return self._array("ids") if self._ids is None else self._ids

    @cached_property
    def _lookup_counts(self) -> Tensor:
        """[features of ids] int64 ids of each."""
        return self._host_array("bag_lens").view(len(self._contents.lookups), -1).sum(1)

    @cached_property
    def lens(self) -> Mapping[str, Tensor]:
        """[N] int64 ids of each row, of the features of many ids."""
        return {name: self._array(LENS_PREFIX + name) for name in _names(self._contents, LENS_PREFIX)}

    @cached_property
    def numbers(self) -> Mapping[str, Tensor]:
        """[N] float32 features of numbers; NaN where missing."""
        return {name: self._array(NUMBER_PREFIX + name) for name in _names(self._contents, NUMBER_PREFIX)}

    def ids_host(self, name: str) -> Tensor:
        """[its ids] int64 of one feature of ids."""
        first, count = self._lookup(name)
        return self._host_array("ids")[first : first + count]

    def ids(self, name: str) -> Tensor:
        """[its ids] int64 of one feature of ids, on the batch's device."""
        first, count = self._lookup(name)
        return self._all_ids[first : first + count]

    def with_ids(self, ids: Mapping[str, Tensor]) -> "Inputs":
        """The same inputs with other ids, in host memory, of some features, as many as there were."""
        parts = [ids[name] if name in ids else self.ids_host(name) for name in self._contents.lookups]
        return Inputs(self._contents, self._host_memory, self._memory, torch.cat(parts).to(self._memory.device))

    def looking_up(self, features: KeyedJaggedTensor) -> "Inputs":
        """The same inputs with the ids of `features`, as many as there were."""
        return Inputs(self._contents, self._host_memory, self._memory, features.values())

    def numbers_host(self, name: str) -> Tensor:
        """[N] float32 of one feature of numbers."""
        return self._host_array(NUMBER_PREFIX + name)

    @cached_property
    def user_id(self) -> Tensor:
        """[B] int64 the users' ids."""
        return self._array("user_id")

    @cached_property
    def history_lens(self) -> Tensor:
        """[B] int64 events of each history."""
        return self._array("history_lens")

    @cached_property
    def num_candidates(self) -> Tensor:
        """[B] int64 candidates of each sample."""
        return self._array("num_candidates")

    @cached_property
    def history_lens_host(self) -> Tensor:
        """[B] int64 events of each history, in host memory."""
        return self._host_array("history_lens")

    @cached_property
    def num_candidates_host(self) -> Tensor:
        """[B] int64 candidates of each sample, in host memory."""
        return self._host_array("num_candidates")

    @cached_property
    def action(self) -> Tensor:
        """[H] int32, bit i set if action i was taken."""
        return self._array("action")

    @cached_property
    def action_host(self) -> Tensor:
        """[H] int32, as `action`, in host memory."""
        return self._host_array("action")

    @cached_property
    def timestamp(self) -> Tensor:
        """[H + C] int64 seconds; -1 where unknown."""
        return self._array("timestamp")

    def _lookup(self, name: str) -> tuple[int, int]:
        """(place of a feature's first id, how many there are)."""
        place = self._contents.lookups.index(name)
        return int(self._lookup_counts[:place].sum()), int(self._lookup_counts[place])

    def _array(self, name: str) -> Tensor:
        return unpack(self._memory, self._contents.places[name])

    def _host_array(self, name: str) -> Tensor:
        return unpack(self._host_memory, self._contents.places[name])


class _Bags(dict[tuple[str, ...], KeyedJaggedTensor]):
    """Each made when it is first asked for."""

    def __init__(self, inputs: Inputs) -> None:
        super().__init__()
        self._inputs = inputs

    def __missing__(self, features: tuple[str, ...]) -> KeyedJaggedTensor:
        ids = [self._inputs.ids(name) for name in features]
        lens = torch.cat([self._inputs.lens[name] for name in features])
        if not lens.numel():
            # TorchRec cannot look up no bags at all.
            lens = lens.new_zeros(len(features))
        self[features] = KeyedJaggedTensor(
            list(features), torch.cat(ids), lengths=lens, length_per_key=[len(each) for each in ids]
        )
        return self[features]


class Labels:
    """What became of the candidates, and what followed events."""

    def __init__(self, contents: Contents, memory: Tensor) -> None:
        self._contents, self._memory = contents, memory

    @cached_property
    def action(self) -> Tensor:
        """[C] int32 actions of each candidate, bit i set if action i was taken."""
        return unpack(self._memory, self._contents.places["candidate_action"])

    @cached_property
    def values(self) -> Mapping[str, Tensor]:
        """[C] the selected label columns: float64 numbers, NaN where missing, or int64 ids."""
        names = _names(self._contents, LABEL_PREFIX)
        return {name: unpack(self._memory, self._contents.places[LABEL_PREFIX + name]) for name in names}

    @cached_property
    def loss_denominator(self) -> Tensor:
        """[] float32: labelled candidates of the global batch / number of ranks.

        Averaged over ranks, as DDP and TorchRec do, the ranks' sums over this number give the mean over the global
        batch.
        """
        return unpack(self._memory, self._contents.places["loss_denominator"])[0]

    @cached_property
    def next_item_id(self) -> Tensor:
        """[H] int64 the item of the event behind each or, behind a history's last, of the first candidate; -1 for
        nothing.  Where the selection draws ids to compare it with."""
        return unpack(self._memory, self._contents.places["next_item_id"])

    @cached_property
    def drawn(self) -> Tensor:
        """[drawn] int64 these ids."""
        return unpack(self._memory, self._contents.places["drawn"])

    @cached_property
    def next_denominator(self) -> Tensor:
        """[] float32: the same of events of the global batch that another event or a candidate follows."""
        return unpack(self._memory, self._contents.places["next_denominator"])[0]


class Batch(Pipelineable):
    """Inputs, labels, and what holds for the whole global batch.

    All tensors are views of one piece of memory, on the device that the batch was moved to: a copy of the batch is one
    copy.
    """

    def __init__(self, contents: Contents, host_memory: Tensor, memory: Tensor | None = None) -> None:
        """The batch of these contents in `memory`, which was copied from `host_memory` or, if None, is that."""
        self._contents = contents
        self._host_memory = host_memory
        self._memory = host_memory if memory is None else memory
        self.inputs = Inputs(contents, self._host_memory, self._memory)
        self.labels = Labels(contents, self._memory)
        self.position = contents.position
        self.global_samples = contents.global_samples
        self.global_tokens = contents.global_tokens
        self.imbalance = contents.imbalance

    @property
    def contents(self) -> Contents:
        """What is known of it besides its arrays."""
        return self._contents

    @property
    def host_memory(self) -> Tensor:
        """[bytes] uint8: its arrays as they were read."""
        return self._host_memory

    def pinned(self) -> "Batch":
        """A copy in page-locked memory, from which a device copies asynchronously."""
        return Batch(self._contents, self._host_memory.pin_memory())

    @property
    def features(self) -> KeyedJaggedTensor:
        """The inputs' ids to look up: what a model's tables are called with."""
        return self.inputs.features

    def to(self, device: torch.device, non_blocking: bool = False) -> "Batch":
        """The batch with its memory on `device`."""
        return Batch(self._contents, self._host_memory, self._memory.to(device, non_blocking=non_blocking))

    def copy_(self, other: "Batch") -> None:
        """Write another batch of the same sizes over this one's device memory."""
        self._memory.copy_(other._memory, non_blocking=True)

    def record_stream(self, stream: torch.Stream) -> None:
        """Tell the allocator that `stream` uses the device tensors."""
        self._memory.record_stream(stream)
        # Offsets, which TorchRec computes from the lengths, have memory of their own.
        self.inputs.features.record_stream(stream)
        for features in self.inputs.bags.values():
            features.record_stream(stream)


def _names(contents: Contents, prefix: str) -> list[str]:
    return [name.removeprefix(prefix) for name in contents.places if name.startswith(prefix)]
