"""Where the buckets of numbers end.  Standard library only."""

from collections.abc import Sequence

from pipelines.selection import Feature
from trainer.models.config import InputConfig, NumberConfig


def bucket_borders(features: Sequence[Feature], config: InputConfig) -> list[tuple[float, ...]]:
    """The rising borders of each number's buckets; a bucket more than borders."""
    return [_borders(feature, config.numbers.get(feature.name, NumberConfig())) for feature in features]


def num_vectors(borders: Sequence[Sequence[float]]) -> int:
    """Vectors of numbers that are encoded together: each has as many as the one with most borders, for its buckets and
    for what is missing."""
    return len(borders) * (max(map(len, borders), default=0) + 2)


def _borders(feature: Feature, number: NumberConfig) -> tuple[float, ...]:
    if number.thresholds:
        return number.thresholds
    quantiles = feature.statistics.quantiles if feature.statistics is not None else ()
    inner = [
        quantiles[round(place * (len(quantiles) - 1) / number.buckets)]
        for place in range(1, number.buckets)
        if len(quantiles) > 1
    ]
    # The smallest value is no border: everything would lie above it.
    return tuple(sorted({value for value in inner if value > quantiles[0]}))
