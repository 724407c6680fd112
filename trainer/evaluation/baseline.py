"""What to beat: scores that know no sequences, which all ranks count on their shares of the training split."""

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from torch import Tensor

from pipelines.baseline import TrainingRates, baseline_scores, class_counts, count_rates, item_counts, join_users
from pipelines.config import DataConfig
from pipelines.features import ITEM_SPACE, Column, DatasetInfo
from trainer.evaluation.metrics import score
from trainer.parallel.mesh import Mesh

ROWS_AT_A_TIME = 2**20
"""Items whose counts are added up over ranks in one piece, so that they need little of a GPU's memory."""


class Baselines:
    """Counts of a run's data, made once: the same at every evaluation.

    `unseen` is a part of the data that is scored before it is trained on, by what the parts before it tell.
    """

    def __init__(self, config: DataConfig, info: DatasetInfo) -> None:
        """`info` describes the data as the run knows it."""
        self._config, self._info = config, info
        self._metrics: dict[int | None, dict[str, float]] = {}
        self._counts: dict[int | None, Tensor] = {}
        self._classes: dict[tuple[str, int | None], Tensor] = {}

    def metrics(self, tasks: tuple[str, ...], mesh: Mesh, unseen: int | None = None) -> dict[str, float]:
        """What the rates of items and users predict, on the first rank; nothing on the others.  Called by every rank,
        with the same tasks every time."""
        if unseen not in self._metrics:
            self._metrics[unseen] = self._score(tasks, mesh, unseen)
        return self._metrics[unseen]

    def _score(self, tasks: tuple[str, ...], mesh: Mesh, unseen: int | None) -> dict[str, float]:
        config, info = self._config, self._info
        mine = count_rates(config, info, tasks, mesh.rank, mesh.world_size, unseen=unseen)
        for values in (mine.items.positive, mine.items.count):
            _add_on_first(values, mesh)
        parts = [mine.users] * mesh.world_size if mesh.is_first else None
        dist.gather_object(mine.users, parts)  # every rank
        if parts is None:
            return {}
        rates = TrainingRates(mine.items, join_users(parts))
        baseline = baseline_scores(config, info, tasks, rates, unseen=unseen)
        logits, labels, users = (torch.from_numpy(x) for x in (baseline.logits, baseline.labels, baseline.user_id))
        return score(logits.double(), labels.double(), users, tasks)

    def popularity(self, mesh: Mesh, unseen: int | None = None) -> Tensor:
        """How often each item stands in the training split, [ids that are given].  Called by every rank."""
        if unseen not in self._counts:
            given = self._info.spaces[ITEM_SPACE].used
            mine = item_counts(self._config, self._info, mesh.rank, mesh.world_size, unseen=unseen)[:given]
            self._counts[unseen] = torch.from_numpy(mine)
        counts = self._counts[unseen].to(mesh.device, copy=True)
        dist.all_reduce(counts)  # every rank
        return counts

    def classes(self, label: Column, mesh: Mesh, *, thinned: bool, unseen: int | None = None) -> Tensor:
        """What the candidates of each id of a label of classes count in the training split, [rows of its space]
        float64; see `class_counts`.  Called by every rank."""
        if (label.name, unseen) not in self._classes:
            counts = class_counts(
                self._config, self._info, label, mesh.rank, mesh.world_size, thinned=thinned, unseen=unseen
            )
            joined = torch.from_numpy(counts).to(mesh.device)
            dist.all_reduce(joined)  # every rank
            self._classes[label.name, unseen] = joined.cpu()
        return self._classes[label.name, unseen]


def _add_on_first(values: npt.NDArray[np.float64], mesh: Mesh) -> None:
    """Add up all ranks' arrays in the first one's, by way of the device that they communicate through, in pieces."""
    for first in range(0, len(values), ROWS_AT_A_TIME):
        piece = torch.from_numpy(values[first : first + ROWS_AT_A_TIME]).to(mesh.device, copy=True)
        dist.reduce(piece, 0)  # every rank
        values[first : first + ROWS_AT_A_TIME] = piece.cpu().numpy()
