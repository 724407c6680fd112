"""The ranker's loss: the sum over labels of their losses, times what a candidate counts.

A candidate counts as much as the data set's weight column says.  Where candidates were left out of the data on purpose
(downsampled negatives), the keep rate column says which part of candidates like this one was kept, and each label says
what follows from it:

    weight   a candidate stands for 1 / keep rate of them, in the loss and in metrics; true of any label
    shift    of a binary label whose negatives were thinned: the column holds, at positives too, the rate of negatives.
             The loss sees the logit less log(keep rate), so that the logit itself is that of all candidates, without
             the noise of large weights.  In metrics a negative stands for 1 / keep rate.
    ignore   nothing: predictions are those of the thinned data

Shapes: C candidates, K outputs of all labels, L labels.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from pipelines.batches.batch import Batch, Labels
from pipelines.features import DatasetInfo
from trainer.labels.binary import Binary
from trainer.labels.build import build_labels, label_configs
from trainer.labels.config import LabelConfig
from trainer.labels.kind import LabelKind
from trainer.labels.running import RunningMetrics


class RankingLoss(nn.Module):
    """Labels side by side, each with its slice of the head's outputs.

    Args:
        kinds: the labels.
        configs: what the configuration says of each.
        weight: the column that multiplies a candidate's loss; None for 1.
        keep_rate: the column of the candidates' keep rates; None for 1.
    """

    shares: Tensor

    def __init__(
        self,
        kinds: Sequence[LabelKind],
        configs: Sequence[LabelConfig],
        *,
        weight: str | None = None,
        keep_rate: str | None = None,
    ) -> None:
        super().__init__()
        self._kinds = nn.ModuleList(kinds)
        self.keep_rates = tuple("ignore" if keep_rate is None else config.keep_rate for config in configs)
        self.weight, self.keep_rate = weight, keep_rate
        self.names = tuple(config.name for config in configs)
        self.widths = [kind.num_outputs for kind in kinds]
        # Normalised, so that equal weights give the mean over labels.
        shares = torch.tensor([config.weight for config in configs], dtype=torch.float32)
        self.register_buffer("shares", shares / shares.sum(), persistent=False)
        self._binary = [place for place, kind in enumerate(kinds) if isinstance(kind, Binary)]
        self.running = RunningMetrics([self.names[place] for place in self._binary])

    def forward(self, outputs_CK: Tensor, looked_up: object, batch: Batch) -> Tensor:
        """This rank's part of the loss: the weighted sum over candidates, over `loss_denominator` of the labels.

        Candidates without a label add nothing to its loss, and count in the denominator; padding does neither.
        An empty batch gives 0, with zero gradients.
        """
        labels = batch.labels
        targets = [kind.targets(labels) for kind in self.kinds]
        losses_CL = torch.stack(
            [
                kind.loss(self._shifted(outputs, mode, labels), target)
                for kind, outputs, mode, target in zip(
                    self.kinds, self.outputs(outputs_CK), self.keep_rates, targets, strict=True
                )
            ],
            dim=1,
        )
        terms_CL = losses_CL * self._weights(labels, [None] * len(targets)) * self.shares
        real_C1 = None
        if batch.inputs.padded:
            real = batch.inputs.num_candidates[:-1].sum()
            real_C1 = torch.arange(len(terms_CL), device=real.device)[:, None] < real
            terms_CL = torch.where(real_C1, terms_CL, 0)
        if self.training and self._binary:
            self._run(outputs_CK, labels, targets, real_C1)
        return terms_CL.sum() / labels.loss_denominator

    def _run(self, outputs_CK: Tensor, labels: Labels, targets: Sequence[Tensor], real_C1: Tensor | None) -> None:
        """Count the candidates in the running metrics: as evaluations weigh them, and not those without a label."""
        with torch.no_grad():
            outputs, weights_LC = self.outputs(outputs_CK), self._weights(labels, targets).unbind(dim=1)
            # Place by place: a list as an index is a tensor of the host's, for which the device would be waited for.
            weights_CL = torch.stack([weights_LC[place] for place in self._binary], dim=1)
            logits_CL = torch.cat([outputs[place] for place in self._binary], dim=1)
            targets_CL = torch.stack([targets[place] for place in self._binary], dim=1)
            counted_CL = ~targets_CL.isnan() if real_C1 is None else ~targets_CL.isnan() & real_C1
            self.running.add(logits_CL, targets_CL.nan_to_num(), torch.where(counted_CL, weights_CL, 0))

    @property
    def kinds(self) -> list[LabelKind]:
        """The kind of each label."""
        return [kind for kind in self._kinds if isinstance(kind, LabelKind)]

    @property
    def num_outputs(self) -> int:
        """Outputs of all labels together."""
        return sum(self.widths)

    @property
    def output_bits(self) -> list[int | None]:
        """[K] the action that each output is the logit of; None of what is no action."""
        return [kind.bit if isinstance(kind, Binary) else None for kind in self.kinds for _ in range(kind.num_outputs)]

    def outputs(self, outputs_CK: Tensor) -> tuple[Tensor, ...]:
        """Each label's part of the head's outputs, [C, its K]."""
        return torch.split(outputs_CK, self.widths, dim=1)

    def start(self) -> Tensor:
        """[K] outputs that say what is known without a look at the candidate."""
        return torch.cat([kind.start() for kind in self.kinds])

    def evidence(self, outputs_CK: Tensor, labels: Labels) -> tuple[list[Tensor], Tensor]:
        """What metrics need: each label's evidence, and what each candidate counts in each label, [C, L]."""
        targets = [kind.targets(labels) for kind in self.kinds]
        parts = zip(self.kinds, self.outputs(outputs_CK), targets, strict=True)
        return [kind.evidence(outputs, target) for kind, outputs, target in parts], self._weights(labels, targets)

    def _weights(self, labels: Labels, targets: Sequence[Tensor | None]) -> Tensor:
        """What each candidate counts in each label, [C, L]; with targets, negatives of thinned data count more."""
        weight_C = torch.ones_like(labels.action, dtype=torch.float32)
        if self.weight is not None:
            weight_C = labels.values[self.weight].float()
        columns = []
        for mode, target_C in zip(self.keep_rates, targets, strict=True):
            column_C = weight_C
            if mode == "weight" or (mode == "shift" and target_C is not None):
                stands_for_C = 1 / self._rates(labels)
                if mode == "shift":
                    assert target_C is not None
                    stands_for_C = torch.where(target_C > 0, 1.0, stands_for_C)
                column_C = weight_C * stands_for_C
            columns.append(column_C)
        return torch.stack(columns, dim=1)

    def _shifted(self, outputs: Tensor, mode: str, labels: Labels) -> Tensor:
        return outputs - self._rates(labels).log()[:, None] if mode == "shift" else outputs

    def _rates(self, labels: Labels) -> Tensor:
        assert self.keep_rate is not None
        return labels.values[self.keep_rate].float()


