"""Every allowed pair lies in exactly one live tile, and a tile called full holds allowed pairs only.

How many tiles are live and how many full: `test_tile_counts.py`.
"""

import random

import pytest
import torch
import triton
import triton.language as tl

from attention_kernels import SemiLocalMask
from attention_kernels.attention.items import Bounds
from attention_kernels.attention.tiles import group_keys, group_rows, is_full, live_keys, live_rows
from attention_kernels.reference import dense_mask

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BLOCK = 16
GROUP = 8


@triton.jit
def segments_kernel(
    out, first, last, n, u, c, g, s, r, e, local, BLOCK: tl.constexpr, BY_ROWS: tl.constexpr, HAS_LOCAL: tl.constexpr
):
    bounds = Bounds(n, u, c, g, s, r, e, local)
    if BY_ROWS:
        partners = live_keys(first, last, bounds, BLOCK, HAS_LOCAL)
    else:
        partners = live_rows(first, last, bounds, BLOCK, HAS_LOCAL)
    for i in tl.static_range(6):
        tl.store(out + i, partners[i])


@triton.jit
def groups_kernel(
    out, first, last, n, u, c, g, s, r, e, local,
    BLOCK: tl.constexpr, GROUP: tl.constexpr, GROUPS: tl.constexpr, BY_ROWS: tl.constexpr, HAS_LOCAL: tl.constexpr,
):  # fmt: skip
    """(begin, end) of each group of a tile, among the tile's live partners."""
    bounds = Bounds(n, u, c, g, s, r, e, local)
    for i in range(GROUPS):
        own = first + i * GROUP
        own_last = tl.minimum(own + GROUP, last)
        if BY_ROWS:
            partners = live_keys(first, last, bounds, BLOCK, HAS_LOCAL)
            begin, end = group_keys(own, own_last, partners, bounds, BLOCK, HAS_LOCAL)
        else:
            partners = live_rows(first, last, bounds, BLOCK, HAS_LOCAL)
            begin, end = group_rows(own, own_last, partners, bounds, BLOCK)
        tl.store(out + 2 * i, begin)
        tl.store(out + 2 * i + 1, end)


@triton.jit
def full_kernel(out, row, row_last, key, key_last, n, u, c, g, s, r, e, local, HAS_LOCAL: tl.constexpr):
    tl.store(out, is_full(row, row_last, key, key_last, Bounds(n, u, c, g, s, r, e, local), HAS_LOCAL).to(tl.int32))


def draw(generator: random.Random) -> tuple[SemiLocalMask, int, int]:
    """A mask, a history length and a number of targets, small against the block as often as large."""
    counts = [0, 1, 2, 15, 16, 17, 40]
    mask = SemiLocalMask(num_context=generator.choice(counts))
    if generator.random() < 0.85:
        local, rows, columns, context = (generator.choice(counts) for _ in range(4))
        mask = SemiLocalMask(local=local, global_rows=rows, global_columns=columns, num_context=context)
    return mask, generator.randint(0, 90), generator.choice([0, 0, 1, 3, 20])


