"""What a model is made of.  Standard library only; `build_*` functions elsewhere turn these values into modules."""

import re
from dataclasses import dataclass, field
from typing import Literal

from trainer.labels.config import LabelConfig
from trainer.models.heads.config import MlpConfig, RankHeadConfig
from trainer.models.layer_config import LayerConfig
from trainer.models.retrieval_config import RetrievalConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class StageConfig:
    """A run of layers that see the same tokens through the same mask.  Several stages make attention truncation."""

    num_layers: int
    """Layers of this stage."""
    local: int | None = None
    """K1: how many events back an event sees; null sees its whole past.  Here and below, input.merge=interleave makes
    two events of one: its item and its action."""
    global_rows: int = 0
    """K2: how many of the newest events see their whole past, whatever `local` says."""
    global_columns: int = 0
    """How many of the oldest events are seen by every later one (the prefix reading of "global"; 0 is the paper's)."""
    keep_newest: int | None = None
    """How many of the newest events enter this stage, with all context and candidate tokens; null for all."""

    def __post_init__(self) -> None:
        if self.num_layers < 1:
            raise ValueError(f"stages.num_layers must be at least 1, got {self.num_layers}")
        for name in ("local", "global_rows", "global_columns"):
            value = getattr(self, name)
            if value is not None and value < 0:
                raise ValueError(f"stages.{name} must be at least 0, got {value}")
        if self.keep_newest is not None and self.keep_newest < 1:
            raise ValueError(
                f"stages.keep_newest must be at least 1, or null to keep all events, got {self.keep_newest}"
            )
        if self.local is None and (self.global_rows or self.global_columns):
            raise ValueError(
                f"stages.global_rows={self.global_rows} and stages.global_columns={self.global_columns} have no effect "
                "without stages.local: set local, or set both to 0"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class NumberConfig:
    """How a number is read: as its value, transformed and scaled, and as the bucket that it falls into."""

    transform: Literal["log", "none"] = "log"
    """log: sign(x) * log(1 + |x|), for what spans orders of magnitude.  Both are then shifted and scaled by the
    training split's statistics, where the data set has them."""
    buckets: int = 32
    """At most so many buckets of equally many values, by the training split's quantiles; 1 for none.  A data set
    without statistics gives none."""
    thresholds: tuple[float, ...] = ()
    """Borders of the buckets in the column's own unit (a watch time, a price), rising, instead of quantiles."""

    def __post_init__(self) -> None:
        if self.buckets < 1:
            raise ValueError(f"input.numbers: buckets must be at least 1, got {self.buckets}")
        if list(self.thresholds) != sorted(set(self.thresholds)):
            raise ValueError(f"input.numbers: thresholds must rise, got {self.thresholds}")
        if self.thresholds and self.buckets != 32:
            raise ValueError(f"input.numbers: buckets={self.buckets} has no effect with thresholds: give one of them")


Columns = tuple[str, ...]
"""Names of columns."""


@dataclass(frozen=True, kw_only=True, slots=True)
class InputConfig:
    """Which columns of the data a model reads, and how they become tokens.

    Names are those of `dataset.json`; `item.NAME` takes a column of the event's or candidate's item.  A column that
    events and candidates share has one projection.
    """

    event: Columns | None = None
    """Columns of an event's token, besides its action; null for all that the data set has."""
    candidate: Columns | None = None
    """Columns of a candidate's token; null for all."""
    context: Columns | None = None
    """Columns of a sample: a token each, in front of the history; null for all."""
    counts: Columns | None = None
    """Groups of counts of candidates (`item`, `user`, `user_item`), from whose rates a ranker starts; null for all."""
    numbers: dict[str, NumberConfig] = field(default_factory=dict)
    """How columns of numbers are read, by name (`dwell_s`, `item.price`, `sample.age`); others as NumberConfig()."""
    pooling: dict[str, Literal["mean", "sum"]] = field(default_factory=dict)
    """How the rows of a column of many ids become one, by name; others by their mean."""
    combine: Literal["sum", "mlp"] = "sum"
    """sum: a token is the sum of one projection a column.  mlp: a hidden layer over all columns of a part."""
    merge: Literal["add", "interleave"] = "add"
    """add: one token an event, its columns plus its action.  interleave: a token of the columns that candidates have
    too, then one of the action and the other columns (the baseline; twice the tokens, so `max_len` has to hold twice
    the history)."""
    candidate_action: Literal["zero", "learned"] = "zero"
    """What is added to a candidate in the place of its action: nothing, or one learned vector (with merge=add)."""
    causal: bool = False
    """Whether an event's token depends on nothing that comes later: positions count from the oldest event, times from
    the event before, and columns of a sample, which describe its request, are added to candidates instead of standing
    in front of the history."""
    num_positions: int = 8192
    """Position vectors; an event's position counts back from the newest (with `causal` up from the oldest), and those
    beyond share the last vector."""
    num_time_buckets: int = 128
    """Vectors for the logarithm of an event's age, or with `causal` of its distance from the event before (and, apart,
    of a candidate's distance from the newest event)."""
    dropout: float = 0.0
    """Probability of zeroing an element of the tokens while training."""

    def __post_init__(self) -> None:
        for name in ("event", "candidate", "context", "counts"):
            columns = getattr(self, name)
            if columns is not None and len(set(columns)) != len(columns):
                raise ValueError(f"input.{name} must not name a column twice, got {', '.join(columns)}")
        if self.merge == "interleave" and self.candidate_action == "learned":
            raise ValueError(
                "input.candidate_action=learned has no effect with input.merge=interleave, whose candidates are item "
                "tokens alone: use candidate_action=zero"
            )
        for name in ("num_positions", "num_time_buckets"):
            if getattr(self, name) < 1:
                raise ValueError(f"input.{name} must be at least 1, got {getattr(self, name)}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"input.dropout must lie in [0, 1), got {self.dropout}")


@dataclass(frozen=True, kw_only=True, slots=True)
class ChannelConfig:
    """One transducer of a mixture: its own choice of events, width, depth and masks."""

    name: str
    """The channel's name, unique in the model: letters, digits and underscores."""
    dim: int
    """Width of the channel's tokens."""
    stages: tuple[StageConfig, ...]
    """The channel's layers, stage by stage."""
    layer: LayerConfig | None = None
    """The channel's layer; null for `model.layer`."""
    actions: tuple[str, ...] = ()
    """Keep events with at least one of these actions; empty keeps every event."""
    side: str | None = None
    """Keep events whose value in this column, a number or an id, is neither 0 nor missing (a named sequence); null for
    no such rule."""

    def __post_init__(self) -> None:
        if self.dim < 1:
            raise ValueError(f"channels.dim must be at least 1, got {self.dim}")
        if not self.stages:
            raise ValueError(f"channels: channel {self.name!r} has no stages, give it at least one")
        if not re.fullmatch(r"\w+", self.name, re.ASCII):
            raise ValueError(f"channels: name {self.name!r} must be letters, digits and underscores")
        if len(set(self.actions)) != len(self.actions):
            raise ValueError(
                f"channels: actions of channel {self.name!r} must not repeat one, got {', '.join(self.actions)}"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """The dense model: tokens, tower (or mixture of towers) and heads; a ranker, or with `retrieval` a retriever."""

    dim: int
    """Width of a token."""
    max_len: int
    """The longest sequence of tokens the model ever sees, context and candidates included.  Attention divides by it, so
    it is a constant of the model: the same in training and serving."""
    stages: tuple[StageConfig, ...] = ()
    """The tower's layers; empty if and only if there are channels."""
    layer: LayerConfig = field(default_factory=LayerConfig)
    """The tower's layer, and that of every channel without one of its own."""
    channels: tuple[ChannelConfig, ...] = ()
    """Mixture of Transducers; empty for one tower over all events."""
    input: InputConfig = field(default_factory=InputConfig)
    """How events become tokens."""
    labels: tuple[LabelConfig, ...] | None = None
    """What a ranker predicts of every candidate; null predicts every action of the data set."""
    head: RankHeadConfig = field(default_factory=MlpConfig)
    """From a ranker's output at a candidate to its labels' outputs: {"kind":"mlp"}, {"kind":"experts"}, and settings of
    that kind (`trainer.models.heads.config`)."""
    retrieval: RetrievalConfig | None = None
    """Predict the next item instead of ranking candidates: candidates then count as the newest events, and tokens are
    items and positions alone; with `beside_ranking`, predict it as well as ranking.  Null for a ranker."""

    def __post_init__(self) -> None:
        if self.dim < 1:
            raise ValueError(f"model.dim must be at least 1, got {self.dim}")
        if self.max_len < 1:
            raise ValueError(f"model.max_len must be at least 1, got {self.max_len}")
        if bool(self.stages) == bool(self.channels):
            raise ValueError(
                f"model has {len(self.stages)} stages and {len(self.channels)} channels: give either stages (one "
                "tower) or channels (a mixture of towers)"
            )
        _check_truncation("model.stages", self.stages)
        self._check_channels()
        self._check_labels()
        joint = self.retrieval is not None and self.retrieval.beside_ranking is not None
        if self.retrieval is not None:
            self._check_behind_every_event()
        if joint:
            self._check_joint()
        elif self.retrieval is not None:
            self._check_retriever()
        if joint or self.retrieval is None:
            self._check_ranker()

    @property
    def layers(self) -> tuple[LayerConfig, ...]:
        """The tower's layer, or each channel's."""
        return tuple(channel.layer or self.layer for channel in self.channels) or (self.layer,)

    @property
    def is_rectangular(self) -> bool:
        """Whether the layers pad sequences to the longest of a batch."""
        return any(layer.relative_bias is not None or not layer.is_hstu for layer in self.layers)

    def _check_ranker(self) -> None:
        towers = [(channel.layer or self.layer, channel.stages) for channel in self.channels]
        for layer, stages in towers or [(self.layer, self.stages)]:
            if layer.relative_bias is not None:
                raise ValueError("layer.relative_bias is for retrievers alone: leave it out, or give model.retrieval")
            if not layer.is_hstu and any(stage.local is not None or stage.keep_newest is not None for stage in stages):
                raise ValueError(f"layer.variant={layer.variant} takes no stages.local and no stages.keep_newest")
            if layer.variant == "target_attention" and sum(stage.num_layers for stage in stages) != 1:
                raise ValueError("layer.variant=target_attention has one layer: set stages.num_layers to 1")

    def _check_channels(self) -> None:
        if not self.channels:
            return
        names = [channel.name for channel in self.channels]
        if len(set(names)) != len(names):
            raise ValueError(f"model.channels must have different names, got {', '.join(names)}")
        if self.input.merge == "interleave":
            raise ValueError("model.channels select events, which input.merge=interleave splits in two: use merge=add")
        if self.layer != LayerConfig() and all(channel.layer is not None for channel in self.channels):
            raise ValueError(
                "model.layer has no effect, every one of model.channels has its own: leave the layer out of a channel"
            )
        for channel in self.channels:
            _check_truncation(f"stages of channel {channel.name!r}", channel.stages)

    def _check_labels(self) -> None:
        if self.labels is None:
            return
        if not self.labels:
            raise ValueError("model.labels is empty: name at least one, or null for all actions")
        names = [label.name for label in self.labels]
        if len(set(names)) != len(names):
            raise ValueError(f"model.labels must not repeat a name, got {', '.join(names)}")

    def _check_retriever(self) -> None:
        """A retriever has neither candidates nor labels: settings for them would have no effect."""
        assert self.retrieval is not None
        read = ("num_positions", "dropout", *(("num_time_buckets",) if self.retrieval.read_next_time else ()))
        if self.input != InputConfig(**{name: getattr(self.input, name) for name in read}):
            raise ValueError(f"model.retrieval: of model.input only {', '.join(read)} have an effect, drop the rest")
        if self.is_rectangular and any(stage.local is not None for stage in self.stages):
            raise ValueError("layer.relative_bias and layer.variant=softmax have no windows: stages.local must be null")
        if self.layer.variant in ("last_event", "target_attention"):
            raise ValueError(
                f"layer.variant={self.layer.variant} is for rankers alone: leave it or model.retrieval out"
            )
        for name, unset in (("channels", ()), ("labels", None), ("head", MlpConfig())):
            if getattr(self, name) != unset:
                raise ValueError(f"model.retrieval: model.{name} has no effect on a retriever, leave it out")

    def _check_joint(self) -> None:
        """Nothing of later events may reach what is predicted behind an earlier one."""
        if not self.input.causal:
            raise ValueError(
                "model.retrieval.beside_ranking predicts behind every event, whose token must know of no later one: "
                "set model.input.causal=true"
            )
        if not self.layer.is_hstu:
            raise ValueError(
                f"model.retrieval.beside_ranking has HSTU's layers, not layer.variant={self.layer.variant}"
            )
        if self.channels:
            raise ValueError(
                "model.retrieval.beside_ranking predicts behind every event, which model.channels choose from: give "
                "model.stages instead"
            )

    def _check_behind_every_event(self) -> None:
        if any(stage.keep_newest is not None for stage in self.stages):
            raise ValueError("model.retrieval predicts behind every event: stages.keep_newest must be null")
        if any(stage.global_rows for stage in self.stages):
            raise ValueError(
                "model.retrieval predicts behind every event, and which events are global rows depends on how many "
                "follow them: stages.global_rows must be 0"
            )


def _check_truncation(where: str, stages: tuple[StageConfig, ...]) -> None:
    """A stage cannot keep events that an earlier one dropped."""
    kept: int | None = None
    for stage in stages:
        if stage.keep_newest is not None and kept is not None and stage.keep_newest >= kept:
            raise ValueError(
                f"{where}: keep_newest={stage.keep_newest} has no effect behind a stage that keeps {kept}: lower it "
                "or leave it out"
            )
        kept = kept if stage.keep_newest is None else stage.keep_newest
