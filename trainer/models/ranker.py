"""The ranker: one logit a task for every candidate, from its own output position.

Shapes: B users, C candidates of all users, D model width, M tasks.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from embeddings.tables import Rows, rows_by_feature
from pipelines.batch import Batch, Inputs
from pipelines.selection import Selection
from trainer.models.config import ModelConfig
from trainer.models.encoding import InputEncoder
from trainer.models.rates import RATE_EPS, Rates
from trainer.models.transducers import MixtureOfTransducers, build_mixture


@dataclass(frozen=True, kw_only=True, slots=True)
class RankerOutput:
    """What evaluation and logging read; detached from the graph."""

    logits: Tensor
    """[C, M] float32."""
    labels: Tensor
    """[C, M] float32 in {0, 1}."""


class RankerTower(nn.Module):
    """All of the ranker but its tables: encoder, tower and head, from looked-up rows to the loss."""

    task_bits: Tensor
    task_weights: Tensor

    def __init__(
        self,
        *,
        encoder: InputEncoder,
        tower: MixtureOfTransducers,
        head: nn.Sequential,
        rates: Rates | None,
        task_bits: tuple[int, ...],
        task_weights: tuple[float, ...],
        max_len: int,
    ) -> None:
        super().__init__()
        self.encoder, self.tower, self.head, self.max_len = encoder, tower, head, max_len
        self.rates = rates
        self.register_buffer("task_bits", torch.tensor(task_bits, dtype=torch.int32), persistent=False)
        # Normalised, so that equal weights give the mean over tasks.
        weights = torch.tensor(task_weights, dtype=torch.float32)
        self.register_buffer("task_weights", weights / weights.sum(), persistent=False)

    def forward(self, looked_up: list[Rows], batch: Batch) -> tuple[Tensor, RankerOutput]:
        """Returns this rank's part of the loss and, detached, logits and labels of its candidates.

        The loss is the sum over candidates of the weighted mean of the tasks' cross entropies, over
        `batch.labels.loss_denominator`.  An empty batch gives 0, with zero gradients for every parameter.
        """
        logits_CM = self.score(rows_by_feature(looked_up), batch.inputs)
        labels_CM = (batch.labels.action[:, None] >> self.task_bits & 1).float()
        losses_CM = F.binary_cross_entropy_with_logits(logits_CM, labels_CM, reduction="none")
        loss = (losses_CM * self.task_weights).sum() / batch.labels.loss_denominator
        return loss, RankerOutput(logits=logits_CM.detach(), labels=labels_CM)

    @torch.no_grad()
    def start_at_rates(self, rates: Sequence[float]) -> None:
        """Let the untrained model predict these rates of the tasks, instead of 1/2: rare tasks need no steps for it.

        Where counts tell how item and user differ from them, that is all it adds at first.
        """
        output = self.head[-1]
        assert isinstance(output, nn.Linear)
        output.bias.copy_(torch.logit(torch.tensor(rates), eps=RATE_EPS))
        if self.rates is not None:
            output.weight.zero_()

    def score(self, embedded: Rows, inputs: Inputs) -> Tensor:
        """The logits of every candidate, [C, M] float32."""
        of_rates_CD, rate_logits_CM = (None, None) if self.rates is None else self.rates(inputs.numbers)
        tokens_TD, layout = self.encoder(embedded, inputs, of_rates_CD)
        if layout.longest > self.max_len:
            raise ValueError(
                f"a sequence has {layout.longest} tokens, more than model.max_len={self.max_len}: raise max_len, or "
                "lower data.max_history_len or data.max_candidates"
            )
        hidden_CD: Tensor = self.head[:-1](self.tower(tokens_TD, layout, inputs))
        # In bfloat16 many candidates would have the same score.
        with torch.autocast(hidden_CD.device.type, enabled=False):
            logits_CM: Tensor = self.head[-1](hidden_CD.float())
        return logits_CM if rate_logits_CM is None else logits_CM + rate_logits_CM


def build_ranker_tower(
    config: ModelConfig,
    *,
    selection: Selection,
    widths: Mapping[str, int],
    action_names: tuple[str, ...],
    action_rates: Sequence[float] | None = None,
) -> RankerTower:
    """The ranker's tower for these columns, tables of these widths by space, and these actions.

    Raises:
        ValueError: a task that is no action of the data set, or counts without the actions' rates to smooth them with.
    """
    tasks = action_names if config.tasks is None else config.tasks
    unknown = [task for task in tasks if task not in action_names]
    if unknown:
        raise ValueError(
            f"model.tasks names {unknown[0]!r}, which is none of the data's actions: {', '.join(action_names)}"
        )
    task_bits = tuple(action_names.index(task) for task in tasks)
    rates = None
    if selection.counts:
        if action_rates is None:
            raise ValueError(
                "the data set has counts, but does not say how often each action is taken in its training split "
                "(statistics.splits.train.positives): state it, or set model.input.counts=[]"
            )
        rates = Rates(selection.counts, action_rates=action_rates, task_bits=task_bits, dim=config.dim)
    encoder = InputEncoder(selection, widths=widths, config=config.input, dim=config.dim, num_actions=len(action_names))
    return RankerTower(
        encoder=encoder,
        tower=build_mixture(config, selection=selection, action_names=action_names),
        head=build_head(sum(channel.dim for channel in config.channels) or config.dim, config.head_hidden, len(tasks)),
        rates=rates,
        task_bits=task_bits,
        task_weights=config.task_weights or (1.0,) * len(tasks),
        max_len=config.max_len,
    )


def build_head(dim: int, hidden: int | None, num_tasks: int) -> nn.Sequential:
    """Norm, an optional hidden layer, and one logit a task."""
    if hidden is None:
        return nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, num_tasks))
    return nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, hidden), nn.SiLU(), nn.Linear(hidden, num_tasks))
