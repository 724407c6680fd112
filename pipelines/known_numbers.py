"""What `dataset.json` says of a column of numbers.  Standard library only."""

import itertools
from dataclasses import asdict, dataclass
from typing import Any

LARGEST = float.fromhex("0x1.fffffep+127")
"""The largest number of 32 bits, in which models read numbers."""


@dataclass(frozen=True, kw_only=True, slots=True)
class NumberStatistics:
    """What the training part of the data says of a column of numbers."""

    count: int
    """Values that are not missing."""
    missing: int
    """How many values are missing."""
    mean: float
    """Mean of the known values."""
    std: float
    """Standard deviation of the known values."""
    quantiles: tuple[float, ...]
    """Quantiles of the known values at equal steps of probability, from the smallest to the largest value."""

    def as_dict(self) -> dict[str, Any]:
        """What `parse_statistics` reads back."""
        return {**asdict(self), "quantiles": list(self.quantiles)}


def parse_statistics(entry: Any, where: str) -> NumberStatistics:
    """What is known of a column of numbers."""
    try:
        quantiles = tuple(float(value) for value in entry["quantiles"])
        known = NumberStatistics(
            count=int(entry["count"]),
            missing=int(entry["missing"]),
            mean=float(entry["mean"]),
            std=float(entry["std"]),
            quantiles=quantiles,
        )
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{where} must give count, missing, mean, std and quantiles as numbers: {error!r}") from None
    if any(right < left for left, right in itertools.pairwise(quantiles)) or known.std < 0:
        raise ValueError(f"{where}: quantiles must not fall and std must not be negative")
    return known
