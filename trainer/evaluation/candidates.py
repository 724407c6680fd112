"""What predictions of candidates are worth: the evaluation split on all ranks, and the table beside the baseline."""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

from embeddings.rows.trained import TrainedRows
from pipelines.batches.batch import Batch, Inputs
from pipelines.features import ITEM_ID
from trainer.labels.kind import LabelKind
from trainer.labels.loss import RankingLoss
from trainer.parallel.mesh import Mesh
from trainer.parallelize import ParallelModel

LARGE = 1e5
"""From here on, numbers of a table have five digits in place of four decimals."""
FEW_POSITIVES = 100
"""Positives below which a label is marked: the 95% interval of its AUC is then over 0.1 wide."""


@dataclass(frozen=True, slots=True)
class LabelScores:
    """What was measured of the evaluation split, as `METRIC/LABEL`."""

    metrics: dict[str, float]
    """The model's metrics."""
    constant: dict[str, float]
    """Metrics of constant predictions, which know nothing of the candidate, for the labels that were asked for."""
    unknown: dict[str, float]
    """The model's metrics over the candidates with an unknown item alone; empty where there is none."""
    unknown_share: float
    """Which part of the candidates those are."""


@torch.no_grad()
def measure_candidates(
    model: ParallelModel,
    batches: Iterable[Batch],
    mesh: Mesh,
    *,
    labels: RankingLoss,
    outputs: Callable[[Inputs], Tensor],
    trained: TrainedRows | None = None,
    constant: Mapping[str, Tensor] = MappingProxyType({}),
) -> LabelScores:
    """The metrics of each label over the evaluation split.  Called by every rank, each with its own batches.

    `outputs` gives the model's outputs of `labels` at every candidate of a batch.  Candidates whose item is not among
    the `trained` rows are measured apart, too; `constant` has outputs of some labels, the same for all candidates,
    which are measured beside.  Every rank must get the same number of batches, for each lookup is a collective; a
    batch may be empty.  The training pipeline may hold batches in flight meanwhile: nothing of theirs is touched.
    """
    # Not before it is needed: torchmetrics imports what it finds of libraries for pictures and texts, which takes
    # seconds.
    from trainer.labels.measure import LabelMetrics

    kinds = labels.kinds
    places = [place for place, name in enumerate(labels.names) if name in constant]
    metrics = LabelMetrics(kinds, mesh.device)
    of_constant = LabelMetrics([kinds[place] for place in places], mesh.device)
    of_unknown = LabelMetrics(kinds, mesh.device)
    counts = torch.zeros(2, dtype=torch.float64, device=mesh.device)
    parts = zip(labels.names, labels.kinds, strict=True)
    constant_K = torch.cat([constant.get(name, kind.start()) for name, kind in parts]).to(mesh.device)
    was_training = model.module.training
    model.module.eval()
    try:
        for batch in tqdm(batches, desc="evaluating", unit="batch", leave=False, disable=not mesh.is_first):
            on_device = batch.to(mesh.device, non_blocking=True)
            inputs = model.known(on_device.inputs)
            outputs_CK = outputs(inputs)
            unknown_C = _unknown_items(inputs, trained)
            users = torch.repeat_interleave(inputs.user_id, inputs.num_candidates)
            evidence, weights_CL = labels.evidence(outputs_CK, on_device.labels)
            metrics.update(evidence, weights_CL, users)
            of_unknown.update([each[unknown_C] for each in evidence], weights_CL[unknown_C], users[unknown_C])
            counts += torch.stack([unknown_C.sum(), torch.ones_like(unknown_C).sum()])
            if places:
                evidence, _ = labels.evidence(constant_K.expand_as(outputs_CK), on_device.labels)
                of_constant.update([evidence[place] for place in places], weights_CL[:, places], users)
    finally:
        model.module.train(was_training)
    # The collectives here: torchmetrics gathers every rank's candidates.
    dist.all_reduce(counts)
    unknown, candidates = counts.tolist()
    return LabelScores(
        metrics=metrics.compute(),
        constant=of_constant.compute() if places else {},
        unknown=of_unknown.compute() if unknown else {},
        unknown_share=unknown / max(1, candidates),
    )


