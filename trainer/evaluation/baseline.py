"""What to beat: scores that know no sequences, which all ranks count on their shares of the training split."""

import functools

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from torch import Tensor

from pipelines.baseline import TrainingRates, baseline_scores, count_rates, item_counts, join_users
from pipelines.config import DataConfig
from pipelines.features import ITEM_SPACE
from pipelines.reading.loader import dataset_info
from trainer.evaluation.metrics import score
from trainer.parallel.mesh import Mesh

ROWS_AT_A_TIME = 2**20
"""Items whose counts are added up over ranks in one piece, so that they need little of a GPU's memory."""


@functools.cache
def baseline_metrics(
    config: DataConfig, tasks: tuple[str, ...], mesh: Mesh, unseen: int | None = None
) -> dict[str, float]:
    """What the rates of items and users in the training split predict, on the first rank; nothing on the others.

    Every rank reads its share of the split, once: the result is the same at every evaluation of a run.
    """
    mine = count_rates(config, tasks, mesh.rank, mesh.world_size, unseen=unseen)
    for values in (mine.items.positive, mine.items.count):
        _add_on_first(values, mesh)
    parts = [mine.users] * mesh.world_size if mesh.is_first else None
    dist.gather_object(mine.users, parts)  # every rank
    if parts is None:
        return {}
    baseline = baseline_scores(config, tasks, TrainingRates(mine.items, join_users(parts)), unseen=unseen)
    logits, labels, users = (torch.from_numpy(x) for x in (baseline.logits, baseline.labels, baseline.user_id))
    return score(logits.double(), labels.double(), users, tasks)


def popularity(config: DataConfig, mesh: Mesh, unseen: int | None = None) -> Tensor:
    """How often each item stands in the training split, or in the parts before an unseen one, [ids that are given].

    Every rank reads its share of the split, once.
    """
    counts = _item_counts(config, mesh.rank, mesh.world_size, unseen).to(mesh.device, copy=True)
    dist.all_reduce(counts)  # every rank
    return counts


@functools.cache
def _item_counts(config: DataConfig, rank: int, world_size: int, unseen: int | None) -> Tensor:
    """Kept, because it is the same at every evaluation of a run."""
    given = dataset_info(config).spaces[ITEM_SPACE].used
    return torch.from_numpy(item_counts(config, rank, world_size, unseen=unseen)[:given])


def _add_on_first(values: npt.NDArray[np.float64], mesh: Mesh) -> None:
    """Add up all ranks' arrays in the first one's, by way of the device that they communicate through, in pieces."""
    for first in range(0, len(values), ROWS_AT_A_TIME):
        piece = torch.from_numpy(values[first : first + ROWS_AT_A_TIME]).to(mesh.device, copy=True)
        dist.reduce(piece, 0)  # every rank
        values[first : first + ROWS_AT_A_TIME] = piece.cpu().numpy()
