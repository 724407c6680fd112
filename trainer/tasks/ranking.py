"""Rank candidates: predict labels of each of a sample's candidates."""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from embeddings.config import TableConfig
from embeddings.rows.trained import TrainedRows
from embeddings.tables import Tables
from pipelines.batches.batch import Inputs
from pipelines.reading.loader import build_loader
from pipelines.selection import Selection
from trainer.columns import pooled_spaces, ranker_columns, table_configs, widths
from trainer.evaluation.candidates import measure_candidates, ranking_table, unknown_lines, with_unknown
from trainer.labels.binary import action_rates
from trainer.labels.classes import Classes
from trainer.labels.loss import RankingLoss, build_ranking_loss
from trainer.models.activations import MeanBatch, Memory, ranker_activations
from trainer.models.encoding import num_context
from trainer.models.flops import InputWidths, input_widths, ranker_flops
from trainer.models.model import Model
from trainer.models.ranker import build_ranker_tower
from trainer.parallel.mesh import Mesh
from trainer.parallelize import ParallelModel
from trainer.tasks.task import DataTask, Evaluation, Flops, LabelOutputs

WEIGHTED = ("ne/", "calibration/")
"""Metrics of actions in which candidates count as much as their weights say."""


@dataclass(frozen=True)
class Ranking(DataTask):
    """The task of a configuration without `model.retrieval`, and a part of the joint one."""

    def __post_init__(self) -> None:
        if self.info.cut == "by_place":
            raise ValueError(
                f"{self.info.name} is next-item data, cut by place (--leave-last): its histories may reach the time of "
                "their candidates, which shows a ranker its labels; prepare it without --leave-last, or train retrieval"
            )

    @functools.cached_property
    def labels(self) -> RankingLoss:
        """What the model predicts."""
        return build_ranking_loss(self.config.model.labels, self.info)

    @property
    def actions(self) -> tuple[str, ...]:
        """Which of the labels are actions."""
        return tuple(name for name in self.labels.names if name in self.info.actions)

    @functools.cached_property
    def selection(self) -> Selection:
        """The columns that `model.input` names."""
        return ranker_columns(self.config, self.info)

    @functools.cached_property
    def tables(self) -> tuple[TableConfig, ...]:
        """One table for each space of the columns' ids."""
        return table_configs(self.config, self.info, self.selection)

    @property
    def tokens_an_event(self) -> int:
        """Item and action, apart or added up."""
        return 2 if self.config.model.input.merge == "interleave" else 1

    @property
    def num_context(self) -> int:
        """One a column of samples, where they stand in front of the history."""
        return num_context(self.selection, self.config.model.input)

    @property
    def flops(self) -> Flops:
        """Encoder, towers and head."""
        return functools.partial(ranker_flops, self.config.model, **self.flop_arguments)

    @property
    def flop_arguments(self) -> dict[str, Any]:
        """What its FLOPs depend on besides the configuration of the model and lengths."""
        return {"inputs": self._inputs, "num_context": self.num_context, "num_outputs": self.labels.num_outputs}

    @property
    def _inputs(self) -> InputWidths:
        return input_widths(
            self.selection, widths=widths(self.tables), config=self.config.model, num_actions=len(self.info.actions)
        )

    def activations(self, batch: MeanBatch) -> Memory:
        """What encoder and towers hold."""
        return ranker_activations(self.config.model, batch, inputs=self._inputs)

    @property
    def measured(self) -> tuple[str, ...]:
        """Each metric of each label."""
        return tuple(f"{metric}/{kind.name}" for kind in self.labels.kinds for metric in kind.metrics)

    def check_training_data(self) -> None:
        """There are candidates, and of each action some where it was taken and some where it was not."""
        path, candidates = self.config.data.path, self.info.splits["train"].candidates
        ways = "add impressions (rows where it was not taken), or train retrieval, which needs no labels"
        if not candidates:
            raise ValueError(f"the training split of {path} holds no candidates, so no labels: {ways}")
        rates = action_rates(self.info)
        for action in self.actions:
            if rates.get(action) in (0, 1):
                how_often = "always" if rates[action] else "never"
                raise ValueError(
                    f"{action!r} is {how_often} taken in the training split of {path}, so there is nothing to learn: "
                    f"{ways}; or leave it out of model.labels"
                )

    def ids_per_sample(self, events: float, candidates: float, samples_per_rank: int) -> dict[str, float]:
        """An id of each row of a column's parts; many ids count as one, since the data does not say how many."""
        rows = {"sample": 1.0, "event": events, "candidate": candidates}
        return {
            feature.name: max(1.0, sum(rows[part] for part in feature.parts))
            for feature in self.selection.features
            if feature.space is not None
        }

    def build(self, tables: Tables) -> Model:
        """The ranker; untrained, it predicts what the data's description says of the labels."""
        loss = build_ranking_loss(self.config.model.labels, self.info)
        names, rates = self.info.actions, action_rates(self.info)
        tower = build_ranker_tower(
            self.config.model,
            selection=self.selection,
            widths=widths(self.tables),
            action_names=names,
            output_bits=loss.output_bits,
            action_rates=[rates[name] for name in names] if set(names) <= set(rates) else None,
            pooled=pooled_spaces(self.tables),
        )
        tower.start_at(loss.start())
        return Model(tables, tower, loss)

    def rank(self, model: ParallelModel, inputs: Inputs, trained: TrainedRows) -> LabelOutputs:
        """Ids without a trained row read the unknown id's."""
        labels = model.model.loss
        assert isinstance(labels, RankingLoss)
        return LabelOutputs(labels, model.score(inputs, trained))

    def evaluate(self, model: ParallelModel, mesh: Mesh, unseen: int | None = None) -> Evaluation:
        """The metrics of each label: of actions beside the rates of items and users, of others beside what is known
        without a look at the candidate.  Called by every rank."""
        labels, trained = model.model.loss, model.trained_rows(mesh.device)
        assert isinstance(labels, RankingLoss)

        def outputs(inputs: Inputs) -> Tensor:
            return self.rank(model, inputs, trained).outputs_CK

        return self.measure(
            model, mesh, unseen, labels=labels, outputs=outputs, selection=self.selection, trained=trained
        )

    def measure(
        self,
        model: ParallelModel,
        mesh: Mesh,
        unseen: int | None,
        *,
        labels: RankingLoss,
        outputs: Callable[[Inputs], Tensor],
        selection: Selection,
        trained: TrainedRows | None = None,
    ) -> Evaluation:
        """As `evaluate`, of any model that gives the `outputs` of these `labels` at the candidates of what `selection`
        reads."""
        data, on_gpu = self.config.data, mesh.device.type == "cuda"
        batches = build_loader(
            data,
            split="eval",
            rank=mesh.rank,
            world_size=mesh.world_size,
            selection=selection,
            pin_memory=on_gpu,
            unseen=unseen,
            info=self.info,
        )
        constant = self._constant(mesh, unseen)
        found = measure_candidates(
            model, batches, mesh, labels=labels, outputs=outputs, trained=trained, constant=constant
        )
        counts = self.actions and self.config.evaluation.baseline
        rates = self.baselines.metrics(self.actions, mesh, unseen) if counts else {}
        if self.info.weight is not None or self.info.keep_rate is not None:
            # Rates count every candidate alike, these metrics as much as its weight says: not to be compared.
            rates = {name: math.nan if name.startswith(WEIGHTED) else value for name, value in rates.items()}
        baseline = {**found.constant, **rates}
        table = ""
        if mesh.is_first:
            table = ranking_table(found.metrics, baseline, self.labels.kinds)
            table += unknown_lines(found, self.labels.kinds)
        return Evaluation(with_unknown(found), table, baseline if mesh.is_first else {})

    def _constant(self, mesh: Mesh, unseen: int | None) -> dict[str, Tensor]:
        """By label other than actions, outputs of what is known without a look at the candidate; of classes their rates
        in the training split, where baselines are counted.  Called by every rank."""
        found, columns = {}, {column.name: column for column in self.info.of("label")}
        for kind, keep_rate in zip(self.labels.kinds, self.labels.keep_rates, strict=True):
            if isinstance(kind, Classes) and self.config.evaluation.baseline:
                thinned = keep_rate == "weight"
                found[kind.name] = kind.start_at(
                    self.baselines.classes(columns[kind.name], mesh, thinned=thinned, unseen=unseen)
                )
            elif not isinstance(kind, Classes) and kind.name not in self.actions:
                found[kind.name] = kind.start()
        return found