@pytest.mark.parametrize("seed", range(12))
def test_live_tiles_cover_every_pair_once(seed: int) -> None:
    mask, h, t = draw(random.Random(seed))
    allowed = dense_mask(mask, h, t)
    n = mask.num_context + h + t
    bounds, classes = sequence(mask, h, t)
    has_local = mask.local is not None
    out, groups = (torch.zeros(size, dtype=torch.int32, device=DEVICE) for size in (6, 4))
    for by_rows, first, last in classes:
        segments_kernel[(1,)](out, first, last, *bounds, BLOCK=BLOCK, BY_ROWS=by_rows, HAS_LOCAL=has_local)
        sizes = {"BLOCK": BLOCK, "GROUP": GROUP, "GROUPS": BLOCK // GROUP}
        groups_kernel[(1,)](groups, first, last, *bounds, **sizes, BY_ROWS=by_rows, HAS_LOCAL=has_local)
        numbers = out.tolist()
        starts = [
            start + i * BLOCK for number, start in zip(numbers[:3], numbers[3:], strict=True) for i in range(number)
        ]
        assert (visits(n, starts)[needed(allowed, by_rows, first, last)] == 1).all(), (mask, h, t, by_rows, first)
        for i in range(BLOCK // GROUP):
            own, own_last = first + i * GROUP, min(first + (i + 1) * GROUP, last)
            begin, end = groups[2 * i : 2 * i + 2].tolist()
            seen = visits(n, starts[begin:end])
            if own >= own_last:
                assert begin >= end
            else:
                assert (seen[needed(allowed, by_rows, own, own_last)] == 1).all(), (mask, h, t, by_rows, own)


@pytest.mark.parametrize(
    ("mask", "by_rows"),
    [
        (SemiLocalMask(), True),
        (SemiLocalMask(), False),
        (SemiLocalMask(num_context=BLOCK), True),
        (SemiLocalMask(local=2 * BLOCK), True),
    ],
    ids=["full causal, rows", "full causal, keys", "context, rows", "local, rows"],
)
def test_a_group_walks_the_tiles_that_it_needs_and_none_of_the_others(mask: SemiLocalMask, by_rows: bool) -> None:
    """Of tiles of two groups, far from the edges, where every boundary is a multiple of a block."""
    has_local, h = mask.local is not None, 12 * BLOCK
    allowed, (bounds, _) = dense_mask(mask, h, 0), sequence(mask, h, 0)
    groups = torch.zeros(4, dtype=torch.int32, device=DEVICE)
    sizes = {"BLOCK": BLOCK, "GROUP": BLOCK, "GROUPS": 2}
    for first in (4 * BLOCK, 6 * BLOCK):
        groups_kernel[(1,)](groups, first, first + 2 * BLOCK, *bounds, **sizes, BY_ROWS=by_rows, HAS_LOCAL=has_local)
        for i, (begin, end) in enumerate(groups.view(2, 2).tolist()):
            own = first + i * BLOCK
            tiles = needed(allowed, by_rows, own, own + BLOCK).view(-1, BLOCK).any(1)
            assert end - begin == int(tiles.sum()), (own, begin, end)


def sequence(mask: SemiLocalMask, h: int, t: int) -> tuple[tuple[int, ...], list[tuple[bool, int, int]]]:
    """(n, u, c, g, s, r, e, local) of a sequence, and its tiles: (whether of rows, first, last)."""
    c, u, n = mask.num_context, mask.num_context + h, mask.num_context + h + t
    has_local = mask.local is not None
    g = max(c, u - mask.global_rows) if has_local else c
    s = c + min(h, mask.global_columns)
    row_classes = [(0, c), (c, g), (g, n)] if has_local else [(0, n)]
    key_classes = [(0, s), (s, n)] if has_local else [(0, n)]
    tiles = [
        (by_rows, first, min(first + BLOCK, end))
        for by_rows, classes in ((True, row_classes), (False, key_classes))
        for begin, end in classes
        for first in range(begin, end, BLOCK)
    ]
    return (n, u, c, g, s, c, c, -1 if mask.local is None else mask.local), tiles


def visits(n: int, starts: list[int]) -> torch.Tensor:
    """How often tiles that begin at `starts` cover each position."""
    counts = torch.zeros(n + 10 * BLOCK, dtype=torch.int64)
    for start in starts:
        counts[start : start + BLOCK] += 1
    return counts[:n]


def needed(allowed: torch.Tensor, by_rows: bool, first: int, last: int) -> torch.Tensor:
    """Which positions the rows (or keys) first..last-1 are paired with."""
    return allowed[first:last].any(0) if by_rows else allowed[:, first:last].any(1)


@pytest.mark.parametrize("seed", range(12))
def test_full_tiles_hold_allowed_pairs_only(seed: int) -> None:
    """And a tile of one class of rows and one of keys is called full wherever it could be."""
    generator = random.Random(seed)
    mask, h, t = draw(generator)
    allowed = dense_mask(mask, h, t)
    c, u, n = mask.num_context, mask.num_context + h, mask.num_context + h + t
    has_local = mask.local is not None
    g = max(c, u - mask.global_rows) if has_local else c
    bounds = (n, u, c, g, c + min(h, mask.global_columns), c, c, mask.local if has_local else -1)
    out = torch.zeros(1, dtype=torch.int32, device=DEVICE)
    for _ in range(20 if n else 0):
        row, key = generator.randrange(n), generator.randrange(n)
        tile = allowed[row : row + BLOCK, key : key + BLOCK]
        full_kernel[(1,)](out, row, row + BLOCK, key, key + BLOCK, *bounds, HAS_LOCAL=has_local)
        allowed_only = tile.shape == (BLOCK, BLOCK) and bool(tile.all())
        if out.item():
            assert allowed_only, (mask, h, t, row, key)
        elif not crosses(row, (c, g, u)) and not crosses(key, (c, bounds[4], u)):
            assert not allowed_only, (mask, h, t, row, key)


def crosses(first: int, boundaries: tuple[int, ...]) -> bool:
    """Whether a block that starts there holds positions of two classes."""
    return any(first < boundary < first + BLOCK for boundary in boundaries)