def _unknown_items(inputs: Inputs, trained: TrainedRows | None) -> Tensor:
    """[C] whether a candidate's item has no trained row of its own."""
    count, keys = int(inputs.num_candidates_host.sum()), inputs.features.keys()
    if trained is None or ITEM_ID not in keys:
        return torch.zeros(count, dtype=torch.bool, device=inputs.user_id.device)
    ids = inputs.ids(ITEM_ID)
    # Candidates come after all events.
    return ~trained.known(ITEM_ID, ids[len(ids) - count :])


def with_unknown(found: LabelScores) -> dict[str, float]:
    """The metrics that are written: the model's, and with `_unknown` those over unknown items, where there are any."""
    if not found.unknown:
        return found.metrics
    of_unknown = {name.replace("/", "_unknown/", 1): value for name, value in found.unknown.items()}
    return {**found.metrics, "unknown_share": found.unknown_share, **of_unknown}


def ranking_table(model: Mapping[str, float], baseline: Mapping[str, float], kinds: Iterable[LabelKind]) -> str:
    """Binary labels in one table, then the others' metrics, a line each, beside the baseline's."""
    kinds = list(kinds)
    binary = tuple(kind.name for kind in kinds if "auc" in kind.metrics)
    tables = [comparison_table(model, baseline, binary)] if binary else []
    others = [(kind.name, metric) for kind in kinds if "auc" not in kind.metrics for metric in kind.metrics]
    if others:
        header = f"{'label':<18}{'metric':<14}{'model':>12}{'baseline':>12}"
        tables.append("\n".join([header, "-" * len(header)]))
    for label, metric in others:
        values = "".join(_cell(metrics.get(f"{metric}/{label}", math.nan), 12) for metrics in (model, baseline))
        tables.append(f"{label:<18}{metric:<14}{values}")
    return "\n".join(tables)


def unknown_lines(found: LabelScores, kinds: Iterable[LabelKind]) -> str:
    """What the table says of candidates whose item training has not seen; nothing where there are none."""
    if not found.unknown:
        return ""
    lines = []
    for kind in kinds:
        values = {name: found.unknown[f"{name}/{kind.name}"] for name in kind.metrics if name != "auc_95"}
        shown = {name: f"{name} {value:.4g}" for name, value in values.items() if not math.isnan(value)}
        # A label that none of them has: there is nothing to measure.
        if shown.keys() - {"positives"}:
            lines.append(f"{kind.name:<18}{', '.join(shown.values())}")
    share = f"\n{found.unknown_share:.2%} of the candidates have an item that training has not seen"
    return "\n".join([share + ":", *lines]) if lines else share


def comparison_table(model: Mapping[str, float], baseline: Mapping[str, float], labels: tuple[str, ...]) -> str:
    """A table of one row a binary label: the model's metrics beside the baseline's, and the difference of their AUC.

    The AUC is given with its 95% interval; a label with few positives is marked.
    """
    header = f"{'label':<18}{'positives':>10}{'NE':>9}{'baseline':>10}"
    rows = [header + f"{'AUC':>9}{'95% +-':>8}{'baseline':>10}{'AUC gain':>12}{'GAUC':>9}{'baseline':>10}"]
    rows.append("-" * len(rows[0]))
    few = []
    for label in labels:
        (ne, auc, gauc), (base_ne, base_auc, base_gauc) = (
            [metrics.get(f"{name}/{label}", math.nan) for name in ("ne", "auc", "gauc")]
            for metrics in (model, baseline)
        )
        positives = model[f"positives/{label}"]
        few += [label] * (positives < FEW_POSITIVES)
        rows.append(
            f"{label:<18}{positives:>10,.0f}{_cell(ne, 9)}{_cell(base_ne, 10)}"
            f"{_cell(auc, 9)}{_cell(model[f'auc_95/{label}'], 8)}{_cell(base_auc, 10)}{_cell(auc - base_auc, 12, '+')}"
            f"{_cell(gauc, 9)}{_cell(base_gauc, 10)}"
        )
    if few:
        rows.append(f"fewer than {FEW_POSITIVES} positives, too few to say anything: {', '.join(few)}")
    return "\n".join(rows)


def _cell(value: Any, width: int, sign: str = "") -> str:
    if math.isnan(value):
        return f"{'-':>{width}}"
    form = ".4f" if abs(value) < LARGE else ".5g"
    return f"{value:>{sign}{width}{form}}"
