"""Record the dense part of a step once for each size of batch, and replay it: the host launches it as one.

    looked-up rows, batch -> fixed memory -> | forward, loss, backward | -> gradients of rows and of parameters
    gradients of parameters, averaged     -> | clipping, Adam          | -> parameters

What stands between bars is a CUDA graph.  Batches are padded to few sizes (`pipelines.batches.padding`).  Apart from
the sizes, everything that kernels are given lies on the device, lengths and seeds of dropout included.  A size's first
batch is launched as ever, which also loads its kernels; if there is a second it is recorded, and from then on replayed.
All three compute the same bits, because they launch the same kernels on the same memory.

Fixed memory of rows is shared by sizes within a factor of two.  Evaluation launches as ever, without padding.

Applied outside the model, by `record_steps`.
"""

import logging
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torchrec.sparse.jagged_tensor import JaggedTensor

from embeddings.tables import Rows, rows_by_feature
from pipelines.batches.padding import BatchPadding, Count
from trainer.models.model import Model, Objective
from trainer.models.precision import compute_dtype
from trainer.parallel.mesh import Mesh
from trainer.parallelize import ParallelModel
from trainer.resolve import Resolved
from trainer.steps.graphs import Graphs, Recording

logger = logging.getLogger(__name__)

MAX_SIZES = 64
"""Sizes that are recorded, the first that come again; batches of others are launched."""


class _Memory:
    """Fixed memory, shared by what is not used at the same time: one piece for each power of two."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pieces: dict[int, Tensor] = {}

    def take(self, shapes: Sequence[tuple[int, int]], dtypes: Sequence[torch.dtype]) -> list[Tensor]:
        """Tensors side by side, the same for the same shapes and types."""
        sizes = [count * width * dtype.itemsize for (count, width), dtype in zip(shapes, dtypes, strict=True)]
        # Kernels want rows that start at multiples of 16 bytes.
        aligned = [-(-size // 16) * 16 for size in sizes]
        power = 1 << max(0, sum(aligned) - 1).bit_length()
        if power not in self._pieces:
            self._pieces[power] = torch.zeros(power, dtype=torch.uint8, device=self._device)
        parts = torch.split(self._pieces[power][: sum(aligned)], aligned)
        each = zip(parts, sizes, shapes, dtypes, strict=True)
        return [part[:size].view(dtype).view(shape) for part, size, shape, dtype in each]


class _Sized:
    """What batches of one size are computed in."""

    def __init__(
        self,
        batch: Any,
        shapes: Sequence[tuple[int, int]],
        dtypes: Sequence[torch.dtype],
        rows: _Memory,
        gradients: _Memory,
    ) -> None:
        """`shapes` and `dtypes` are those of the features' rows."""
        self.batch = batch
        self.rows, self.gradients = rows.take(shapes, dtypes), gradients.take(shapes, dtypes)
        self.loss = torch.zeros((), device=self.rows[0].device)
        self.recording: Recording | None = None
        """The recording of its step; None if it is launched."""


