"""From looked-up rows to tokens: item and action merged, time, position, context tokens in front.

Nothing of a candidate but its own item and its own time enters its token, and nothing of a candidate enters any other
token: scores do not depend on which candidates are asked for together.

Shapes: B users, S item tokens (history and candidates of all users), T packed tokens, D model width, E row width of
the tables, A action bits.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchrec.sparse.jagged_tensor import JaggedTensor

from attention_kernels.gather import Gather, gather_sum
from pipelines.batch import Batch
from trainer.models.config import SideFeatureConfig
from trainer.models.layout import SequenceLayout, candidate_mask, history_mask, make_layout
from trainer.models.precision import compute_dtype

UNKNOWN_TIME = -1
"""Timestamp of an event whose time is not known."""
LOG_BUCKET_WIDTH = 0.301
"""Width of a time bucket in natural logarithms of seconds, as in the HSTU paper: about a factor 1.35."""


class InputEncoder(nn.Module):
    """Tokens of a batch: `forward` returns them packed, with their layout.

    Interleaved, both tokens of an event carry its position and its time.

    Args:
        dim: D.
        embedding_dim: E; equal to `dim`, rows enter as they are, otherwise through one linear map.
        context_names: features that become one token each, before the history.
        num_actions: bits of an action mask.
        interleave: two tokens an event (item, action) in place of their sum.
        learned_candidate_action: a learned vector instead of zero in the place of a candidate's action.
        side_features: further lists of the batch that enter the action.
        num_positions: position vectors.
        num_time_buckets: time vectors, the one for "unknown" not counted.
        dropout: probability of zeroing an element of a token.
    """

    action_bits: Tensor
    thresholds: Tensor

    def __init__(
        self,
        *,
        dim: int,
        embedding_dim: int,
        context_names: tuple[str, ...],
        num_actions: int,
        interleave: bool = False,
        learned_candidate_action: bool = False,
        side_features: tuple[SideFeatureConfig, ...] = (),
        num_positions: int = 8192,
        num_time_buckets: int = 128,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.context_names = context_names
        self.num_actions = num_actions
        self.interleave = interleave
        self.quantities = tuple(feature for feature in side_features if feature.thresholds)
        self.categories = tuple(feature for feature in side_features if feature.buckets is not None)
        self.dropout = dropout
        self.item_projection = nn.Linear(embedding_dim, dim) if embedding_dim != dim else nn.Identity()
        # One row for "something happened" (an impression without any action is an event), one a bit, one a threshold.
        thresholds = [threshold for feature in self.quantities for threshold in feature.thresholds]
        self.action_vectors = _vectors(1 + num_actions + len(thresholds), dim)
        self.category_vectors = nn.ParameterList(_vectors(feature.buckets or 0, dim) for feature in self.categories)
        self.candidate_action = _vectors(1, dim) if learned_candidate_action else None
        # Row 0 is the candidates'.
        self.position_vectors = _vectors(1 + num_positions, dim)
        # Row 0 is the unknown time's.
        self.age_vectors = _vectors(1 + num_time_buckets, dim)
        self.candidate_gap_vectors = _vectors(1 + num_time_buckets, dim)
        self.context_projection = nn.Linear(embedding_dim, dim) if context_names else None
        self.context_vectors = _vectors(len(context_names), dim) if context_names else None
        self.register_buffer("action_bits", torch.arange(num_actions, dtype=torch.int32), persistent=False)
        self.register_buffer("thresholds", torch.tensor(thresholds, dtype=torch.float32), persistent=False)

    def forward(self, embedded: dict[str, JaggedTensor], batch: Batch) -> tuple[Tensor, SequenceLayout]:
        """Returns the tokens [T, D] in the type of computation, and their layout."""
        dtype = compute_dtype(self.position_vectors)
        events = make_layout(
            batch.history_lens, batch.num_candidates, batch.history_lens_host, batch.num_candidates_host
        )
        layout, event_rows_T, item_rows_T, action_rows_T, context_rows_T = _pack(
            events, len(self.context_names), interleave=self.interleave
        )
        position_S, bucket_S = self._positions_and_times(batch, events)
        gathers = [
            Gather(source=self.item_projection(embedded["item_id"].values().to(dtype)), rows=item_rows_T, once=True),
            Gather(source=self._actions(batch, events, dtype), rows=action_rows_T, once=True),
            Gather(source=self.position_vectors, rows=_of_tokens(position_S, event_rows_T), once=False),
            # One table of both kinds of distance: rows of candidates follow those of events.
            Gather(
                source=torch.cat([self.age_vectors, self.candidate_gap_vectors]),
                rows=_of_tokens(bucket_S, event_rows_T),
                once=False,
            ),
        ]
        if self.context_projection is not None:
            gathers.append(Gather(source=self._context(embedded, dtype), rows=context_rows_T, once=True))
        return F.dropout(gather_sum(gathers, dtype), self.dropout, self.training), layout

    def _positions_and_times(self, batch: Batch, events: SequenceLayout) -> tuple[Tensor, Tensor]:
        """Row of every item token in the tables of positions and of times, [S] twice."""
        history_lens_S = events.history_lens[events.user_T]
        is_candidate_S = candidate_mask(events)
        last_position = self.position_vectors.shape[0] - 1
        position_S = torch.where(is_candidate_S, 0, (history_lens_S - events.index_T).clamp(max=last_position))
        newest_S = _newest_time(batch.timestamp, events)[events.user_T]
        known_S = (batch.timestamp != UNKNOWN_TIME) & (newest_S != UNKNOWN_TIME)
        distance_S = torch.where(is_candidate_S, batch.timestamp - newest_S, newest_S - batch.timestamp)
        bucket_S = time_bucket(distance_S, self.age_vectors.shape[0] - 1)
        bucket_S = torch.where(known_S, 1 + bucket_S, 0)
        return position_S, bucket_S + is_candidate_S * self.age_vectors.shape[0]

    def _actions(self, batch: Batch, events: SequenceLayout, dtype: torch.dtype) -> Tensor:
        """The action part of every item token: the vectors of the bits that are on and of the categories, added up;
        nothing of a candidate."""
        is_history_S1 = history_mask(events)[:, None]
        bits = [torch.ones_like(is_history_S1), (batch.action[:, None] >> self.action_bits & 1).bool()]
        counts = [len(feature.thresholds) for feature in self.quantities]
        for feature, thresholds in zip(self.quantities, torch.split(self.thresholds, counts), strict=True):
            bits.append(batch.side[feature.name][:, None] >= thresholds)
        bits_SA = (torch.cat(bits, dim=1) & is_history_S1).to(dtype)
        vectors: Tensor = self.action_vectors
        if self.candidate_action is not None:
            bits_SA = torch.cat([bits_SA, (~is_history_S1).to(dtype)], dim=1)
            vectors = torch.cat([vectors, self.candidate_action])
        actions_SD = bits_SA @ vectors.to(dtype)
        for feature, own_vectors in zip(self.categories, self.category_vectors, strict=True):
            bucket_S = batch.side[feature.name].long() % own_vectors.shape[0]
            actions_SD = actions_SD + F.embedding(bucket_S, own_vectors.to(dtype)) * is_history_S1
        return actions_SD

    def _context(self, embedded: dict[str, JaggedTensor], dtype: torch.dtype) -> Tensor:
        assert self.context_projection is not None and self.context_vectors is not None
        rows_BCE = torch.stack([embedded[name].values() for name in self.context_names], dim=1)
        tokens_BCD: Tensor = self.context_projection(rows_BCE.to(dtype)) + self.context_vectors.to(dtype)
        return tokens_BCD.reshape(-1, tokens_BCD.shape[2])


def time_bucket(seconds: Tensor, num_buckets: int) -> Tensor:
    """Logarithmic bucket of a distance in seconds, in [0, num_buckets); negative distances count as none."""
    bucket = torch.log(seconds.clamp(min=1).float()) / LOG_BUCKET_WIDTH
    return bucket.long().clamp(max=num_buckets - 1)


def _vectors(count: int, dim: int) -> nn.Parameter:
    return nn.Parameter(torch.empty(count, dim).normal_(std=0.02))


def _newest_time(timestamp_S: Tensor, events: SequenceLayout) -> Tensor:
    """Time of each user's newest event with a known time, [B]; UNKNOWN_TIME where there is none."""
    seen_S = torch.where(history_mask(events), timestamp_S, UNKNOWN_TIME)
    newest_B = torch.full_like(events.history_lens, UNKNOWN_TIME)
    return newest_B.scatter_reduce(0, events.user_T, seen_S, "amax")


