"""Where each token of a packed batch lies, computed without waiting for the device.

Sequences lie one after another in one tensor of T tokens.  Each holds context, then history (oldest first), then
candidates.  Every size is taken from lengths kept on the host, so that nothing here synchronises with a GPU.

Shapes: B users, T packed tokens, C candidates of all users, D any width.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from attention_kernels.layer.gather import Gather, gather_sum
from attention_kernels.rectangle import Rectangle, make_rectangle
from pipelines.batches.padding import rounded


@dataclass(frozen=True, kw_only=True, slots=True)
class SequenceLayout:
    """The sequences of one packed batch."""

    num_context: int
    """Context tokens at the start of every sequence."""
    history_lens: Tensor
    """History tokens of each sequence, [B] int64, on the device."""
    num_candidates: Tensor
    """Candidate tokens of each sequence, [B] int64, on the device."""
    history_lens_host: Tensor
    """`history_lens` on the CPU."""
    num_candidates_host: Tensor
    """`num_candidates` on the CPU."""
    offsets: Tensor
    """First token of each sequence, then T: [B + 1] int64, on the device."""
    user_T: Tensor
    """The sequence that each token belongs to, [T] int64."""
    index_T: Tensor
    """Each token's index within its sequence, [T] int64."""
    padded: bool = False
    """The last sequence is padding: it fills the batch up to sizes that many batches share."""

    @property
    def num_users(self) -> int:
        """B, the number of sequences."""
        return self.history_lens_host.numel()

    @property
    def num_tokens(self) -> int:
        """T, the number of tokens."""
        return self.user_T.numel()


class EventTimes(NamedTuple):
    """When the events of a packed batch happened, for towers that ask; both [T] int64 seconds."""

    happened: Tensor
    """When each event happened."""
    asked: Tensor
    """The event behind it, which is asked for; of a sequence's last event, its own."""


def make_layout(
    history_lens: Tensor,
    num_candidates: Tensor,
    history_lens_host: Tensor,
    num_candidates_host: Tensor,
    *,
    num_context: int = 0,
    padded: bool = False,
) -> SequenceLayout:
    """The layout of sequences with these lengths."""
    lens = num_context + history_lens + num_candidates
    num_tokens = int((num_context + history_lens_host + num_candidates_host).sum())
    offsets = torch.nn.functional.pad(torch.cumsum(lens, 0), (1, 0))
    user_T = repeat_users(lens, num_tokens)
    return SequenceLayout(
        num_context=num_context,
        history_lens=history_lens,
        num_candidates=num_candidates,
        history_lens_host=history_lens_host,
        num_candidates_host=num_candidates_host,
        offsets=offsets,
        user_T=user_T,
        index_T=torch.arange(num_tokens, device=lens.device) - offsets[user_T],
        padded=padded,
    )


def repeat_users(lens: Tensor, total: int) -> Tensor:
    """User b repeated lens[b] times; `total` is the sum, known on the host."""
    return torch.repeat_interleave(torch.arange(lens.numel(), device=lens.device), lens, output_size=total)


def enumerate_users(lens: Tensor, total: int) -> tuple[Tensor, Tensor]:
    """(user, number among the user's, from 0) of each of lens[b] rows a user b; `total` is their sum."""
    user = repeat_users(lens, total)
    return user, torch.arange(total, device=lens.device) - (torch.cumsum(lens, 0) - lens)[user]


def rectangle_of(layout: SequenceLayout, *, whole: SequenceLayout | None = None) -> Rectangle:
    """The layout's sequences padded to the longest; padding lies outside.

    Of a padded layout, to one of few sizes: batches that share it can share a recording (`sequence_padding`).  A layout
    that holds less than the batch's sequences says which layout is `whole`: batches of one size share the longest
    sequence of that one alone.
    """
    num_users = layout.num_users - layout.padded
    longest = layout.num_context + _longest(whole or layout, num_users)
    return make_rectangle(layout.user_T, layout.index_T, num_users=num_users, longest=longest)


def longest_of(layout: SequenceLayout) -> int:
    """The length of the longest sequence, padding left out; of a padded layout, or a little more (`rectangle_of`)."""
    return layout.num_context + _longest(layout, layout.num_users - layout.padded)


def _longest(layout: SequenceLayout, num_users: int) -> int:
    lens = (layout.history_lens_host + layout.num_candidates_host)[:num_users]
    longest = int(lens.max()) if lens.numel() else 0
    return rounded(longest) if layout.padded else longest


def history_mask(layout: SequenceLayout) -> Tensor:
    """Which tokens are history, [T] bool."""
    index = layout.index_T - layout.num_context
    return (index >= 0) & (index < layout.history_lens[layout.user_T])


