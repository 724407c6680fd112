"""From looked-up rows to tokens: columns and action merged, time, position, context tokens in front.

Nothing of a candidate but its own columns and its own time enters its token, and nothing of a candidate enters any
other token: scores do not depend on which candidates are asked for together.

Shapes: B users, H events of all histories, C candidates, T packed tokens, D model width, A action bits.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchrec.sparse.jagged_tensor import JaggedTensor

from attention_kernels.layer.gather import Gather, gather_sum
from attention_kernels.relative_bias import log_bucket
from pipelines.batches.batch import Inputs
from pipelines.features import UNKNOWN_TIME, Part
from pipelines.selection import Feature, Selection
from trainer.models.config import InputConfig
from trainer.models.layout import SequenceLayout, candidate_mask, history_mask, make_layout
from trainer.models.precision import compute_dtype
from trainer.models.rows import RowEncoder, combine, learned_vectors


class InputEncoder(nn.Module):
    """Tokens of a batch: `forward` returns them packed, with their layout.

    Interleaved, both tokens of an event carry its position and its time.

    Args:
        selection: the features; those of samples become one token each, before the history, or parts of candidates.
        widths: width of each space's table.
        config: how they enter.
        dim: D.
        num_actions: A.
        pooled: spaces whose tables give sums in the place of many ids' rows.
    """

    action_bits: Tensor

    def __init__(
        self,
        selection: Selection,
        *,
        widths: Mapping[str, int],
        config: InputConfig,
        dim: int,
        num_actions: int,
        pooled: Collection[str] = (),
    ) -> None:
        super().__init__()
        self.interleave, self.causal = config.merge == "interleave", config.causal
        self.dropout = config.dropout
        self.cast_first = frozenset(each.name for each in selection.features if each.kind == "id")
        """Features whose rows are cast to the type of computation before all else: those of many ids are added up."""

        def encoder(features: Sequence[Feature]) -> RowEncoder:
            return RowEncoder(features, widths=widths, config=config, dim=dim, pooled=pooled)

        def if_any(*parts: Part) -> RowEncoder | None:
            features = selection.of(*parts)
            return encoder(features) if features else None

        self.shared = if_any("event", "candidate")
        self.of_events = if_any("event")
        self.of_candidates = if_any("candidate")
        # One vector for "something happened" (an impression without any action is an event), then one a bit.
        self.action_vectors = learned_vectors(1 + num_actions, dim)
        self.candidate_action = learned_vectors(1, dim) if config.candidate_action == "learned" else None
        # Row 0 is for candidates, which have no position.
        self.position_vectors = learned_vectors(1 + config.num_positions, dim)
        # Row 0 is for events whose time is unknown.
        self.age_vectors = learned_vectors(1 + config.num_time_buckets, dim)
        self.candidate_gap_vectors = learned_vectors(1 + config.num_time_buckets, dim)
        self.context = nn.ModuleList(encoder([feature]) for feature in selection.of("sample"))
        self.num_context = num_context(selection, config)
        self.context_vectors = learned_vectors(self.num_context, dim) if self.num_context else None
        self.register_buffer("action_bits", torch.arange(num_actions, dtype=torch.int32), persistent=False)

    def forward(
        self, embedded: Mapping[str, JaggedTensor], inputs: Inputs, of_candidates: Tensor | None = None
    ) -> tuple[Tensor, SequenceLayout]:
        """Returns the tokens [T, D] in the type of computation, and their layout.

        `of_candidates` [C, D] is added to candidates' tokens.
        """
        dtype = compute_dtype(self.position_vectors)
        tokens = _pack(inputs, self.num_context, interleave=self.interleave)
        gathers = [
            Gather(source=self.position_vectors, rows=self._positions(tokens), once=False),
            # One table of both kinds of distance: rows of candidates follow those of events.
            Gather(
                source=torch.cat([self.age_vectors, self.candidate_gap_vectors]),
                rows=self._times(tokens, inputs),
                once=False,
            ),
            self._own(embedded, inputs, tokens, dtype, of_candidates),
        ]
        if self.shared is not None:
            rows_T = torch.where(tokens.is_action, -1, tokens.rows) if self.interleave else tokens.rows
            gathers.append(Gather(source=self.shared(embedded, inputs, dtype), rows=rows_T, once=True))
        if self.context:
            context_BCD = torch.stack([encoder(embedded, inputs, dtype) for encoder in self.context], dim=1)
            gathers.append(self._of_samples(context_BCD, tokens, dtype))
        return F.dropout(gather_sum(gathers, dtype), self.dropout, self.training), tokens.layout

    def longest(self, inputs: Inputs) -> int:
        """Tokens of the batch's longest sequence; 0 for an empty batch."""
        events, candidates = inputs.history_lens_host, inputs.num_candidates_host
        lens = self.num_context + (2 if self.interleave else 1) * events + candidates
        lens = lens[: lens.numel() - inputs.padded]
        return int(lens.max()) if lens.numel() else 0

    def _of_samples(self, context_BCD: Tensor, tokens: "_Tokens", dtype: torch.dtype) -> Gather:
        """What a sample's columns say, as tokens of their own or at its candidates."""
        if self.context_vectors is None:
            rows_T = torch.where(tokens.is_candidate, tokens.layout.user_T, -1)
            return Gather(source=context_BCD.sum(1), rows=rows_T, once=False)
        context_BCD = context_BCD + self.context_vectors.to(dtype)
        return Gather(source=context_BCD.flatten(0, 1), rows=tokens.context_rows, once=True)

    def _positions(self, tokens: "_Tokens") -> Tensor:
        """Row of every token in the table of positions, [T]; -1 for context."""
        last = self.position_vectors.shape[0] - 1
        place_T = 1 + tokens.event if self.causal else tokens.num_events - tokens.event
        position_T = torch.where(tokens.is_candidate, 0, place_T.clamp(max=last))
        return torch.where(tokens.rows < 0, -1, position_T)

    def _times(self, tokens: "_Tokens", inputs: Inputs) -> Tensor:
        """Row of every token in the tables of times, [T]; -1 for context."""
        # The newest event's: times of a history do not fall, and unknown ones come first.
        last_B = torch.cumsum(inputs.history_lens, 0) - 1
        timestamp_S = F.pad(inputs.timestamp, (1, 0), value=UNKNOWN_TIME)
        newest_T = timestamp_S[torch.where(inputs.history_lens > 0, 1 + last_B, 0)][tokens.layout.user_T]
        time_T, other_T = timestamp_S[1 + tokens.rows], newest_T
        distance_T = torch.where(tokens.is_candidate, time_T - newest_T, newest_T - time_T)
        if self.causal:
            before_T = torch.where(tokens.event > 0, timestamp_S[tokens.rows], UNKNOWN_TIME)
            other_T = torch.where(tokens.is_candidate, newest_T, before_T)
            distance_T = time_T - other_T
        bucket_T = 1 + log_bucket(distance_T, self.age_vectors.shape[0] - 1)
        bucket_T = torch.where((time_T != UNKNOWN_TIME) & (other_T != UNKNOWN_TIME), bucket_T, 0)
        bucket_T = bucket_T + tokens.is_candidate * self.age_vectors.shape[0]
        return torch.where(tokens.rows < 0, -1, bucket_T)

    def _own(
        self,
        embedded: Mapping[str, JaggedTensor],
        inputs: Inputs,
        tokens: "_Tokens",
        dtype: torch.dtype,
        of_candidates: Tensor | None,
    ) -> Gather:
        """What events and candidates do not share: actions and columns of events, then columns of candidates."""
        bits_HA = inputs.action[:, None] >> self.action_bits & 1
        bits_HA = torch.cat([torch.ones_like(bits_HA[:, :1]), bits_HA], dim=1)
        source_ND = combine(bits_HA.to(dtype), self.action_vectors)
        if self.of_events is not None:
            source_ND = source_ND + self.of_events(embedded, inputs, dtype)
        rows_T = torch.where(tokens.is_action, tokens.rows, -1)
        candidates = [] if of_candidates is None else [of_candidates.to(dtype)]
        if self.of_candidates is not None:
            candidates.append(self.of_candidates(embedded, inputs, dtype))
        if self.candidate_action is not None:
            count = int(inputs.num_candidates_host.sum())
            candidates.append(self.candidate_action.to(dtype).expand(count, -1))
        if candidates:
            source_ND = torch.cat([source_ND, torch.stack(candidates).sum(0)])
            rows_T = torch.where(tokens.is_candidate, tokens.rows, rows_T)
        return Gather(source=source_ND, rows=rows_T, once=True)


