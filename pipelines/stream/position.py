"""Where in the training stream a run stands: plain values that a checkpoint stores as JSON.

A position counts samples of the global order, never ranks, workers or files, so a run resumes on any number of ranks.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True, kw_only=True, slots=True)
class SourcePosition:
    """Progress in one source: a part of the data set, or a data set of a mix."""

    epoch: int = 0
    """Complete passes over the data."""
    sample: int = 0
    """Samples of the current pass that were consumed."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DataPosition:
    """State of the stream after a batch."""

    order: tuple[str, ...]
    """Fingerprints of what decides the order of samples: of the stream (seed, shuffling, mix), then of each source that
    was known so far.  Resuming under others is refused; further parts may follow."""
    vocabularies: Mapping[str, str] = field(default_factory=dict)
    """Digest of the keys behind the ids of each space that has one."""
    sources: tuple[SourcePosition, ...] = (SourcePosition(),)
    """Progress in each part of the data set, or each source of the mix."""
    samples: int = 0
    """Training samples consumed so far."""
    batches: int = 0
    """Global batches consumed so far."""
    target_load: float = 0.0
    """Load-balanced stochastic length: the budget in force, as cost a sample; 0 during warm-up."""
    load_sum: float = 0.0
    """Cost under the plain rule summed over the samples since the budget was last set."""
    load_samples: int = 0
    """Samples that the sum of loads is of."""

    def as_dict(self) -> dict[str, Any]:
        """A JSON-able form that `position_from_dict` reads back."""
        return asdict(self)


def position_from_dict(values: Mapping[str, Any]) -> DataPosition:
    """Rebuild a position from `DataPosition.as_dict`, possibly after a trip through JSON.

    Raises ValueError if a key is unknown or missing.
    """
    expected = set(DataPosition.__dataclass_fields__)
    if set(values) != expected:
        raise ValueError(f"data position must have the keys {sorted(expected)}, got {sorted(values)}")
    sources = tuple(SourcePosition(**source) for source in values["sources"])
    return DataPosition(**{**values, "order": tuple(values["order"]), "sources": sources})
