"""Device memory that a model takes in a training step besides parameters and tables' buffers, from lengths.  No torch.

Counted: what autograd keeps for the backward pass (a test holds it to what autograd does keep), and on top of it what
the fullest moment of that pass holds: gradients and rebuilt tensors of the layer whose turn it is.
Not counted: schedules and partial sums of the attention kernels, which are small.

Widths are in columns of a token; a value has 2 bytes in bfloat16 and 4 in float32.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from trainer.models.config import ModelConfig, StageConfig
from trainer.models.flops import InputWidths
from trainer.models.layer_config import LayerConfig

_FLOAT_BYTES = 4
_INDEX_BYTES = 8
_GATHERS = 5
"""Index tensors of a token's parts, and its place."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MeanBatch:
    """A rank's samples of a step, taken to be all alike."""

    samples: float
    history: float
    """Events of a sample, as the model receives them."""
    candidates: float
    """Candidates of a sample."""
    num_context: int
    """Context tokens of a sample."""
    value_bytes: int
    """Bytes of a value in the type of computation."""


@dataclass(frozen=True, slots=True)
class Memory:
    """Device memory of a rank, in bytes."""

    kept: float
    """For the backward pass."""
    peak: float
    """At the fullest moment of the backward pass, what is kept included."""

    def __add__(self, other: "Memory") -> "Memory":
        return Memory(self.kept + other.kept, self.peak + other.peak)


def ranker_activations(config: ModelConfig, batch: MeanBatch, *, inputs: InputWidths) -> Memory:
    """What a ranker holds; with `retrieval` beside it the last layer computes all rows (`scoring_activations` are the
    rest)."""
    factor = 2 if config.input.merge == "interleave" else 1
    ends = _encoder_bytes(config, batch, inputs, factor)
    alone = config.retrieval is None
    if config.stages:
        towers = [_tower(config.dim, config.layer, config.stages, batch, factor * batch.history, alone=alone)]
    else:
        towers = []
        for channel in config.channels:
            layer = channel.layer or config.layer
            towers.append(_tower(channel.dim, layer, channel.stages, batch, batch.history, alone=alone))
            if channel.dim != config.dim:
                ends += _tokens(batch, batch.history) * config.dim * batch.value_bytes
    # Channels run side by side.
    return sum(towers, Memory(ends, ends))


def retriever_activations(config: ModelConfig, batch: MeanBatch, *, embedding_dim: int, num_items: int) -> Memory:
    """What a retriever holds, to which candidates are the newest events."""
    assert config.retrieval is not None
    events = batch.history + batch.candidates
    tokens, b = batch.samples * events, batch.value_bytes
    rows = embedding_dim * b if embedding_dim != config.dim else 0
    dropped = config.dim if config.input.dropout else 0
    of_tokens = tokens * (2 * rows + dropped + _INDEX_BYTES)
    ends = scoring_activations(config, batch, embedding_dim=embedding_dim, num_items=num_items)
    ends += Memory(of_tokens, of_tokens)
    if config.layer.variant == "softmax":
        return ends + _rectangular(config, batch, events)
    only_events = MeanBatch(samples=batch.samples, history=events, candidates=0, num_context=0, value_bytes=b)
    tower = _tower(config.dim, config.layer, config.stages, only_events, events, alone=False)
    if config.layer.relative_bias is not None:
        # A byte a pair for all layers; scores' gradients of one.  The longest is taken to be `max_len`.
        pairs = tokens * config.max_len
        tower += Memory(pairs, pairs + pairs * config.layer.num_heads * _FLOAT_BYTES)
    return ends + tower


def scoring_activations(config: ModelConfig, batch: MeanBatch, *, embedding_dim: int, num_items: int) -> Memory:
    """What every event's prediction against its negatives takes: scores, their gradient, both sides in float32.

    Their backward pass comes before the tower's, but what it held may still lie in pieces between what is kept.
    """
    assert config.retrieval is not None
    negatives = num_items if config.retrieval.num_negatives is None else config.retrieval.num_negatives
    predictions = batch.samples * (batch.history + batch.candidates)
    own_items = 1 if config.retrieval.share_negatives else predictions
    # Logits, and which of them are the true item.
    scores = predictions * negatives * (_FLOAT_BYTES + 1 + config.retrieval.similarity.pair_values * _FLOAT_BYTES)
    kept = scores + _FLOAT_BYTES * embedding_dim * (4 * predictions + own_items * negatives)
    return Memory(kept, kept + 2 * _FLOAT_BYTES * predictions * negatives)


