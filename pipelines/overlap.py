"""How the work on one batch overlaps with the work on the next ones.  Knows steps and streams, not models.

sparse_dist   copy of batch i+2 | input dist of batch i+1 | lookup, forward, backward and update of batch i
prefetch      as sparse_dist, and rows of batch i+1 move from host memory into the device's cache meanwhile
plain         one after another; the definition that the others are tested against
"""

import logging
from collections.abc import Callable, Iterator
from typing import Any, Literal, Protocol

import torch
from torch import Tensor
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.train_pipeline import PrefetchTrainPipelineSparseDist, TrainPipelineSparseDist
from torchrec.distributed.types import ShardedModule
from torchrec.streamable import Pipelineable

logger = logging.getLogger(__name__)

Overlap = Literal["sparse_dist", "prefetch", "plain"]
Forward = Callable[[Any], tuple[Tensor, Tensor]]
"""From a batch on the device to (loss to differentiate, what the step returns)."""


class StepOptimizer(Protocol):
    """What a pipeline needs of an optimizer."""

    def zero_grad(self) -> None:
        """Called before the forward pass."""

    def step(self) -> None:
        """Called after the backward pass."""


def check_overlap(overlap: Overlap, device: torch.device) -> None:
    """Raises ValueError where the device cannot do it."""
    if overlap == "prefetch" and device.type != "cuda":
        # TorchRec skips the prefetch without streams and then misses its result in forward.
        raise ValueError(f"overlap=prefetch needs a GPU, this run computes on {device.type}; use sparse_dist")


class StepPipeline:
    """Takes training steps, pulling batches ahead where the overlap asks for it."""

    def __init__(
        self,
        overlap: Overlap,
        model: DistributedModelParallel,
        optimizer: StepOptimizer,
        device: torch.device,
        forward: Forward,
    ) -> None:
        self._optimizer, self._device, self._forward = optimizer, device, forward
        self._torchrec: TrainPipelineSparseDist | None = None
        check_overlap(overlap, device)
        sharded = any(isinstance(module, ShardedModule) for module in model.modules())
        if overlap != "plain" and not sharded:
            # TorchRec's pipeline traces up to sharded tables; without one it would trace through the whole model.
            logger.info("no table is sharded: no input dist to overlap with compute, overlap=%s is as plain", overlap)
        elif overlap != "plain":
            kinds = {"sparse_dist": TrainPipelineSparseDist, "prefetch": PrefetchTrainPipelineSparseDist}
            self._torchrec = kinds[overlap](model, optimizer, device, custom_model_fwd=forward)

    def step(self, batches: Iterator[Pipelineable]) -> Tensor:
        """One training step on the next batch; returns what `forward` returned second.

        Raises:
            StopIteration: every batch has been trained on.
        """
        if self._torchrec is not None:
            output: Tensor = self._torchrec.progress(batches)
            return output
        batch = next(batches).to(self._device, non_blocking=True)
        self._optimizer.zero_grad()
        loss, output = self._forward(batch)
        loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
        self._optimizer.step()
        return output

    def close(self) -> None:
        """Give the model its own forward back; batches in flight are dropped."""
        if self._torchrec is not None:
            self._torchrec.detach()

    def outside(self, action: Callable[[], object]) -> None:
        """Run `action` between two steps with the model's own forward, as an evaluation needs.

        Batches that are in flight stay so: their input dist is neither lost nor done twice.
        """
        if self._torchrec is None:
            action()
            return
        self._torchrec.detach()
        action()
        # The batches in flight have been through input dist; attaching must not start it again.
        self._torchrec.attach(sparse_dist=False)
