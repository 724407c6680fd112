"""Everything that follows from a configuration and its data, computed once: task, tables, lengths, costs."""

import functools
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from embeddings.config import TableConfig
from embeddings.planning.problem import BatchLoad
from pipelines.features import Column, DatasetInfo
from pipelines.selection import Feature
from pipelines.storage.columns import IntArray
from pipelines.storage.vocabulary import check_same_ids, grown_spaces, vocabularies
from trainer.config import TrainConfig
from trainer.models.activations import MeanBatch
from trainer.models.flops import Count, training_flops
from trainer.models.transducers import EventChoice, event_choices
from trainer.run.run_dir import NUMBERS
from trainer.tasks.joint import Joint
from trainer.tasks.ranking import Ranking
from trainer.tasks.retrieval import Retrieval
from trainer.tasks.task import Task

PIPELINED_BATCHES = 3
"""On a device at once: one whose step is taken, one whose ids are exchanged, one that is copied there."""
EVENT_BYTES = 12
"""Bytes of an event besides its ids: its time and its actions."""
INPUTS = "model.input"
"""The key of the names of a model's columns among the digests of vocabularies; no space has a dot in its name."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Resolved:
    """A run as its parts need it."""

    config: TrainConfig
    """What the user stated."""
    info: DatasetInfo
    """What the data hold."""
    task: Task
    """What the model is trained for."""
    tables: tuple[TableConfig, ...]
    """The tables that the task's model looks up in."""
    num_context: int
    """Context tokens of a sample."""
    tokens_an_event: int
    """Tokens of an event of the history; a candidate is one."""
    most_candidates: int
    """Candidates of a sample at most, as far as the data's description says."""
    selective_channels: dict[str, EventChoice]
    """What a channel sees, for channels that do not see all events."""
    training_flops: functools.partial[Count]
    """FLOPs of a training step by sample, from history lengths and numbers of candidates and, by keyword,
    `channel_history_lens`, without which every channel counts as if it saw all events."""
    balanced_cost: functools.partial[Count]
    """How much time a sample takes, by which batches are balanced: `training_flops` with `data.attention_cost`."""

    def meanings(self) -> dict[str, str]:
        """What the model takes for granted of the data: digests of the ids' keys, actions and columns, which it knows
        by their places, and what is known of its numbers."""
        selection = self.task.selection
        inputs = [self._described("+".join(each.parts), each.column, each) for each in selection.features]
        labels = [self._described("label", each.name, each) for each in selection.labels]
        return {**vocabularies(self.info), INPUTS: "; ".join(inputs + labels), NUMBERS: json.dumps(self.info.numbers)}

    def _described(self, part: str, name: str, column: Feature | Column) -> str:
        """A column as `event+candidate.tags (ids of tag)`, with the rows of a space to which nothing can be added."""
        if column.space is None:
            return f"{part}.{name} ({column.kind})"
        space = self.info.spaces[column.space]
        # Of a label each row has an output; without a digest nobody can tell whether rows were added.
        fixed = part == "label" or (space.digest is None and not space.unbounded)
        rows = f", {space.rows} rows" if fixed else ", unbounded" if space.unbounded else ""
        rows += f" {space.key_kind}" if space.key_kind else ""
        return f"{part}.{name} ({column.kind} of {space.name}{rows})"

    def token_count(self, history_lens: IntArray, num_candidates: IntArray) -> IntArray:
        """Tokens that the model makes of samples."""
        return np.asarray(self.tokens_an_event * history_lens + num_candidates + self.num_context)

    def stated_load(self, world_size: int) -> BatchLoad:
        """How many ids a rank looks up a step, from the sizes of the training split."""
        history, candidates = self._mean_lengths()
        samples_per_rank = math.ceil(self.config.data.global_batch_size / world_size)
        # Many ids count as one, so these are rows, and bags where they are summed.
        rows = self.task.ids_per_sample(history, candidates, samples_per_rank)
        return BatchLoad(samples_per_rank=samples_per_rank, ids_per_sample=rows, bags_per_sample=rows)

    def activation_bytes(self, load: BatchLoad, *, value_bytes: int) -> int:
        """Device memory of a rank's step with this load besides parameters and tables, of samples of mean lengths: what
        the model holds in its backward pass, computing with so many bytes a value, and the batches of the pipeline.

        Ranks that share samples hold a part of their tokens each.
        """
        history, candidates = self._mean_lengths()
        batch = MeanBatch(
            samples=load.samples_per_rank,
            history=history,
            candidates=candidates,
            num_context=self.num_context,
            value_bytes=value_bytes,
        )
        ids = sum(load.ids(table) for table in self.tables)
        waiting = PIPELINED_BATCHES * (8 * ids + EVENT_BYTES * load.samples_per_rank * (history + candidates))
        return math.ceil(self.task.activations(batch).peak / self.config.context_parallel + waiting)

    def _mean_lengths(self) -> tuple[float, float]:
        """Events and candidates of the mean sample."""
        split = self.info.splits["train"]
        samples = max(1, split.samples)
        return min(split.history_events / samples, self.config.data.max_history_len), split.candidates / samples


