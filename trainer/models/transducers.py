"""Mixture of Transducers: towers side by side, each over its own choice of events, joined at the candidates.

All channels share tables and tokens.  A channel keeps all context and candidate tokens and the events it selects, by
action or by a column, in its own width, depth and masks.  What it says of each candidate is concatenated with
what the others say.  A plain model is a mixture of one channel that selects everything.

Shapes: T packed tokens, H events of all histories, C candidates, D width.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pipelines.batches.batch import Inputs
from pipelines.selection import Feature, Selection
from trainer.models.config import ModelConfig, StageConfig
from trainer.models.encoding import num_context
from trainer.models.hstu import HstuTower, build_tower
from trainer.models.last_event import LastEventTower
from trainer.models.layer_config import LayerConfig
from trainer.models.layout import SequenceLayout, count_events, keep_events, take_rows
from trainer.models.softmax import SoftmaxTower
from trainer.models.target_attention import TargetAttentionTower

CandidateTower = HstuTower | SoftmaxTower | LastEventTower | TargetAttentionTower
"""What says something of every candidate: `at_candidates`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EventChoice:
    """Which events a channel sees."""

    action_mask: int | None = None
    """Events with any of these action bits; None for all."""
    column: Feature | None = None
    """Events whose value in this column is neither 0 nor missing; None for all."""

    @property
    def selects_all(self) -> bool:
        """Whether nothing is left out."""
        return self.action_mask is None and self.column is None

    def keep(self, inputs: Inputs) -> Tensor:
        """[H] bool in host memory, because the choice decides sizes."""
        kept = torch.ones(inputs.action_host.shape, dtype=torch.bool)
        if self.action_mask is not None:
            kept &= (inputs.action_host & self.action_mask) != 0
        if self.column is not None:
            read = inputs.numbers_host if self.column.kind == "number" else inputs.ids_host
            # The values of events come first; those of candidates may follow.
            values = read(self.column.name)[: kept.numel()]
            kept &= (values != 0) & ~values.isnan()
        return kept

    def history_lens(self, inputs: Inputs) -> Tensor:
        """How many events of each history stay, [B] in host memory."""
        return count_events(inputs.history_lens_host, self.keep(inputs))


class Transducer(nn.Module):
    """One channel: choice of events, a change of width where it needs one, a tower."""

    def __init__(self, *, choice: EventChoice, model_dim: int, dim: int, tower: CandidateTower) -> None:
        super().__init__()
        self.choice = choice
        self.projection = nn.Linear(model_dim, dim) if dim != model_dim else nn.Identity()
        self.tower = tower

    def forward(self, tokens_TD: Tensor, layout: SequenceLayout, inputs: Inputs) -> Tensor:
        """The channel's output at every candidate, [C, its D]."""
        if not self.choice.selects_all:
            layout, rows = keep_events(layout, self.choice.keep(inputs))
            tokens_TD = take_rows(tokens_TD, rows)
        outputs_CD: Tensor = self.tower.at_candidates(self.projection(tokens_TD), layout)
        return outputs_CD


