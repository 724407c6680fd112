"""One rank's share of a global batch.  Knows tensors and devices, not files.

B samples, C candidates in all, T = history events and candidates in all, packed sample by sample: each sample's
history, oldest first, then its candidates.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor
from torchrec.streamable import Pipelineable

from pipelines.position import DataPosition

ITEM_FEATURE = "item_id"


@dataclass
class Batch(Pipelineable):
    """Jagged features and labels of B >= 0 samples, and what holds for the whole global batch."""

    features: KeyedJaggedTensor
    """Keys: the context features, one id a sample, then `item_id`, a sample's history and candidates."""
    user_id: Tensor
    """[B] int64."""
    history_lens: Tensor
    """[B] int64, on the batch's device."""
    num_candidates: Tensor
    """[B] int64, on the batch's device."""
    history_lens_host: Tensor
    """[B] int64, always in host memory: shapes are known without waiting for the device."""
    num_candidates_host: Tensor
    """[B] int64, always in host memory."""
    action: Tensor
    """[T] int32, bit i set if action i was taken; 0 at candidates."""
    timestamp: Tensor
    """[T] int64 seconds; -1 where unknown."""
    side: dict[str, Tensor]
    """[T] further history lists by name; 0 at candidates."""
    candidate_action: Tensor
    """[C] int32 bit masks: the labels."""
    loss_denominator: Tensor
    """[] float32: labelled candidates of the global batch / number of ranks.  Averaged over ranks, as DDP and TorchRec
    do, the ranks' sums over this number give the mean over the global batch."""
    action_host: Tensor
    """`action`, always in host memory."""
    side_host: dict[str, Tensor]
    """`side`, always in host memory."""
    position: DataPosition
    """The training stream's state after this batch."""
    global_samples: int
    """Samples of the global batch."""
    global_tokens: int
    """History events and candidates of the global batch."""
    imbalance: float
    """Largest over mean modelled cost of the ranks' shares of this global batch; the same number on every rank."""

    def to(self, device: torch.device, non_blocking: bool = False) -> "Batch":
        """The batch with all but the host tensors on `device`."""
        moved = {name: tensor.to(device, non_blocking=non_blocking) for name, tensor in self._device_tensors().items()}
        side = {name: tensor.to(device, non_blocking=non_blocking) for name, tensor in self.side.items()}
        return replace(self, features=self.features.to(device, non_blocking=non_blocking), side=side, **moved)

    def record_stream(self, stream: torch.Stream) -> None:
        """Tell the allocator that `stream` uses the device tensors."""
        self.features.record_stream(stream)
        for tensor in (*self._device_tensors().values(), *self.side.values()):
            tensor.record_stream(stream)

    def pin_memory(self) -> "Batch":
        """A copy in page-locked memory, from which a device copies asynchronously."""
        pinned = {name: tensor.pin_memory() for name, tensor in self._device_tensors().items()}
        side = {name: tensor.pin_memory() for name, tensor in self.side.items()}
        return replace(self, features=self.features.pin_memory(), side=side, **pinned)

    def _device_tensors(self) -> dict[str, Any]:
        """The plain tensors that follow the batch from device to device."""
        names = ("user_id", "history_lens", "num_candidates", "action", "timestamp", "candidate_action")
        return {name: getattr(self, name) for name in (*names, "loss_denominator")}
