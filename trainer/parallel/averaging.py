"""Gradients averaged over ranks at once, before the update: in the place of DDP where the backward pass is replayed, as
DDP averages from inside it."""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn


class GradientAverage:
    """Averages parameters' gradients by one all-reduce.  A collective: every rank calls it after each backward pass.

    A rank without a gradient adds zeros.  Unlike under DDP, a parameter that no rank has used gets a gradient of zeros.
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
