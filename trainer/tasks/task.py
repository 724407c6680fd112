"""What every task is to the rest of the trainer: its tables, its model, its form of a batch, its costs, its evaluation.

A task is made once, in `trainer.resolve`; nothing else asks which one a run has.
"""

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from torch import Tensor
from torchrec.streamable import Pipelineable

from embeddings.config import TableConfig
from embeddings.rows.trained import TrainedRows
from embeddings.tables import Tables
from pipelines.batches.batch import Batch, Inputs
from pipelines.batches.padding import BatchPadding, Padding
from pipelines.features import DatasetInfo
from pipelines.selection import Selection
from trainer.columns import pooled_spaces
from trainer.config import TrainConfig
from trainer.evaluation.baseline import Baselines
from trainer.evaluation.next_item import Predictions
from trainer.labels.loss import RankingLoss
from trainer.models.activations import MeanBatch, Memory
from trainer.models.flops import FlopCount
from trainer.models.heads.similarity import Similarity
from trainer.models.model import Model
from trainer.models.retrieval_config import RetrievalConfig
from trainer.parallel.mesh import Mesh
from trainer.parallelize import ParallelModel

Flops = Callable[..., FlopCount]
"""The model's FLOPs by sample, from history lengths, numbers of candidates and, by keyword, `channel_history_lens`: the
events that a channel selects, for channels that do not see all.  It goes to reader processes, so it is no closure."""


@dataclass(frozen=True, slots=True)
class Evaluation:
    """What an evaluation found, on every rank; the first rank shows it."""

    metrics: Mapping[str, float]
    """The model's numbers by name; NaN where the data leave one undefined."""
    table: str
    """Model and baseline beside each other, for people; empty on all ranks but the first."""
    baseline: Mapping[str, float] = field(default_factory=dict)
    """The baseline's, by the same names; empty on all ranks but the first, and where it was not asked for."""

    def record(self) -> dict[str, float]:
        """What is written: the model's numbers, and the baseline's with `_baseline` in their names."""
        said = {_of_baseline(name): value for name, value in self.baseline.items() if not name.startswith(_OF_DATA)}
        return {**self.metrics, **said}


_OF_DATA = ("positives/", "auc_95/")
"""Numbers that say the same of the baseline as of the model, or little."""


def _of_baseline(name: str) -> str:
    """What the baseline's number is called: ne_baseline/click, hr@10_baseline."""
    metric, slash, label = name.partition("/")
    return f"{metric}_baseline{slash}{label}"


class LabelOutputs(NamedTuple):
    """What a model says of candidates."""

    labels: RankingLoss
    """What its outputs are of."""
    outputs_CK: Tensor
    """[C, outputs of all labels] of every candidate."""


class NextItems(NamedTuple):
    """What a model says of the items to come."""

    similarity: Similarity
    """Scores items against predictions."""
    predictions: Predictions
    """Predictions of candidates, sample by sample, from all that came before each; a sample without any event before
    has none."""


class Task(Protocol):
    """One thing that a model is trained for."""

    @property
    def selection(self) -> Selection:
        """What its model reads of the data."""

    @property
    def tables(self) -> tuple[TableConfig, ...]:
        """The tables that its model looks up in."""

    @property
    def tokens_an_event(self) -> int:
        """Tokens that the model makes of an event of the history; a candidate is one."""

    @property
    def num_context(self) -> int:
        """Context tokens of a sample."""

    @property
    def events_read(self) -> int:
        """Events that the model reads of the longest history."""

    @property
    def flops(self) -> Flops:
        """What the model computes for samples of given lengths."""

    @property
    def measured(self) -> tuple[str, ...]:
        """Names of the numbers of its evaluations that are always there."""

    def activations(self, batch: MeanBatch) -> Memory:
        """What the model holds in a training step besides parameters and tables."""

    def check_training_data(self) -> None:
        """Raise ValueError if the data's description says that there is nothing to learn from the training split."""

    def ids_per_sample(self, events: float, candidates: float, samples_per_rank: int) -> dict[str, float]:
        """Ids that a sample of so many events and candidates looks up, by feature; features left out look up one.

        `samples_per_rank` share what a step looks up once.
        """

    def build(self, tables: Tables) -> Model:
        """The single-process model over these tables, its dense parameters drawn from the global generator."""

    def prepare(self, batch: Batch, mesh: Mesh) -> Pipelineable:
        """A training batch of the data in the form that the model reads, still in host memory."""

    @property
    def padding(self) -> BatchPadding:
        """How its batches are padded to few sizes."""

    def evaluate(self, model: ParallelModel, mesh: Mesh, unseen: int | None = None) -> Evaluation:
        """Score the evaluation split, beside what knows no sequences.  Called by every rank.

        `unseen` scores the training samples of that part of the data instead, beside what the parts before it tell.
        """

    def rank(self, model: ParallelModel, inputs: Inputs, trained: TrainedRows) -> LabelOutputs:
        """What evaluation predicts of candidates.  Raises ValueError if the model predicts the next item alone."""

    def next_items(self, model: ParallelModel, batch: Batch, mesh: Mesh) -> NextItems:
        """What evaluation predicts of candidates' items.  Raises ValueError if the model ranks alone."""


@dataclass(frozen=True)
class DataTask:
    """What tasks have in common: a model that reads the data's batches as they are and answers nothing yet."""

    config: TrainConfig
    info: DatasetInfo

    @functools.cached_property
    def baselines(self) -> Baselines:
        """What its evaluations are shown beside."""
        return Baselines(self.config.data, self.info)

    @property
    def settings(self) -> RetrievalConfig:
        """What the configuration says of the next item."""
        assert self.config.model.retrieval is not None
        return self.config.model.retrieval

    @property
    def selection(self) -> Selection:
        """What its model reads of the data."""
        raise NotImplementedError

    @property
    def tables(self) -> tuple[TableConfig, ...]:
        """The tables that its model looks up in."""
        raise NotImplementedError

    @property
    def events_read(self) -> int:
        """All that the data settings allow of a history."""
        return self.config.data.max_history_len

    def prepare(self, batch: Batch, mesh: Mesh) -> Pipelineable:
        """The data's batch as it is."""
        return batch

    @property
    def padding(self) -> BatchPadding:
        """Batches are padded by one more sample."""
        rectangular = self.config.model.is_rectangular
        return Padding(self.selection, pooled_spaces(self.tables), rectangular=rectangular)

    def rank(self, model: ParallelModel, inputs: Inputs, trained: TrainedRows) -> LabelOutputs:
        """Refuses: this task's model predicts no labels."""
        raise ValueError("this run's model predicts the next item and no labels: ask it by retrieve")

    def next_items(self, model: ParallelModel, batch: Batch, mesh: Mesh) -> NextItems:
        """Refuses: this task's model predicts no next item."""
        raise ValueError("this run's model ranks candidates that it is given: ask it by score")