class MixtureOfTransducers(nn.Module):
    """Channels over the same tokens; on a GPU each runs on a stream of its own, forward and backward."""

    def __init__(self, channels: Mapping[str, Transducer]) -> None:
        super().__init__()
        self.channels = nn.ModuleDict({_key(name): channel for name, channel in channels.items()})
        self._streams: list[torch.cuda.Stream] = []

    def forward(self, tokens_TD: Tensor, layout: SequenceLayout, inputs: Inputs) -> Tensor:
        """The channels' outputs at every candidate, [C, sum of their D]."""
        channels = list(self.channels.values())
        if tokens_TD.device.type == "cuda" and len(channels) > 1:
            return self._side_by_side(channels, tokens_TD, layout, inputs)
        outputs = [channel(tokens_TD, layout, inputs) for channel in channels]
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)

    def everywhere(self, tokens_TD: Tensor, layout: SequenceLayout) -> Tensor:
        """The output at every token, [T, D], of the only channel, which sees all events and drops none."""
        (channel,) = self.channels.values()
        assert isinstance(channel, Transducer) and channel.choice.selects_all
        assert isinstance(channel.tower, HstuTower)
        outputs_TD: Tensor = channel.tower(channel.projection(tokens_TD), layout)[0]
        return outputs_TD

    def _side_by_side(
        self, channels: list[nn.Module], tokens_TD: Tensor, layout: SequenceLayout, inputs: Inputs
    ) -> Tensor:
        """Autograd runs each operation's backward on the stream of its forward, so the backward overlaps as well."""
        if not self._streams:
            self._streams = [torch.cuda.Stream(tokens_TD.device) for _ in channels]  # type: ignore[no-untyped-call]  # torch
        current = torch.cuda.current_stream(tokens_TD.device)
        outputs = []
        for channel, stream in zip(channels, self._streams, strict=True):
            stream.wait_stream(current)
            with torch.cuda.stream(stream):
                outputs.append(channel(tokens_TD, layout, inputs))
        for output, stream in zip(outputs, self._streams, strict=True):
            current.wait_stream(stream)
            # The allocator must not hand memory on while another stream still uses it.
            output.record_stream(current)
            for tensor in (tokens_TD, layout.offsets, layout.user_T, layout.index_T):
                tensor.record_stream(stream)
        return torch.cat(outputs, dim=1)


def _key(name: str) -> str:
    """The name of a channel's parameters: some words (items, keys, ...) are PyTorch's own; no channel has a dash."""
    return f"{name}-" if hasattr(nn.ModuleDict(), name) else name


def event_choices(config: ModelConfig, action_names: tuple[str, ...], selection: Selection) -> dict[str, EventChoice]:
    """What each channel sees, by its name.

    Raises:
        ValueError: a channel selects by an action that the data set does not have, or by a column that is not read.
    """
    choices = {}
    columns = {each.name: each for each in selection.features if "event" in each.parts and each.kind != "ids"}
    for channel in config.channels:
        unknown = [action for action in channel.actions if action not in action_names]
        if unknown:
            raise ValueError(
                f"model.channels: channel {channel.name!r} selects by {unknown[0]!r}, which is none of the data's "
                f"actions: {', '.join(action_names)}"
            )
        bits = [1 << action_names.index(action) for action in channel.actions]
        if channel.side is not None and channel.side not in columns:
            raise ValueError(
                f"model.channels: channel {channel.name!r} selects by the column {channel.side!r}, which is none of "
                f"the ids and numbers that events have here: {', '.join(columns)}; see model.input.event"
            )
        column = None if channel.side is None else columns[channel.side]
        choices[channel.name] = EventChoice(action_mask=sum(bits) if bits else None, column=column)
    return choices


def build_mixture(config: ModelConfig, *, selection: Selection, action_names: tuple[str, ...]) -> MixtureOfTransducers:
    """The config's channels, or one channel over all events for its stages.

    Raises:
        ValueError: a channel selects by an action that the data set does not have, or by a column that is not read.
    """
    common = {"num_context": num_context(selection, config.input), "max_len": config.max_len}
    if config.stages:
        tower = _build_tower(config.dim, config.layer, config.stages, **common)
        only = Transducer(choice=EventChoice(), model_dim=config.dim, dim=config.dim, tower=tower)
        return MixtureOfTransducers({"all": only})
    choices = event_choices(config, action_names, selection)
    channels = {}
    for channel in config.channels:
        channels[channel.name] = Transducer(
            choice=choices[channel.name],
            model_dim=config.dim,
            dim=channel.dim,
            tower=_build_tower(channel.dim, channel.layer or config.layer, channel.stages, **common),
        )
    return MixtureOfTransducers(channels)


def _build_tower(
    dim: int, layer: LayerConfig, stages: Sequence[StageConfig], *, num_context: int, max_len: int
) -> CandidateTower:
    num_layers = sum(stage.num_layers for stage in stages)
    if layer.variant == "softmax":
        return SoftmaxTower(dim=dim, layer=layer, num_layers=num_layers)
    if layer.variant == "last_event":
        return LastEventTower(dim=dim, layer=layer, num_layers=num_layers)
    if layer.variant == "target_attention":
        return TargetAttentionTower(dim=dim, layer=layer, max_len=max_len)
    return build_tower(dim=dim, layer=layer, stages=stages, num_context=num_context, max_len=max_len)
