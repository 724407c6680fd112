"""FLOPs of a model for given lengths, from the (query, key) pairs that its masks allow.  No torch.

Counted: matrix products (2 a multiply-add), and attention as the two products over allowed pairs.  Not counted: norms,
activations, lookups, and whatever is computed twice (recomputation, masked parts of tiles).  A training step counts as
three forward passes.  This is the count behind every MFU in this project.

All functions take one length or a numpy array of lengths, one a sequence.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from pipelines.selection import Feature, Selection
from trainer.models.buckets import bucket_borders, num_vectors
from trainer.models.config import ModelConfig, StageConfig
from trainer.models.layer_config import LayerConfig
from trainer.models.rate_config import rate_width
from trainer.models.retrieval_config import RetrievalConfig

Count = npt.NDArray[np.float64]
Lengths = int | npt.NDArray[np.int64]

TRAINING_FACTOR = 3
"""Forward, gradients of the inputs, gradients of the weights (for attention: forward and twice its products)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FlopCount:
    """Forward FLOPs by kind; arrays hold one entry a sequence."""

    projections: Count
    """The fused U, V, Q, K products of all layers."""
    attention: Count
    """Q K^T and A V over allowed pairs."""
    outputs: Count
    """The output products of all layers."""
    ends: Count
    """What comes before and behind the layers: encoder and head."""

    @property
    def forward(self) -> Count:
        """FLOPs of a forward pass."""
        return self.projections + self.attention + self.outputs + self.ends

    @property
    def training(self) -> Count:
        """FLOPs of a forward and a backward pass."""
        return TRAINING_FACTOR * self.forward


@dataclass(frozen=True, kw_only=True, slots=True)
class InputWidths:
    """How many columns of looked-up rows, numbers and action bits are mapped to the model's width."""

    event: int
    """Columns for an event; for a retriever the width of an item's row."""
    candidate: int
    """Columns for a candidate."""
    context: int
    """Columns for a sample's context tokens together."""
    rates: int = 0
    """Columns for a candidate's rates, which are mapped to its token and to its logits."""


def input_widths(
    selection: Selection, *, widths: Mapping[str, int], config: ModelConfig, num_actions: int
) -> InputWidths:
    """What the encoder maps: a part's features of ids with their tables' widths, a number's value, whether it is known
    and its buckets, action bits."""

    def mapped(features: Sequence[Feature]) -> int:
        ids = [widths[feature.space] for feature in features if feature.space is not None]
        # A single row of the model's width enters as it is.
        if config.input.combine == "sum" and len(features) == 1 and ids == [config.dim]:
            return 0
        hidden = config.dim if config.input.combine == "mlp" and features else 0
        numbers = [feature for feature in features if feature.space is None]
        return sum(ids) + 2 * len(numbers) + num_vectors(bucket_borders(numbers, config.input)) + hidden

    shared = mapped(selection.of("event", "candidate"))
    # One vector for "something happened" and one an action.
    return InputWidths(
        event=shared + mapped(selection.of("event")) + 1 + num_actions,
        candidate=shared + mapped(selection.of("candidate")),
        context=sum(mapped([feature]) for feature in selection.of("sample")),
        rates=rate_width([each.group for each in selection.counts], num_actions),
    )


def allowed_pairs(
    history_len: Lengths,
    num_candidates: Lengths = 0,
    *,
    num_context: int = 0,
    local: int | None = None,
    global_rows: int = 0,
    global_columns: int = 0,
    newest: int | None = None,
) -> Count:
    """(query, key) pairs that the mask allows in a sequence: the sum of `dense_mask`, in closed form; of history
    queries the `newest` alone, if that is given."""
    history = np.asarray(history_len, dtype=np.float64)
    candidates = np.asarray(num_candidates, dtype=np.float64)
    left_out = np.maximum(history - newest, 0) if newest is not None else np.zeros_like(history)
    # Rows 0 .. banded - 1 of the history see a band and the global columns; the others see their whole past.
    banded = np.maximum(history - global_rows, 0) if local is not None else np.zeros_like(history)
    pairs = _first_rows_pairs(history, banded, local, global_columns)
    pairs = pairs - _first_rows_pairs(left_out, np.minimum(banded, left_out), local, global_columns)
    context = num_context * (num_context + history) + (history - left_out) * num_context
    return np.asarray(context + pairs + candidates * (num_context + history + 1))


