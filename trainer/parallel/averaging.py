"""Gradients averaged over ranks by one all-reduce between the backward pass and the update.

Not DistributedDataParallel, which averages buckets of them from inside the backward pass: a backward pass that is
replayed calls nothing back; its buckets get another order after the first step of a process, so that a run that is
resumed would differ in its last bits; and where it keeps their order, it warns every user of what that costs.  The
gradients of rows, which are most of what a step exchanges, are TorchRec's in either case.
"""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn


class GradientAverage:
    """Averages parameters' gradients.  A collective: every rank calls it after each backward pass.

    A rank without a gradient adds zeros; a parameter that no rank has used gets a gradient of zeros.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], world_size: int) -> None:
        self._parameters, self._world_size = parameters, world_size

    @torch.no_grad()
    def __call__(self) -> None:
        """Every parameter's gradient becomes the mean over ranks."""
        for parameter in self._parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        gradients = [parameter.grad for parameter in self._parameters if parameter.grad is not None]
        flat = torch.cat([gradient.reshape(-1) for gradient in gradients])
        dist.all_reduce(flat)
        flat /= self._world_size
        parts: Sequence[Tensor] = torch.split(flat, [gradient.numel() for gradient in gradients])
        views = [part.view(gradient.shape) for part, gradient in zip(parts, gradients, strict=True)]
        torch._foreach_copy_(gradients, views)
