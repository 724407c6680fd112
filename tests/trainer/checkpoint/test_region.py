"""Boxes against sets of indices."""

from itertools import product

from hypothesis import given
from hypothesis import strategies as st

from trainer.checkpoint.region import Region

SIDE = st.tuples(st.integers(0, 3), st.integers(0, 3))


def indices(region: Region) -> set[tuple[int, ...]]:
    return set(product(*(range(o, o + n) for o, n in zip(region.offsets, region.sizes, strict=True))))


@given(sides=st.lists(st.tuples(SIDE, SIDE), max_size=3))
def test_the_overlap_is_what_both_hold(sides: list[tuple[tuple[int, int], tuple[int, int]]]) -> None:
    one, other = (Region(tuple(side[k][0] for side in sides), tuple(side[k][1] for side in sides)) for k in range(2))
    common = indices(one) & indices(other)
    overlap = one.overlap(other)
    assert (set() if overlap is None else indices(overlap)) == common
    assert len(indices(one)) == one.numel