def _first_rows_pairs(rows: Count, banded: Count, local: int | None, global_columns: int) -> Count:
    """History pairs of the first history queries, of which so many are banded."""
    pairs = _triangle(rows) - _triangle(banded)
    if local is not None:
        pairs = pairs + _triangle(np.minimum(banded, local + 1)) + np.maximum(banded - local - 1, 0) * (local + 1)
        beyond = np.maximum(banded - 1 - local, 0)
        pairs = (
            pairs
            + _triangle(np.minimum(beyond, global_columns))
            + np.maximum(beyond - global_columns, 0) * global_columns
        )
    return pairs


def _triangle(count: Count) -> Count:
    return count * (count + 1) / 2


def layer_flops(
    layer: LayerConfig,
    *,
    dim: int,
    num_tokens: Count | float,
    pairs: Count | float,
    num_rows: Count | float | None = None,
) -> FlopCount:
    """One layer over `num_tokens` tokens with `pairs` allowed pairs, all rows or `num_rows` of which are computed."""
    tokens, pairs = np.asarray(num_tokens, dtype=np.float64), np.asarray(pairs, dtype=np.float64)
    rows = tokens if num_rows is None else np.asarray(num_rows, dtype=np.float64)
    # V and K of all tokens, U and Q of the rows.
    width = layer.gate_width + layer.key_width
    if layer.variant == "target_attention":
        hidden = layer.key_width
        return FlopCount(
            projections=2 * (tokens + rows) * dim * hidden,
            attention=2 * pairs * (dim * hidden + hidden + dim),
            outputs=4 * rows * dim * dim,
            ends=np.zeros_like(tokens),
        )
    # A Transformer has no U; its attention has an output product of that size, and two of the model's width follow.
    output_inputs = layer.output_inputs(dim) if layer.is_hstu else 2 * dim
    return FlopCount(
        projections=2 * (tokens + rows) * dim * width,
        attention=2 * pairs * width,
        outputs=2 * rows * output_inputs * dim,
        ends=np.zeros_like(tokens),
    )


def ranker_flops(
    config: ModelConfig,
    history_len: Lengths,
    num_candidates: Lengths = 1,
    *,
    inputs: InputWidths,
    num_context: int,
    num_outputs: int,
    channel_history_lens: Mapping[str, Lengths] | None = None,
) -> FlopCount:
    """A whole ranker without its tables on sequences with these lengths.

    With `retrieval` beside it the last layer computes all rows (`joint_flops` counts the rest).
    `history_len` counts events as the model receives them (after stochastic length).  `channel_history_lens` gives, by
    channel, the events that it selects; a channel that is not named is taken to select all.
    """
    history = np.asarray(history_len, dtype=np.int64)
    candidates = np.asarray(num_candidates, dtype=np.int64)
    factor = 2 if config.input.merge == "interleave" else 1
    of_candidates = (inputs.candidate + inputs.rates) * candidates
    ends = 2 * config.dim * (inputs.event * history + of_candidates + inputs.context)
    ends = ends + 2 * inputs.rates * num_outputs * candidates
    head_width = sum(channel.dim for channel in config.channels) or config.dim
    ends = ends + candidates * config.head.flops(head_width, num_outputs)
    total = _no_flops(history.shape, ends=np.asarray(ends, dtype=np.float64))
    towers: list[tuple[int, LayerConfig, Sequence[StageConfig], npt.NDArray[np.int64]]]
    towers = [(config.dim, config.layer, config.stages, factor * history)] if config.stages else []
    for channel in config.channels:
        lens = np.asarray((channel_history_lens or {}).get(channel.name, history), dtype=np.int64)
        towers.append((channel.dim, channel.layer or config.layer, channel.stages, lens))
        if channel.dim != config.dim:
            tokens = (num_context + lens + candidates).astype(np.float64)
            extra = np.asarray(2 * config.dim * channel.dim * tokens)
            total = _add(total, _no_flops(lens.shape, ends=extra))
    alone = config.retrieval is None
    for dim, layer, stages, lens in towers:
        total = _add(total, _tower_flops(dim, layer, stages, lens, candidates, num_context, at_candidates=alone))
    return total


def training_flops(
    history_lens: Lengths,
    num_candidates: Lengths,
    *,
    flops: Callable[..., FlopCount],
    channel_history_lens: Mapping[str, Lengths] | None = None,
    attention_cost: float = 1.0,
) -> Count:
    """[samples] FLOPs of a training step by sample, of which those of attention count `attention_cost` times.

    `flops` counts a model's by the lengths, as `ranker_flops` does.  With an `attention_cost` the result measures time
    rather than work.
    """
    count = flops(history_lens, num_candidates, channel_history_lens=channel_history_lens)
    return count.training + TRAINING_FACTOR * (attention_cost - 1) * count.attention