def _encoder_bytes(config: ModelConfig, batch: MeanBatch, inputs: InputWidths, factor: int) -> float:
    """What the maps of looked-up columns read, where each token's parts come from, and which of them were dropped."""
    b = batch.value_bytes
    columns = inputs.event * batch.history + (inputs.candidate + inputs.rates) * batch.candidates + inputs.context
    if config.input.combine == "mlp":
        # The hidden layer's input to SiLU: of the columns of events and candidates, and of those of events.
        columns += config.dim * (2 * batch.history + batch.candidates)
    dropped = config.dim if config.input.dropout else 0
    tokens = _tokens(batch, factor * batch.history)
    return batch.samples * columns * b + tokens * (_GATHERS * _INDEX_BYTES + dropped)


def _tokens(batch: MeanBatch, history: float) -> float:
    return batch.samples * (batch.num_context + history + batch.candidates)


def _tower(
    dim: int,
    layer: LayerConfig,
    stages: Sequence[StageConfig],
    batch: MeanBatch,
    history: float,
    *,
    alone: bool,
) -> Memory:
    """All layers: the one before a stage that keeps the newest events computes what it keeps, and `alone`, the last one
    candidates (`layer_at_rows.py`)."""
    b, kept, peak = batch.value_bytes, 0.0, 0.0
    num_layers = sum(stage.num_layers for stage in stages)
    layer_kept, in_turn = _layer_columns(dim, layer)
    keeps = [stage.keep_newest for stage in stages]
    history = min(history, keeps[0] or history)
    for number, (stage, keep) in enumerate(zip(stages, [*keeps[1:], None], strict=True)):
        tokens = _tokens(batch, history)
        layers = [(tokens * b * layer_kept, tokens * b * in_turn)] * stage.num_layers
        if keep is not None:
            history = min(history, keep)
            layers[-1] = _bytes_at_rows(dim, layer, tokens * b, _tokens(batch, history) * b)
        elif number == len(stages) - 1 and alone:
            layers[-1] = _bytes_at_rows(dim, layer, tokens * b, batch.samples * batch.candidates * b)
        for of_layer, turn in layers:
            kept += of_layer
            peak = max(peak, kept + turn)
    # Weights in the type of computation.
    weights = dim * (layer.uvqk_width + layer.output_inputs(dim))
    cast = num_layers * weights * b if b < _FLOAT_BYTES else 0
    return Memory(kept + cast, peak + cast)


def _layer_columns(dim: int, layer: LayerConfig) -> tuple[int, int]:
    """(columns of a token that `layer_function` keeps, columns that its backward pass holds besides)."""
    gate, uvqk, output = layer.gate_width, layer.uvqk_width, layer.output_inputs(dim)
    keeps_slopes = not layer.recompute_uvqk and layer.variant == "paper"
    kept = dim + 2 * gate
    kept += 0 if layer.recompute_normed or layer.fp8 else dim
    kept += 0 if layer.recompute_uvqk else uvqk - gate
    kept += uvqk if keeps_slopes else 0
    kept += 0 if layer.recompute_gated or layer.fp8 else output
    # The gradients of the output, of the residual, and of U, V, Q and K.
    gradients = 2 * dim + (0 if keeps_slopes else uvqk)
    at_gate = gradients + gate + output + (output if layer.recompute_gated or layer.fp8 else 0)
    at_attention = gradients + gate + (uvqk - gate if layer.recompute_uvqk else 0)
    at_attention += dim if layer.recompute_normed or layer.fp8 else 0
    return kept, max(at_gate, at_attention)


def _bytes_at_rows(dim: int, layer: LayerConfig, tokens: float, rows: float) -> tuple[float, float]:
    """Bytes that `layer_at_rows` keeps, and bytes that its backward pass needs besides.  `tokens` and `rows` are the
    bytes of one column of all tokens, and of the rows."""
    gate, value_key, output = layer.gate_width, layer.gate_width + layer.key_width, layer.output_inputs(dim)
    kept = tokens * (dim + (0 if layer.recompute_normed else dim)) + rows * 2 * gate
    at_products = tokens * (2 * dim + 2 * value_key + (dim if layer.recompute_normed else 0))
    return kept, at_products + rows * (2 * value_key + 2 * output + 2 * dim)


def _rectangular(config: ModelConfig, batch: MeanBatch, events: float) -> Memory:
    """A Transformer's layers, which autograd differentiates, over sequences padded to the longest: taken to be
    `max_len`."""
    layer, dim, b = config.layer, config.dim, batch.value_bytes
    gate, key = layer.gate_width, layer.key_width
    tokens, padded = batch.samples * events, batch.samples * config.max_len
    num_layers = sum(stage.num_layers for stage in config.stages)
    dropped = 2 * dim if layer.dropout else 0
    one = tokens * (b * (3 * dim + 2 * key + gate) + _FLOAT_BYTES * 3 * dim + dropped)
    one += padded * b * (2 * key + 2 * gate)
    kept = num_layers * one + tokens * dim * _FLOAT_BYTES
    return Memory(kept, kept + one)
