"""One rank's share of a global batch, as models and TorchRec use it.  Knows tensors and devices, not files.

B samples, C candidates in all, T = history events and candidates in all, packed sample by sample: each sample's
history, oldest first, then its candidates.
"""

from functools import cached_property

import torch
from torch import Tensor
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor
from torchrec.streamable import Pipelineable

from pipelines.packed import SIDE_PREFIX, Contents, unpack

ITEM_FEATURE = "item_id"


class Batch(Pipelineable):
    """Jagged features and labels of B >= 0 samples, and what holds for the whole global batch.

    The tensors are views of one piece of memory, on the device that the batch was moved to: a copy of the batch is one
    copy.  Names that end in `_host` are views of the memory it was read into: known without waiting for the device.
    """

    def __init__(self, contents: Contents, host_memory: Tensor, memory: Tensor | None = None) -> None:
        """The batch of these contents in `memory`, which was copied from `host_memory` or, if None, is that."""
        self._contents = contents
        self._host_memory = host_memory
        self._memory = host_memory if memory is None else memory
        self.position = contents.position
        self.global_samples = contents.global_samples
        self.global_tokens = contents.global_tokens
        self.imbalance = contents.imbalance

    @cached_property
    def features(self) -> KeyedJaggedTensor:
        """Keys: the context features, one id a sample, then `item_id`, a sample's history and candidates.

        Their bags are not samples (`packed.bag_lens`).
        """
        keys = [*self._contents.context_names, ITEM_FEATURE]
        return KeyedJaggedTensor(keys, self._array("ids"), lengths=self._array("bag_lens"))

    @cached_property
    def user_id(self) -> Tensor:
        """[B] int64."""
        return self._array("user_id")

    @cached_property
    def history_lens(self) -> Tensor:
        """[B] int64."""
        return self._array("history_lens")

    @cached_property
    def num_candidates(self) -> Tensor:
        """[B] int64."""
        return self._array("num_candidates")

    @cached_property
    def history_lens_host(self) -> Tensor:
        """[B] int64."""
        return self._host_array("history_lens")

    @cached_property
    def num_candidates_host(self) -> Tensor:
        """[B] int64."""
        return self._host_array("num_candidates")

    @cached_property
    def action(self) -> Tensor:
        """[T] int32, bit i set if action i was taken; 0 at candidates."""
        return self._array("action")

    @cached_property
    def action_host(self) -> Tensor:
        """[T] int32."""
        return self._host_array("action")

    @cached_property
    def timestamp(self) -> Tensor:
        """[T] int64 seconds; -1 where unknown."""
        return self._array("timestamp")

    @cached_property
    def side(self) -> dict[str, Tensor]:
        """[T] further history lists by name; 0 at candidates."""
        return {name.removeprefix(SIDE_PREFIX): self._array(name) for name in self._side_names()}

    @cached_property
    def side_host(self) -> dict[str, Tensor]:
        """[T] further history lists by name."""
        return {name.removeprefix(SIDE_PREFIX): self._host_array(name) for name in self._side_names()}

    @cached_property
    def candidate_action(self) -> Tensor:
        """[C] int32 bit masks: the labels."""
        return self._array("candidate_action")

    @cached_property
    def loss_denominator(self) -> Tensor:
        """[] float32: labelled candidates of the global batch / number of ranks.

        Averaged over ranks, as DDP and TorchRec do, the ranks' sums over this number give the mean over the global
        batch.
        """
        return self._array("loss_denominator")[0]

    def to(self, device: torch.device, non_blocking: bool = False) -> "Batch":
        """The batch with its memory on `device`."""
        return Batch(self._contents, self._host_memory, self._memory.to(device, non_blocking=non_blocking))

    def record_stream(self, stream: torch.Stream) -> None:
        """Tell the allocator that `stream` uses the device tensors."""
        self._memory.record_stream(stream)
        # Offsets, which TorchRec computes from the lengths, have memory of their own.
        self.features.record_stream(stream)

    def _array(self, name: str) -> Tensor:
        return unpack(self._memory, self._contents.places[name])

    def _host_array(self, name: str) -> Tensor:
        return unpack(self._host_memory, self._contents.places[name])

    def _side_names(self) -> list[str]:
        return [name for name in self._contents.places if name.startswith(SIDE_PREFIX)]
