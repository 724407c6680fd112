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

FEW_POSITIVES = 100
"""With fewer, the AUC's 95% interval is about 0.1 wide."""


@torch.no_grad()
def evaluate(model: ParallelModel, batches: Iterable[Batch], tasks: tuple[str, ...], mesh: Mesh) -> dict[str, float]:
    """`metrics.score` of each task over the evaluation split.  Called by every rank, each with its own batches.

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
            users = torch.repeat_interleave(on_device.inputs.user_id, on_device.inputs.num_candidates)
            metrics.update(torch.sigmoid(output.logits.float()), output.labels, users)
    finally:
        model.module.train(was_training)
    # The one collective here: torchmetrics gathers every rank's candidates.
    return metrics.compute()


def comparison_table(model: dict[str, float], baseline: dict[str, float], tasks: tuple[str, ...]) -> str:
    """A table of one row a task: the model's metrics beside the baseline's, and the difference of their AUC.

    The AUC is given with its 95% interval; a task with few positives is marked.
    """
    header = (
        f"{'task':<18}{'positives':>10}{'NE':>9}{'baseline':>10}{'AUC':>9}{'+-':>8}{'baseline':>10}{'difference':>12}"
    )
    rows = [header + f"{'GAUC':>9}{'baseline':>10}"]
    rows.append("-" * len(rows[0]))
    few = []
    for task in tasks:
        (ne, auc, gauc), (base_ne, base_auc, base_gauc) = (
            [metrics[f"{name}/{task}"] for name in ("ne", "auc", "gauc")] for metrics in (model, baseline)
        )
        positives = model[f"positives/{task}"]
        few += [task] * (positives < FEW_POSITIVES)
        rows.append(
            f"{task:<18}{positives:>10,.0f}{_cell(ne, 9)}{_cell(base_ne, 10)}"
            f"{_cell(auc, 9)}{_cell(model[f'auc_95/{task}'], 8)}{_cell(base_auc, 10)}{_cell(auc - base_auc, 12, '+')}"
            f"{_cell(gauc, 9)}{_cell(base_gauc, 10)}"
        )
    if few:
        rows.append(f"fewer than {FEW_POSITIVES} positives, too few to say anything: {', '.join(few)}")
    return "\n".join(rows)


def _cell(value: Any, width: int, sign: str = "") -> str:
    return f"{'-':>{width}}" if math.isnan(value) else f"{value:>{sign}{width}.4f}"
