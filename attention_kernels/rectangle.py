"""Packed sequences as a rectangle, padded to the longest: for attention whose scores are whole matrices.

Legend: T packed positions, B users, N places of the longest sequence.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True, kw_only=True, slots=True)
class Rectangle:
    """Where each packed position lies in [B, N]."""

    place_T: Tensor
    """user * N + index; B * N for positions of users from B on, which lie outside."""
    num_users: int
    """B, the number of sequences."""
    longest: int
    """N, the length of the longest."""

    def pad(self, x_T: Tensor) -> Tensor:
        """[T, ...] -> [B, N, ...], zero where a sequence has ended."""
        size = self.num_users * self.longest
        padded: Tensor = x_T.new_zeros(size + 1, *x_T.shape[1:]).index_copy(0, self.place_T, x_T)
        by_user: Tensor = padded[:size].unflatten(0, (self.num_users, self.longest))
        return by_user

    def take(self, x_BN: Tensor) -> Tensor:
        """[B, N, W] -> [T, W], zero outside.  Its backward adds up in place: indexing's would sort."""
        return F.pad(x_BN.flatten(0, 1), (0, 0, 0, 1)).index_select(0, self.place_T)


def make_rectangle(user_T: Tensor, index_T: Tensor, *, num_users: int, longest: int) -> Rectangle:
    """The rectangle of the first `num_users` users: whose each position is, and where it stands in its sequence."""
    place_T = torch.where(user_T < num_users, user_T * longest + index_T, num_users * longest)
    return Rectangle(place_T=place_T, num_users=num_users, longest=longest)