def _of_tokens(values_S: Tensor, event_rows_T: Tensor) -> Tensor:
    """Each token's value of its event, [T]; -1 where it has none."""
    return F.pad(values_S, (0, 1), value=-1)[event_rows_T]


def _pack(
    events: SequenceLayout, num_context: int, *, interleave: bool
) -> tuple[SequenceLayout, Tensor, Tensor, Tensor, Tensor]:
    """Put context in front and, interleaving, an action token behind every event's item token.

    Returns the layout of the tokens, and of each token the row of its event or candidate, and its rows among item rows,
    action rows and context rows (user by user), -1 where it has none of them.  Merged, they are the event's.
    """
    factor = 2 if interleave else 1
    layout = make_layout(
        factor * events.history_lens,
        events.num_candidates,
        factor * events.history_lens_host,
        events.num_candidates_host,
        num_context=num_context,
    )
    index_T = layout.index_T - num_context
    context_rows_T = torch.where(index_T < 0, layout.user_T * num_context + layout.index_T, -1)
    first_item_T = events.offsets[layout.user_T]
    if not interleave:
        rows_T = torch.where(index_T < 0, -1, first_item_T + index_T)
        return layout, rows_T, rows_T, rows_T, context_rows_T
    is_history_T = history_mask(layout)
    event_T = torch.where(is_history_T, index_T // 2, index_T - events.history_lens[layout.user_T])
    is_action_T = is_history_T & (index_T % 2 == 1)
    rows_T = torch.where(index_T < 0, -1, first_item_T + event_T)
    item_rows_T, action_rows_T = torch.where(is_action_T, -1, rows_T), torch.where(is_action_T, rows_T, -1)
    return layout, rows_T, item_rows_T, action_rows_T, context_rows_T
