"""A box of a tensor: which of its values a rank holds, or a file."""

from dataclasses import dataclass
from math import prod


@dataclass(frozen=True, slots=True)
class Region:
    """A box of a tensor; of a scalar, whose tuples are empty, the scalar."""

    offsets: tuple[int, ...]
    """First index in each dimension."""
    sizes: tuple[int, ...]
    """Extent in each dimension."""

    @property
    def numel(self) -> int:
        """How many values lie in it."""
        return prod(self.sizes)

    def overlap(self, other: "Region") -> "Region | None":
        """What both hold; None where that is nothing."""
        first = [max(pair) for pair in zip(self.offsets, other.offsets, strict=True)]
        end = [min(a + m, b + n) for a, m, b, n in zip(*self._bounds(), *other._bounds(), strict=True)]
        sizes = tuple(b - a for a, b in zip(first, end, strict=True))
        return Region(tuple(first), sizes) if all(size > 0 for size in sizes) else None

    def _bounds(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        return self.offsets, self.sizes
