"""What a data set's module says of the tables it has filled."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, kw_only=True, slots=True)
class Description:
    """The part of `dataset.json` that depends on the data set."""

    name: str
    """Short name."""
    num_items: int
    """Item ids lie in [0, num_items)."""
    actions: tuple[str, ...]
    """Names of the bits of `action`."""
    source: str
    """Where the data comes from, with its attribution."""
    licence: str
    """Terms of use."""
    context_features: Mapping[str, int] = field(default_factory=dict)
    """Number of values of each column of `users`, user_id included if it serves as a feature."""
    context_values: Mapping[str, Sequence[str]] = field(default_factory=dict)
    """Values behind the ids 1, 2, ... of a context feature."""
    history_features: tuple[str, ...] = ()
    """Further columns of `events` that go into histories."""
    candidate_features: tuple[str, ...] = ()
    """Further columns of numbers of `events` that go to candidates."""
    details: Mapping[str, Any] = field(default_factory=dict)
    """Whatever else `dataset.json` is to say."""