def retriever_flops(
    config: ModelConfig,
    history_len: Lengths,
    num_candidates: Lengths = 0,
    *,
    embedding_dim: int,
    num_items: int,
    channel_history_lens: Mapping[str, Lengths] | None = None,
) -> FlopCount:
    """A retriever, to which candidates are the newest events and which has no channels.

    All but a sample's last event are scored against negatives (all `num_items` for a full softmax) and the next item.
    """
    assert config.retrieval is not None and not channel_history_lens
    events = np.asarray(history_len, dtype=np.int64) + np.asarray(num_candidates, dtype=np.int64)
    maps = 4 * config.dim * embedding_dim if embedding_dim != config.dim else 0
    scores = _scoring_flops(config.retrieval, embedding_dim, num_items) * np.maximum(events - 1, 0)
    ends = _no_flops(events.shape, ends=np.asarray(maps * events + scores, dtype=np.float64))
    none = np.zeros_like(events)
    return _add(ends, _tower_flops(config.dim, config.layer, config.stages, events, none, 0, at_candidates=False))


def joint_flops(
    config: ModelConfig,
    history_len: Lengths,
    num_candidates: Lengths = 1,
    *,
    embedding_dim: int,
    num_items: int,
    **of_ranker: Any,
) -> FlopCount:
    """A ranker, counted with the arguments `of_ranker`, and a head for the next item behind every event."""
    assert config.retrieval is not None
    events = np.asarray(history_len, dtype=np.float64)
    projection = 2 * config.dim * embedding_dim if embedding_dim != config.dim else 0
    ends = (projection + _scoring_flops(config.retrieval, embedding_dim, num_items)) * events
    ranker = ranker_flops(config, history_len, num_candidates, **of_ranker)
    return _add(ranker, _no_flops(events.shape, ends=ends))


def _scoring_flops(config: RetrievalConfig, embedding_dim: int, num_items: int) -> int:
    """FLOPs of a prediction against its negatives and the next item.  The items' side of negatives that a whole batch
    shares is left out: it is small."""
    pairs = (num_items if config.num_negatives is None else config.num_negatives) + 1
    how, own_items = config.similarity, 1 if config.share_negatives else pairs
    query, item, pair = (flops(embedding_dim) for flops in (how.query_flops, how.item_flops, how.pair_flops))
    return query + item * own_items + pair * pairs


def _tower_flops(
    dim: int,
    layer: LayerConfig,
    stages: Sequence[StageConfig],
    history: npt.NDArray[np.int64],
    candidates: npt.NDArray[np.int64],
    num_context: int,
    *,
    at_candidates: bool,
) -> FlopCount:
    """All layers: the one before a stage that keeps the newest events computes what it keeps, and with `at_candidates`
    the last one candidates alone (`layer_at_rows.py`)."""
    if not layer.sees_candidates:
        candidates = np.zeros_like(candidates)
    total = _no_flops(history.shape)
    last = _no_flops(history.shape)
    keeps = [stage.keep_newest for stage in stages]
    if keeps[0] is not None:
        history = np.minimum(history, keeps[0])
    for stage, keep in zip(stages, [*keeps[1:], None], strict=True):
        mask: dict[str, Any] = {"num_context": num_context, "local": stage.local}
        mask |= {"global_rows": stage.global_rows, "global_columns": stage.global_columns}
        tokens = (num_context + history + candidates).astype(np.float64)
        one = layer_flops(layer, dim=dim, num_tokens=tokens, pairs=allowed_pairs(history, candidates, **mask))
        for _ in range(stage.num_layers):
            total, last = _add(total, last), one
        if keep is not None:
            pairs = allowed_pairs(history, candidates, **mask, newest=keep)
            history = np.minimum(history, keep)
            rows = (num_context + history + candidates).astype(np.float64)
            last = layer_flops(layer, dim=dim, num_tokens=tokens, pairs=pairs, num_rows=rows)
    if at_candidates and layer.computes_rows_alone:
        pairs = candidates * (num_context + history + 1.0)
        last = layer_flops(layer, dim=dim, num_tokens=tokens, pairs=pairs, num_rows=candidates.astype(np.float64))
    return _add(total, last)


def _no_flops(shape: tuple[int, ...], ends: Count | None = None) -> FlopCount:
    zeros = np.zeros(shape)
    return FlopCount(projections=zeros, attention=zeros, outputs=zeros, ends=zeros if ends is None else ends)


def _add(left: FlopCount, right: FlopCount) -> FlopCount:
    return FlopCount(
        projections=left.projections + right.projections,
        attention=left.attention + right.attention,
        outputs=left.outputs + right.outputs,
        ends=left.ends + right.ends,
    )
