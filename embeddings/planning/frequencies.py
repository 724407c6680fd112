"""How often a table's rows are looked up, hottest first, and how many lookups a cache of them answers.

Standard library only: clusters are planned on machines without torch.
"""

import itertools
import math
from dataclasses import dataclass
from functools import lru_cache

BINS = 16
"""Between two points of the curve the rows are put into so many groups, within which all are taken to be alike."""


@dataclass(frozen=True, slots=True)
class Frequencies:
    """How often rows of a table are looked up: a few points of the curve; between two of them it is a power of the
    number of rows."""

    points: tuple[tuple[float, float], ...]
    """(rows, share): the hottest so many rows get so large a share of all lookups.  Both rise, the last share is 1."""

    def __post_init__(self) -> None:
        rising = all(a[0] < b[0] and a[1] < b[1] for a, b in itertools.pairwise(self.points))
        if not (
            self.points and rising and self.points[0][0] >= 1 and self.points[0][1] > 0 and self.points[-1][1] == 1
        ):
            raise ValueError(
                "frequencies are pairs of rows and their share of the lookups, both rising, from 1 row or more to the "
                f"share 1, got {self.points}"
            )

    def hit_rate(self, cached_rows: float) -> float:
        """Part of the lookups whose row lies in a cache of so many rows, which keeps the last used ones.

        After Che, Tung and Wang, "Hierarchical Web Caching Systems" (IEEE JSAC 2002): a row lies there if it was looked
        up within the last T lookups, where T is such that as many rows were as there is room for.
        """
        return 1.0 if cached_rows >= self.points[-1][0] else _hit_rate(self.points, cached_rows)


def zipf(rows: int, exponent: float) -> Frequencies:
    """Zipf's law: the n-th row is looked up in proportion to 1 / n^exponent.

    Raises:
        ValueError: the exponent is not above 0.
    """
    if not 0 < exponent < math.inf:
        raise ValueError(f"the exponent of Zipf's law must be a number above 0, got {exponent}")
    counts = sorted({min(rows, 2**power) for power in range(rows.bit_length() + 1)})
    sums = [_sum_of_powers(count, exponent) for count in counts]
    points = [(float(count), total / sums[-1]) for count, total in zip(counts, sums, strict=True)]
    # With a large exponent the last rows add nothing that a float could tell.
    return Frequencies((*(point for point in points if point[1] < 1), (points[-1][0], 1.0)))


def _sum_of_powers(count: int, exponent: float) -> float:
    """1 / n^exponent for n from 1 to `count`, added up: the first ones one by one, then by their integral."""
    few = min(count, 100)
    total = math.fsum(math.pow(n, -exponent) for n in range(1, few + 1))
    first, last = few + 0.5, count + 0.5
    if exponent == 1:
        return total + math.log(last / first)
    return total + (math.pow(last, 1 - exponent) - math.pow(first, 1 - exponent)) / (1 - exponent)


@lru_cache(maxsize=4096)
def _hit_rate(points: tuple[tuple[float, float], ...], cached_rows: float) -> float:
    bins = _bins(points)
    low, high = 0.0, 1.0
    while _within(bins, high) < cached_rows:
        high *= 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if _within(bins, middle) < cached_rows else (low, middle)
    return sum(share * -math.expm1(-share / rows * high) for rows, share in bins)


def _within(bins: list[tuple[float, float]], lookups: float) -> float:
    """Rows that so many lookups touch."""
    return sum(rows * -math.expm1(-share / rows * lookups) for rows, share in bins)


def _bins(points: tuple[tuple[float, float], ...]) -> list[tuple[float, float]]:
    """(rows, their share together) of rows that are taken to be alike."""
    bins = [points[0]]
    for (first, first_share), (last, last_share) in itertools.pairwise(points):
        power = math.log(last_share / first_share) / math.log(last / first)
        ends = [first * (last / first) ** (step / BINS) for step in range(BINS + 1)]
        shares = [first_share * (end / first) ** power for end in ends]
        bins += [
            (rows - before, share - share_before)
            for (before, rows), (share_before, share) in zip(
                itertools.pairwise(ends), itertools.pairwise(shares), strict=True
            )
        ]
    return bins
