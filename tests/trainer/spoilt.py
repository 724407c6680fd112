"""The trainer's command line with batches that spoil the model: SPOILT="5 loss,9 gradients", on the last rank."""

import os
import sys
from typing import Any

import torch
from torch import Tensor

from trainer.command_line import run_command
from trainer.commands import app
from trainer.parallelize import ParallelModel

KINDS = {int(step): kind for step, _, kind in (word.partition(" ") for word in os.environ["SPOILT"].split(",")) if kind}
plain_loss = ParallelModel.loss


def spoilt_loss(model: ParallelModel, batch: Any) -> tuple[Tensor, Tensor]:
    """As `ParallelModel.loss`; a loss of NaN, or a sound one whose gradients are not finite."""
    loss, shown = plain_loss(model, batch)
    kind = KINDS.get(batch.position.batches)
    if kind is None or int(os.environ.get("RANK", "0")) != int(os.environ.get("WORLD_SIZE", "1")) - 1:
        return loss, shown
    spoilt = loss * (torch.nan if kind == "loss" else torch.inf)
    return spoilt, spoilt.detach() if kind == "loss" else shown


if __name__ == "__main__":
    ParallelModel.loss = spoilt_loss  # type: ignore[method-assign]
    sys.exit(run_command(app, sys.argv[1:]))