class RecordedObjective(nn.Module):
    """In the place of an `Objective`: the same loss and gradients, of padded batches, replayed.

    While training, parameters' gradients are written into memory that stays theirs.  The loss must be differentiated as
    it is, not a function of it.

    Args:
        objective: what is recorded.
        padding: of the task's batches.
        graphs: where sizes are recorded; None launches every step.
    """

    def __init__(self, objective: Objective, padding: BatchPadding, graphs: Graphs | None) -> None:
        super().__init__()
        self.objective, self._padding, self._graphs = objective, padding, graphs
        self._parameters_of_tower = [each for each in objective.tower.parameters() if each.requires_grad]
        sizes = [parameter.numel() for parameter in self._parameters_of_tower]
        first = self._parameters_of_tower[0]
        parts = torch.split(torch.zeros(sum(sizes), dtype=first.dtype, device=first.device), sizes)
        views = zip(parts, self._parameters_of_tower, strict=True)
        self._gradients = [view.view(parameter.shape) for view, parameter in views]
        self._unused: set[int] = set()
        self._memories = _Memory(first.device), _Memory(first.device)
        self._sized: dict[tuple[int, ...], _Sized] = {}
        self._seen: set[int] = set()

    @property
    def tower(self) -> nn.Module:
        """The tower of the objective."""
        return self.objective.tower

    @property
    def loss(self) -> nn.Module:
        """The loss module of the objective."""
        return self.objective.loss

    def forward(self, looked_up: list[Rows], batch: Any) -> Tensor:
        """The loss of a batch."""
        if not (self.training and torch.is_grad_enabled()):
            loss: Tensor = self.objective(looked_up, batch)
            return loss
        self.tower.check(batch.inputs)  # type: ignore[operator]  # torch does not know a module's methods
        counts = self._padding.lookups(batch)
        rows = rows_by_feature(looked_up)
        values = [_first(rows[name].values(), sum(count.real for count in each)) for name, each in counts.items()]
        replayed: Tensor = _Replayed.apply(self, batch, counts, *values)  # type: ignore[no-untyped-call]  # torch
        return replayed

    def run(self, batch: Any, counts: Mapping[str, Sequence[Count]], values: Sequence[Tensor]) -> _Sized:
        """Leave the batch's loss and gradients in the memory of its size."""
        sizes = self._padding.sizes(batch)
        sized = self._sized.get(sizes)
        if sized is None:
            sized = self._of_size(sizes, batch, counts, values)
        else:
            self._padding.fill(sized.batch, batch)
        pairs = list(zip(sized.rows, counts.values(), strict=True))
        places = [part for place, each in pairs for part in _real(place, each)]
        paddings = [part for place, each in pairs for part in _padding(place, each) if part.numel()]
        if paddings:
            # Batches of other sizes leave rows there.
            torch._foreach_zero_(paddings)
        sources = [
            part
            for value, each in zip(values, counts.values(), strict=True)
            for part in torch.split(value.detach(), [count.real for count in each])
        ]
        _copy(zip(places, sources, strict=True))
        if sized.recording is None:
            self._differentiate(sized, list(counts))
        else:
            sized.recording()
        for index, (parameter, gradient) in enumerate(zip(self._parameters_of_tower, self._gradients, strict=True)):
            parameter.grad = None if index in self._unused else gradient
        return sized

    def _of_size(
        self, sizes: tuple[int, ...], batch: Any, counts: Mapping[str, Sequence[Count]], values: Sequence[Tensor]
    ) -> _Sized:
        """For a batch of no kept size; kept where another was of its size, as long as there are not MAX_SIZES."""
        names, device = list(counts), self._gradients[0].device
        shapes = [(sum(n.padded for n in each), x.shape[1]) for each, x in zip(counts.values(), values, strict=True)]
        kept, dtypes = self._padding.kept(batch, device), self._dtypes(names, values)
        sized = _Sized(kept, shapes, dtypes, *self._memories)
        if hash(sizes) in self._seen and len(self._sized) < MAX_SIZES:
            name = f"the step of sizes {sizes}"
            sized.recording = Recording(name, lambda: self._differentiate(sized, names), self._graphs, launched=True)
            self._sized[sizes] = sized
            if len(self._sized) == MAX_SIZES:
                logger.warning("%d sizes of batches are recorded, the most: others will be launched", MAX_SIZES)
        self._seen.add(hash(sizes))
        return sized

    def _dtypes(self, names: Sequence[str], values: Sequence[Tensor]) -> list[torch.dtype]:
        """What rows are kept in: the type of computation, where the tower casts them to it before all else."""
        cast: frozenset[str] = self.tower.cast_first  # type: ignore[assignment]  # torch does not know a module's own
        return [compute_dtype(x) if name in cast else x.dtype for name, x in zip(names, values, strict=True)]

    def _differentiate(self, sized: _Sized, names: Sequence[str]) -> None:
        """Forward and backward from the fixed memory of inputs to that of the loss and of gradients."""
        device = sized.loss.device
        kind = device.type
        rows = [x.detach().requires_grad_() for x in sized.rows]
        # Encoders read values alone; the lengths of what was looked up are the batch's.
        none = torch.zeros(0, dtype=torch.long, device=device)
        looked_up = {name: JaggedTensor(x, lengths=none) for name, x in zip(names, rows, strict=True)}
        # Weights that are cast once for several uses would outlive the recording that they were cast in.
        dtype, enabled = torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind)
        with torch.enable_grad(), torch.autocast(kind, dtype=dtype, enabled=enabled, cache_enabled=False):
            loss = self.objective([looked_up], sized.batch)
        inputs = [*rows, *self._parameters_of_tower]
        found: tuple[Tensor | None, ...] = torch.autograd.grad(loss, inputs, allow_unused=True)
        of_rows, of_parameters = found[: len(rows)], found[len(rows) :]
        self._unused = {index for index, gradient in enumerate(of_parameters) if gradient is None}
        pairs = zip([*sized.gradients, *self._gradients], [*of_rows, *of_parameters], strict=True)
        _copy((place, gradient) for place, gradient in pairs if gradient is not None)
        for place, gradient in zip(sized.gradients, of_rows, strict=True):
            if gradient is None:
                place.zero_()
        sized.loss.copy_(loss.detach())


