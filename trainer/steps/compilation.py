"""Compile a training step's kernels side by side before the first step, which would compile one after another.

    first batch -> | forward, loss, backward, launching nothing | -> its kernels, compiled -> the step itself

Applied outside the model, by `compile_before_first_step`; ranks do so at the same step, so that collectives between
them (histories that are shared) meet.
"""

import torch
from torch import nn

from attention_kernels.launcher import compiling_together
from trainer.models.model import Model


def compile_before_first_step(model: Model) -> None:
    """Let the objective's first batch in training go through it once before, for its kernels alone."""

    def compile_kernels(objective: nn.Module, arguments: tuple[object, ...]) -> None:
        parameters = [each for each in objective.parameters() if each.requires_grad]
        if not (objective.training and torch.is_grad_enabled() and parameters):
            return
        hook.remove()
        device = parameters[0].device
        kind = device.type
        # Metrics of training are sums that this pass would add to, of values that no kernel has computed.
        sums = [(buffer, buffer.clone()) for buffer in objective.buffers()]
        dtype, enabled = torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind)
        with (
            # Draws of this pass are none of the step's, and what it casts is forgotten.
            torch.random.fork_rng([device] if kind == "cuda" else []),
            torch.autocast(kind, dtype=dtype, enabled=enabled, cache_enabled=False),
            # Kernels of a backward are launched by this thread, too.
            torch.autograd.set_multithreading_enabled(False),
            compiling_together(),
        ):
            torch.autograd.grad(objective.forward(*arguments), parameters, allow_unused=True)
        for buffer, before in sums:
            buffer.copy_(before)

    hook = model.objective.register_forward_pre_hook(compile_kernels)