def build_ranking_loss(stated: Sequence[LabelConfig] | None, info: DatasetInfo) -> RankingLoss:
    """The loss of the labels that the configuration states, or else of every action.

    Raises:
        ValueError: the data set lacks a label, it is of another kind, or weights or keep rates cannot be.
    """
    configs = label_configs(stated, info)
    _check_keep_rates(configs, info)
    return RankingLoss(build_labels(configs, info), configs, weight=info.weight, keep_rate=info.keep_rate)


def label_columns(stated: Sequence[LabelConfig] | None, info: DatasetInfo) -> tuple[str, ...]:
    """The label columns that the loss and the metrics read, besides the action bits."""
    names = [config.name for config in label_configs(stated, info) if config.name not in info.actions]
    return tuple(dict.fromkeys([*names, *(name for name in (info.weight, info.keep_rate) if name is not None)]))


def _check_keep_rates(configs: Sequence[LabelConfig], info: DatasetInfo) -> None:
    for config in configs:
        if config.keep_rate != "weight" and info.keep_rate is None:
            raise ValueError(
                f"model.labels: keep_rate={config.keep_rate} of {config.name!r} has no effect, {info.name} names no "
                "column of keep rates: leave it out"
            )
    known = {column.name: column.statistics for column in info.of("label")}
    for role, name, low, high in (("weight", info.weight, 0.0, None), ("keep_rate", info.keep_rate, 0.0, 1.0)):
        numbers = known.get(name) if name is not None else None
        if numbers is None or not numbers.quantiles:
            continue
        smallest, largest = numbers.quantiles[0], numbers.quantiles[-1]
        wrong = smallest < low or (high is not None and (largest > high or smallest == low))
        if wrong or numbers.missing:
            bounds = "at least 0" if high is None else "above 0 and at most 1"
            raise ValueError(
                f"{info.name}: {role} column {name!r} must hold a number {bounds} at every candidate; it goes from "
                f"{smallest:g} to {largest:g}, and {numbers.missing:,} are missing"
            )