def num_context(selection: Selection, config: InputConfig) -> int:
    """Context tokens of a sample."""
    return 0 if config.causal else len(selection.of("sample"))


@dataclass(frozen=True, kw_only=True, slots=True)
class _Tokens:
    """What each token stands for; all tensors [T]."""

    layout: SequenceLayout
    """Where each token lies."""
    rows: Tensor
    """The event or candidate, as a row of all events and then all candidates; -1 for context."""
    event: Tensor
    """The event's place in its history."""
    num_events: Tensor
    """Events of the token's history."""
    is_candidate: Tensor
    """Whether the token is a candidate."""
    is_action: Tensor
    """Whether it carries an event's action: every event where merged, its second token where interleaved."""
    context_rows: Tensor
    """The context token, user by user; -1 for the others."""


def _pack(inputs: Inputs, num_context: int, *, interleave: bool) -> _Tokens:
    """Put context in front and, interleaving, an action token behind every event's first token."""
    factor = 2 if interleave else 1
    layout = make_layout(
        factor * inputs.history_lens,
        inputs.num_candidates,
        factor * inputs.history_lens_host,
        inputs.num_candidates_host,
        num_context=num_context,
        padded=inputs.padded,
    )
    user_T, index_T = layout.user_T, layout.index_T - num_context
    is_history_T, is_candidate_T = history_mask(layout), candidate_mask(layout)
    num_events_T = inputs.history_lens[user_T]
    event_T = index_T // factor
    first_event_B = torch.cumsum(inputs.history_lens, 0) - inputs.history_lens
    # Candidates lie behind all events.
    first_candidate_B = int(inputs.history_lens_host.sum()) + torch.cumsum(inputs.num_candidates, 0)
    first_candidate_B = first_candidate_B - inputs.num_candidates
    candidate_T = first_candidate_B[user_T] + index_T - factor * num_events_T
    rows_T = torch.where(is_candidate_T, candidate_T, first_event_B[user_T] + event_T)
    return _Tokens(
        layout=layout,
        rows=torch.where(index_T < 0, -1, rows_T),
        event=event_T,
        num_events=num_events_T,
        is_candidate=is_candidate_T,
        is_action=is_history_T & (index_T % 2 == 1) if interleave else is_history_T,
        context_rows=torch.where(index_T < 0, user_T * num_context + layout.index_T, -1),
    )