def candidate_mask(layout: SequenceLayout) -> Tensor:
    """Which tokens are candidates, [T] bool."""
    return layout.index_T >= layout.num_context + layout.history_lens[layout.user_T]


def history_rows(layout: SequenceLayout) -> Tensor:
    """The rows of all history tokens, in order, [H]."""
    user_H, number_H = enumerate_users(layout.history_lens, int(layout.history_lens_host.sum()))
    return layout.offsets[user_H] + layout.num_context + number_H


def candidate_rows(layout: SequenceLayout) -> Tensor:
    """The rows of all candidate tokens, in order, [C]."""
    user_C, number_C = enumerate_users(layout.num_candidates, int(layout.num_candidates_host.sum()))
    return (layout.offsets[1:] - layout.num_candidates)[user_C] + number_C


def keep_newest(layout: SequenceLayout, keep: int) -> tuple[SequenceLayout, Tensor]:
    """Cut every history to its newest `keep` events.

    Returns the new layout and, for each of its tokens, the token's row in the old one; -1 for padding.
    """
    if layout.padded:
        return _keep_newest_padded(layout, keep)
    new = make_layout(
        layout.history_lens.clamp(max=keep),
        layout.num_candidates,
        layout.history_lens_host.clamp(max=keep),
        layout.num_candidates_host,
        num_context=layout.num_context,
    )
    return new, _rows_before(layout, new)


def _keep_newest_padded(layout: SequenceLayout, keep: int) -> tuple[SequenceLayout, Tensor]:
    """As `keep_newest`, for padded layouts: the number of tokens does not depend on lengths, padding takes the rest."""
    events = min(int(layout.history_lens_host.sum()), keep * (layout.num_users - 1))
    kept, kept_host = (
        torch.cat([lens, events - lens.sum(0, keepdim=True)])
        for lens in (layout.history_lens[:-1].clamp(max=keep), layout.history_lens_host[:-1].clamp(max=keep))
    )
    new = make_layout(
        kept,
        layout.num_candidates,
        kept_host,
        layout.num_candidates_host,
        num_context=layout.num_context,
        padded=True,
    )
    return new, torch.where(new.user_T == layout.num_users - 1, -1, _rows_before(layout, new))


def _rows_before(layout: SequenceLayout, new: SequenceLayout) -> Tensor:
    """The row in `layout` of each token of `new`, which has dropped the oldest events of some histories."""
    dropped = (layout.history_lens - new.history_lens)[new.user_T]
    skip = torch.where(new.index_T >= layout.num_context, dropped, torch.zeros_like(dropped))
    return layout.offsets[new.user_T] + new.index_T + skip


def count_events(history_lens_host: Tensor, keep_host: Tensor) -> Tensor:
    """How many events of each history `keep_events` keeps, [B]."""
    user_H = repeat_users(history_lens_host, keep_host.numel())
    return torch.zeros_like(history_lens_host).index_add_(0, user_H, keep_host.long())


def keep_events(layout: SequenceLayout, keep_host: Tensor) -> tuple[SequenceLayout, Tensor]:
    """Keep the events where `keep_host` is set, [H] bool in host memory over all histories, and all other tokens.

    The choice is made on the host, because it decides sizes.  Returns as `keep_newest` does.
    """
    new_lens = count_events(layout.history_lens_host, keep_host)
    lens = layout.num_context + layout.history_lens_host + layout.num_candidates_host
    before = torch.cumsum(lens, 0) - lens + layout.num_context
    first = before - (torch.cumsum(layout.history_lens_host, 0) - layout.history_lens_host)
    user_H = repeat_users(layout.history_lens_host, keep_host.numel())
    stays = torch.ones(layout.num_tokens, dtype=torch.bool)
    stays[first[user_H] + torch.arange(keep_host.numel())] = keep_host
    device = layout.offsets.device
    new = make_layout(
        to_device(new_lens, device),
        layout.num_candidates,
        new_lens,
        layout.num_candidates_host,
        num_context=layout.num_context,
    )
    return new, to_device(torch.nonzero(stays)[:, 0], device)


def to_device(host: Tensor, device: torch.device) -> Tensor:
    """Copy a CPU tensor to `device`; the CPU does not wait for the copy to a GPU."""
    if device.type == "cuda":
        return host.pin_memory().to(device, non_blocking=True)
    return host.to(device)


def take_rows(x_TD: Tensor, rows: Tensor) -> Tensor:
    """`x_TD[rows]` for rows that are all different, or -1, which gives a row of zeros."""
    taken: Tensor = gather_sum([Gather(source=x_TD, rows=rows, once=True)], x_TD.dtype)
    return taken
