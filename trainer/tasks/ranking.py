"""Rank candidates: one logit for each of a sample's candidates and each action that the model predicts."""

import functools
from dataclasses import dataclass

from embeddings.config import TableConfig
from embeddings.tables import Tables
from pipelines.batch import Batch
from pipelines.features import DatasetInfo
from pipelines.loader import build_loader
from pipelines.selection import Selection
from trainer.baseline import baseline_metrics
from trainer.columns import ranker_columns, table_configs, widths
from trainer.config import TrainConfig
from trainer.evaluate import comparison_table, evaluate
from trainer.mesh import Mesh
from trainer.models.flops import input_widths, ranker_flops
from trainer.models.model import Model
from trainer.models.ranker import build_ranker_tower
from trainer.parallelize import ParallelModel
from trainer.tasks.task import Evaluation, Flops


@dataclass(frozen=True)
class Ranking:
    """The task of a configuration without `model.retrieval`."""

    config: TrainConfig
    info: DatasetInfo

    def __post_init__(self) -> None:
        if self.info.cut == "by_place":
            raise ValueError(
                f"{self.info.name} is next-item data, cut by place (--leave-last): its histories may reach the time of "
                "their candidates, which shows a ranker its labels; prepare it without --leave-last, or train retrieval"
            )
        for action in self.actions:
            self.info.action_bit(action)

    @property
    def actions(self) -> tuple[str, ...]:
        """The actions that the model predicts.  Making the task raises ValueError if the data set lacks one."""
        return self.info.actions if self.config.model.tasks is None else self.config.model.tasks

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
        """One a column of samples."""
        return len(self.selection.of("sample"))

    @property
    def flops(self) -> Flops:
        """Encoder, towers and head."""
        return functools.partial(
            ranker_flops,
            self.config.model,
            inputs=input_widths(
                self.selection,
                widths=widths(self.tables),
                config=self.config.model,
                num_actions=len(self.info.actions),
            ),
            num_context=self.num_context,
            num_tasks=len(self.actions),
        )

    def check_training_data(self) -> None:
        """There are candidates, and of each action some where it was taken and some where it was not."""
        path, candidates = self.config.data.path, self.info.splits["train"].candidates
        ways = "add impressions (rows where it was not taken), or train retrieval, which needs no labels"
        if not candidates:
            raise ValueError(f"the training split of {path} holds no candidates, so no labels: {ways}")
        counted = self._positives
        for action in self.actions:
            if counted.get(action) in (0, candidates):
                how_often = "always" if counted[action] else "never"
                raise ValueError(
                    f"{action!r} is {how_often} taken in the training split of {path}, so there is nothing to learn: "
                    f"{ways}; or leave it out of model.tasks"
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
        """The ranker; untrained, it predicts the rates of the training split, where the data's description has them."""
        tower = build_ranker_tower(
            self.config.model,
            selection=self.selection,
            widths=widths(self.tables),
            action_names=self.info.actions,
            action_rates=self._action_rates,
        )
        if self._action_rates is not None:
            rates = dict(zip(self.info.actions, self._action_rates, strict=True))
            tower.start_at_rates([rates[action] for action in self.actions])
        return Model(tables, tower)

    @property
    def _positives(self) -> dict[str, int]:
        """In how many training candidates each action was taken, where the data's description says it."""
        splits = self.info.details.get("statistics", {}).get("splits", {})
        positives: dict[str, int] = splits.get("train", {}).get("positives", {})
        return positives

    @property
    def _action_rates(self) -> list[float] | None:
        """The rate of every action of the data in the training split; None where the data's description lacks it."""
        candidates = self.info.splits["train"].candidates
        if not candidates or not set(self.info.actions) <= set(self._positives):
            return None
        return [self._positives[action] / candidates for action in self.info.actions]

    def prepare(self, batch: Batch, mesh: Mesh) -> Batch:
        """The data's batch as it is."""
        return batch

    def evaluate(self, model: ParallelModel, mesh: Mesh, unseen: int | None = None) -> Evaluation:
        """NE, AUC and GAUC of each action, beside the rates of items and users.  Called by every rank."""
        data, on_gpu = self.config.data, mesh.device.type == "cuda"
        batches = build_loader(
            data,
            split="eval",
            rank=mesh.rank,
            world_size=mesh.world_size,
            selection=self.selection,
            pin_memory=on_gpu,
            unseen=unseen,
        )
        metrics = evaluate(model, batches, self.actions, mesh)
        baseline = baseline_metrics(data, self.actions, mesh, unseen)
        table = comparison_table(metrics, baseline, self.actions) if mesh.is_first else ""
        return Evaluation(metrics, table)
