"""From a configuration and a data set's description to tables and the single-process model."""

from collections.abc import Callable, Sequence

import torch

from embeddings.config import TableConfig
from embeddings.tables import build_embedding_collection
from pipelines.batch import ITEM_FEATURE
from pipelines.schema import DatasetInfo
from trainer.config import TrainConfig
from trainer.models.flops import Count, Lengths, model_flops
from trainer.models.ranker import Ranker, build_ranker


def table_configs(config: TrainConfig, info: DatasetInfo) -> list[TableConfig]:
    """One table for the items, shared by history and candidates, and one for each context feature."""
    sizes = {ITEM_FEATURE: info.num_items, **info.context_features}
    return [
        TableConfig(name=feature, num_embeddings=rows, embedding_dim=config.embedding_dim, features=(feature,))
        for feature, rows in sizes.items()
    ]


def tasks_of(config: TrainConfig, info: DatasetInfo) -> tuple[str, ...]:
    """The actions that the model predicts.

    Raises:
        ValueError: a task is no action of the data set.
    """
    tasks = info.actions if config.model.tasks is None else config.model.tasks
    for task in tasks:
        info.action_bit(task)
    return tasks


def build_model(config: TrainConfig, info: DatasetInfo, tables: Sequence[TableConfig], device: torch.device) -> Ranker:
    """The model with its tables on the meta device and its dense parameters, seeded, on `device`."""
    torch.manual_seed(config.seed)
    model = build_ranker(
        config.model,
        embeddings=build_embedding_collection(tables, device=torch.device("meta")),
        embedding_dim=config.embedding_dim,
        context_names=tuple(info.context_features),
        action_names=info.actions,
    )
    model.tower.to(device)
    return model


def training_flops(config: TrainConfig, info: DatasetInfo) -> Callable[[Lengths, Lengths], Count]:
    """The model's training FLOPs of samples, as a function of their history lengths and numbers of candidates."""

    def count(history_lens: Lengths, num_candidates: Lengths) -> Count:
        return model_flops(
            config.model,
            history_lens,
            num_candidates,
            embedding_dim=config.embedding_dim,
            num_context=len(info.context_features),
            num_actions=len(info.actions),
        ).training

    return count