def resolve(config: TrainConfig, info: DatasetInfo) -> Resolved:
    """What follows from this configuration and this data.

    Raises:
        ValueError: the model predicts or selects by an action that the data set does not have, or context, history and
            candidates may be longer than `model.max_len`.
    """
    task = make_task(config, info)
    flops = functools.partial(training_flops, flops=task.flops)
    choices = event_choices(config.model, info.actions, task.selection)
    resolved = Resolved(
        config=config,
        info=info,
        task=task,
        tables=task.tables,
        num_context=task.num_context,
        tokens_an_event=task.tokens_an_event,
        most_candidates=_most_candidates(config, info),
        selective_channels={name: choice for name, choice in choices.items() if not choice.selects_all},
        training_flops=flops,
        balanced_cost=functools.partial(flops, attention_cost=config.data.attention_cost),
    )
    _check_lengths(resolved)
    return resolved


def resolve_again(
    config: TrainConfig, info: DatasetInfo, known: Mapping[str, str], run: Path
) -> tuple[Resolved, set[str]]:
    """As `resolve`, for a model that a run, whose `meanings` are known, has trained: numbers are measured as there.

    Returns the tables that have grown since, too.  `known` is empty where nothing has been trained yet.

    Raises:
        ValueError: as `resolve`, or the data mean something else than what the model was trained on.
    """
    resolved, other = resolve(config, info.measured_by(json.loads(known.get(NUMBERS, "{}")))), f"the run of {run}"
    check_same_ids(known, info, data=config.data.path, other=other)
    here = resolved.meanings()[INPUTS]
    _check_same_columns(here.split("; "), known.get(INPUTS, here).split("; "), data=config.data.path, other=other)
    return resolved, grown_spaces(known, info)


def _check_same_columns(here: list[str], there: list[str], *, data: str, other: str) -> None:
    """Refuse data whose columns are not those that `other` was trained on, one by one."""
    missing, added = (
        ", ".join(each for each in ours if each not in theirs) for ours, theirs in ((there, here), (here, there))
    )
    differences = [f"lacks {missing}, which {other} was trained on"] if missing else []
    differences += [f"has {added}, which {other} was not trained on"] if added else []
    if differences:
        raise ValueError(f"{data} {' and '.join(differences)}: prepare it with the same columns and options")
    for place, (now, then) in enumerate(zip(here, there, strict=True), start=1):
        if now != then:
            raise ValueError(
                f"column {place} of those that a model reads is {now} in {data}, but {then} in {other}: a model knows "
                "columns by their places; prepare the data with the same ones in the same order"
            )


def make_task(config: TrainConfig, info: DatasetInfo) -> Task:
    """What the configuration asks a model to be trained for."""
    if config.model.retrieval is None:
        return Ranking(config, info)
    return Retrieval(config, info) if config.model.retrieval.beside_ranking is None else Joint(config, info)


def _check_lengths(resolved: Resolved) -> None:
    """The model's constant `max_len` must hold the sequences that the data settings allow."""
    longest_history, max_len = resolved.task.events_read, resolved.config.model.max_len
    num_context, tokens_an_event = resolved.num_context, resolved.tokens_an_event
    longest = num_context + tokens_an_event * longest_history + resolved.most_candidates
    if longest > max_len:
        raise ValueError(
            f"model.max_len={max_len} is below the {longest} tokens of the longest sequence ({num_context} context, "
            f"{tokens_an_event} x {longest_history} history, {resolved.most_candidates} candidates): raise "
            "model.max_len, or lower data.max_history_len or data.max_candidates"
        )


def _most_candidates(config: TrainConfig, info: DatasetInfo) -> int:
    """Data that others prepared may not say it: then this is their mean, and the model itself refuses a longer sequence
    when it comes."""
    deliveries = [info.details, *info.details.get("deliveries", {}).values()]
    described = [split for each in deliveries for split in each.get("statistics", {}).get("splits", {}).values()]
    counted = [split.get("num_candidates") for split in described]
    prepared = max((lens["q100"] for lens in counted if lens), default=None)
    if prepared is None:
        prepared = max(
            [math.ceil(split.candidates / max(1, split.samples)) for split in info.splits.values()], default=1
        )
    return max(1, prepared if config.data.max_candidates is None else min(prepared, config.data.max_candidates))
