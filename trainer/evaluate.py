"""Score the evaluation split on all ranks, and show the result beside a baseline that knows no sequences."""

import logging
import math
from collections.abc import Iterable
from typing import Any

import torch
from tqdm import tqdm

from pipelines.batch import Batch
from trainer.mesh import Mesh
from trainer.metrics import RankingMetrics
from trainer.parallelize import ParallelModel

logger = logging.getLogger(__name__)


@torch.no_grad()
def evaluate(model: ParallelModel, batches: Iterable[Batch], tasks: tuple[str, ...], mesh: Mesh) -> dict[str, float]:
    """NE, AUC and GAUC of each task over the evaluation split.  Called by every rank, each with its own batches.

    Every rank must get the same number of batches, for each lookup is a collective; a batch may be empty.
    The training pipeline may hold batches in flight meanwhile: nothing of theirs is touched.
    """
    metrics = RankingMetrics(tasks, mesh.device)
    was_training = model.module.training
    model.module.eval()
    try:
        for batch in tqdm(batches, desc="evaluating", unit="batch", leave=False, disable=not mesh.is_first):
            on_device = batch.to(mesh.device, non_blocking=True)
            _, output = model.forward(on_device)
            users = torch.repeat_interleave(on_device.user_id, on_device.num_candidates)
            metrics.update(torch.sigmoid(output.logits.float()), output.labels, users)
    finally:
        model.module.train(was_training)
    # The one collective here: torchmetrics gathers every rank's candidates.
    return metrics.compute()


def comparison_table(model: dict[str, float], baseline: dict[str, float], tasks: tuple[str, ...]) -> str:
    """A table of one row a task: the model's metrics, the baseline's AUC, and their difference."""
    header = f"{'task':<18}{'NE':>9}{'AUC':>9}{'GAUC':>9}{'baseline AUC':>15}{'difference':>12}"
    rows = [header, "-" * len(header)]
    for task in tasks:
        ne, auc, gauc = (model[f"{name}/{task}"] for name in ("ne", "auc", "gauc"))
        base = baseline[f"auc/{task}"]
        rows.append(
            f"{task:<18}{_cell(ne, 9)}{_cell(auc, 9)}{_cell(gauc, 9)}{_cell(base, 15)}{_cell(auc - base, 12, '+')}"
        )
    return "\n".join(rows)


def _cell(value: Any, width: int, sign: str = "") -> str:
    return f"{'-':>{width}}" if math.isnan(value) else f"{value:>{sign}{width}.4f}"