def _first(rows: Tensor, count: int) -> Tensor:
    """The first rows: a pooled lookup of no bags gives one sum.  A slice of all of them would be no view to autograd,
    whose backward fills and copies their gradients."""
    return rows if rows.shape[0] == count else rows[:count]


def _copy(pairs: Iterable[tuple[Tensor, Tensor]]) -> None:
    """Copy each second one into the first; a launch for each pair of types."""
    by_types: dict[tuple[torch.dtype, torch.dtype], list[tuple[Tensor, Tensor]]] = defaultdict(list)
    for to, of in pairs:
        by_types[to.dtype, of.dtype].append((to, of))
    for alike in by_types.values():
        torch._foreach_copy_([to for to, _ in alike], [of for _, of in alike])


def _real(rows: Tensor, counts: Sequence[Count]) -> list[Tensor]:
    """The parts of padded rows without their padding."""
    parts = torch.split(rows, [count.padded for count in counts])
    return [part[: count.real] for part, count in zip(parts, counts, strict=True)]


def _padding(rows: Tensor, counts: Sequence[Count]) -> list[Tensor]:
    """The padding of each part."""
    parts = torch.split(rows, [count.padded for count in counts])
    return [part[count.real :] for part, count in zip(parts, counts, strict=True)]


class _Replayed(torch.autograd.Function):
    """From looked-up rows to the loss; the backward has happened by then."""

    @staticmethod
    def forward(
        ctx: Any, objective: RecordedObjective, batch: Any, counts: Mapping[str, Sequence[Count]], *values: Tensor
    ) -> Tensor:
        ctx.sized, ctx.counts = objective.run(batch, counts, values), counts
        ctx.dtypes = [x.dtype for x in values]
        # A copy, because the next step overwrites the loss.
        loss: Tensor = ctx.sized.loss.clone()
        return loss

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor | None, ...]:
        pairs: list[tuple[Tensor, Tensor]] = []
        gradients = []
        for place, counts, dtype in zip(ctx.sized.gradients, ctx.counts.values(), ctx.dtypes, strict=True):
            parts = _real(place, counts)
            if len(parts) == 1 and place.dtype == dtype:
                gradients.append(parts[0])
                continue
            real = [len(part) for part in parts]
            gradients.append(torch.empty(sum(real), place.shape[1], dtype=dtype, device=place.device))
            pairs += zip(torch.split(gradients[-1], real), parts, strict=True)
        _copy(pairs)
        return None, None, None, *gradients


def why_launched(resolved: Resolved, mesh: Mesh) -> str | None:
    """Why steps cannot be recorded; None if they can."""
    config = resolved.config
    if mesh.device.type != "cuda":
        return f"only a GPU replays, this run computes on {mesh.device.type}"
    if mesh.sharing > 1:
        return f"{mesh.sharing} ranks exchange their shares of a history while they compute"
    if all(table.frozen for table in resolved.tables):
        return "all tables are frozen, so nothing behind them waits for gradients"
    if config.model.is_rectangular and config.model.input.merge == "interleave":
        return "how long the longest sequence of two tokens an event is, is no size of a batch"
    if config.model.channels:
        return "channels choose their events on the host"
    if config.model.retrieval is not None and not config.model.retrieval.share_negatives:
        return "share_negatives=false draws another number of negatives for every batch"
    return None


def check_recorded(resolved: Resolved, mesh: Mesh) -> None:
    """Raises ValueError where steps have to be recorded and cannot be."""
    _refuse(why_launched(resolved, mesh), resolved)


def _refuse(reason: str | None, resolved: Resolved) -> None:
    if resolved.config.recorded == "on" and reason is not None:
        raise ValueError(f"recorded=on, but {reason}: set recorded=auto")


def will_record(model: Model, resolved: Resolved, mesh: Mesh) -> bool:
    """Whether the single-process model's steps are to be recorded, as the configuration says; logs why not.

    Raises:
        ValueError: they have to be, and cannot be.
    """
    if resolved.config.recorded == "off":
        return False
    reason = why_launched(resolved, mesh)
    if reason is None and not any(parameter.requires_grad for parameter in model.tower.parameters()):
        reason = "all dense parameters are frozen"
    _refuse(reason, resolved)
    if reason is not None:
        logger.info("steps are launched, not replayed: %s", reason)
    return reason is None


def record_steps(model: ParallelModel, padding: BatchPadding, graphs: Graphs | None) -> None:
    """Let the model's steps be recorded in `graphs`, in place; its gradients are averaged before the update."""
    model.model.objective = RecordedObjective(model.model.objective, padding, graphs)
    model.optimizers.update = Recording("the dense update", model.optimizers.update, graphs)
