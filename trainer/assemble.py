"""From a configuration and a data set's description to tables and the single-process model."""

import functools
import math
from collections.abc import Sequence

import torch

from embeddings.config import TableConfig
from embeddings.plan import BatchLoad
from embeddings.tables import Tables, build_tables
from pipelines.batch import ITEM_FEATURE
from pipelines.features import DatasetInfo
from trainer.config import TrainConfig
from trainer.models.flops import Count, training_flops
from trainer.models.negatives import NEGATIVE_FEATURE
from trainer.models.ranker import Ranker, build_ranker
from trainer.models.retriever import Retriever, build_retriever
from trainer.recorder import TokenCount


def table_configs(config: TrainConfig, info: DatasetInfo) -> list[TableConfig]:
    """One table for the items, shared by history and candidates, and one for each context feature.

    A retriever has the item table alone, in which negatives are looked up too.
    """
    if config.model.retrieval is not None:
        return [
            TableConfig(
                name=ITEM_FEATURE,
                num_embeddings=info.num_items,
                embedding_dim=config.embedding_dim,
                features=(ITEM_FEATURE, NEGATIVE_FEATURE),
            )
        ]
    sizes = {ITEM_FEATURE: info.num_items, **info.context_features}
    return [
        TableConfig(name=feature, num_embeddings=rows, embedding_dim=config.embedding_dim, features=(feature,))
        for feature, rows in sizes.items()
    ]


def tasks_of(config: TrainConfig, info: DatasetInfo) -> tuple[str, ...]:
    """The actions that the model predicts; none for a retriever.

    Raises:
        ValueError: a task is no action of the data set, or the data set is for retrieval.
    """
    if config.model.retrieval is not None:
        return ()
    if info.cut == "by_place":
        raise ValueError(
            f"{info.name} is next-item data, cut by place (--leave-last): its histories may reach the time of their "
            "candidates, which shows a ranker its labels; prepare it without --leave-last, or train retrieval"
        )
    tasks = info.actions if config.model.tasks is None else config.model.tasks
    for task in tasks:
        info.action_bit(task)
    return tasks


def lookup_load(config: TrainConfig, info: DatasetInfo, world_size: int) -> BatchLoad:
    """How many ids a rank looks up a step, from the sizes of the training split."""
    split = info.splits["train"]
    samples = max(1, split.samples)
    history = min(split.history_events / samples, config.data.max_history_len)
    events = max(1.0, history + split.candidates / samples)
    samples_per_rank = math.ceil(config.data.global_batch_size / world_size)
    ids_per_sample = {ITEM_FEATURE: events}
    retrieval = config.model.retrieval
    if retrieval is not None:
        users = samples_per_rank if retrieval.share_negatives else 1 / events
        ids_per_sample[NEGATIVE_FEATURE] = retrieval.num_negatives / users
    return BatchLoad(samples_per_rank=samples_per_rank, ids_per_sample=ids_per_sample)


def check_lengths(config: TrainConfig, info: DatasetInfo) -> None:
    """Refuse a model whose constant `max_len` cannot hold the sequences that the data settings allow.

    Raises:
        ValueError: context, history and candidates may be longer than `model.max_len`.
    """
    tokens_an_event, num_context = _tokens(config, info)
    candidates = most_candidates(config, info)
    longest = num_context + tokens_an_event * config.data.max_history_len + candidates
    if longest > config.model.max_len:
        raise ValueError(
            f"model.max_len={config.model.max_len} is below the {longest} tokens of the longest sequence "
            f"({num_context} context, {tokens_an_event} x {config.data.max_history_len} history, "
            f"{candidates} candidates): raise model.max_len, or lower data.max_history_len or data.max_candidates"
        )


def token_count(config: TrainConfig, info: DatasetInfo) -> TokenCount:
    """How many tokens the model makes of samples, by their history lengths and numbers of candidates."""
    tokens_an_event, num_context = _tokens(config, info)
    return lambda history_lens, num_candidates: tokens_an_event * history_lens + num_candidates + num_context


def _tokens(config: TrainConfig, info: DatasetInfo) -> tuple[int, int]:
    """(tokens of an event of the history, context tokens of a sample)."""
    if config.model.retrieval is not None:
        return 1, 0
    return 2 if config.model.input.merge == "interleave" else 1, len(info.context_features)


def most_candidates(config: TrainConfig, info: DatasetInfo) -> int:
    """Candidates of a sample at most, as far as the data's description says.

    Data that others prepared may not say it: then this is their mean, and the model itself refuses a longer sequence
    when it comes.
    """
    counted = info.details.get("statistics", {}).get("num_candidates", {})
    prepared = max((split["q100"] for split in counted.values() if split), default=None)
    if prepared is None:
        prepared = max(
            [math.ceil(split.candidates / max(1, split.samples)) for split in info.splits.values()], default=1
        )
    return max(1, prepared if config.data.max_candidates is None else min(prepared, config.data.max_candidates))


def build_model(
    config: TrainConfig, info: DatasetInfo, configs: Sequence[TableConfig], device: torch.device
) -> Ranker | Retriever:
    """The model with its tables on the meta device and its dense parameters, seeded, on `device`."""
    torch.manual_seed(config.seed)
    tables: Tables = build_tables(configs, device=torch.device("meta"))
    if config.model.retrieval is not None:
        retriever = build_retriever(config.model, tables=tables, embedding_dim=config.embedding_dim)
        retriever.tower.to(device)
        return retriever
    model = build_ranker(
        config.model,
        tables=tables,
        embedding_dim=config.embedding_dim,
        context_names=tuple(info.context_features),
        action_names=info.actions,
    )
    rates = info.details.get("statistics", {}).get("action_rates")
    if rates is not None:
        model.tower.start_at_rates([rates[task] for task in tasks_of(config, info)])
    model.tower.to(device)
    return model


def training_cost(config: TrainConfig, info: DatasetInfo, attention_cost: float = 1.0) -> functools.partial[Count]:
    """The model's training FLOPs of samples, by their history lengths and numbers of candidates.

    Takes `channel_history_lens` too, without which every channel counts as if it saw all events.
    With `attention_cost`, a FLOP of attention counts that many times: a measure of time rather than of work.
    """
    # Not a closure: it goes to reader processes.
    return functools.partial(
        training_flops,
        config=config.model,
        embedding_dim=config.embedding_dim,
        num_context=len(info.context_features),
        num_actions=len(info.actions),
        attention_cost=attention_cost,
    )
