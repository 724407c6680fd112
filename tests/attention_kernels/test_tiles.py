"""Every allowed pair lies in exactly one live tile, and a tile called full holds allowed pairs only."""

import random

import pytest
import torch
import triton
import triton.language as tl

from attention_kernels import SemiLocalMask
from attention_kernels.reference import dense_mask
from attention_kernels.tiles import is_full, live_keys, live_rows

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BLOCK = 16


@triton.jit
def segments_kernel(
    out, first, last, n, u, c, g, s, local, BLOCK: tl.constexpr, BY_ROWS: tl.constexpr, HAS_LOCAL: tl.constexpr
):
    if BY_ROWS:
        num_0, num_1, num_2, start_0, start_1, start_2 = live_keys(first, last, n, u, c, g, s, local, BLOCK, HAS_LOCAL)
    else:
        num_0, num_1, num_2, start_0, start_1, start_2 = live_rows(first, last, n, u, c, g, s, local, BLOCK, HAS_LOCAL)
    tl.store(out, num_0)
    tl.store(out + 1, num_1)
    tl.store(out + 2, num_2)
    tl.store(out + 3, start_0)
    tl.store(out + 4, start_1)
    tl.store(out + 5, start_2)


@triton.jit
def full_kernel(out, row, row_last, key, key_last, n, u, c, g, s, local, HAS_LOCAL: tl.constexpr):
    tl.store(out, is_full(row, row_last, key, key_last, n, u, c, g, s, local, HAS_LOCAL).to(tl.int32))


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
    c, u, n = mask.num_context, mask.num_context + h, mask.num_context + h + t
    has_local = mask.local is not None
    g = max(c, u - mask.global_rows) if has_local else c
    s = c + min(h, mask.global_columns)
    row_classes = [(0, c), (c, g), (g, n)] if has_local else [(0, n)]
    key_classes = [(0, s), (s, n)] if has_local else [(0, n)]
    bounds = (n, u, c, g, s, mask.local if has_local else -1)
    out = torch.zeros(6, dtype=torch.int32, device=DEVICE)
    for by_rows, classes in ((True, row_classes), (False, key_classes)):
        for begin, end in classes:
            for first in range(begin, end, BLOCK):
                last = min(first + BLOCK, end)
                segments_kernel[(1,)](out, first, last, *bounds, BLOCK=BLOCK, BY_ROWS=by_rows, HAS_LOCAL=has_local)
                numbers = out.tolist()
                visits = torch.zeros(n + 10 * BLOCK, dtype=torch.int64)
                for number, start in zip(numbers[:3], numbers[3:], strict=True):
                    visits[start : start + number * BLOCK] += 1
                needed = allowed[first:last].any(0) if by_rows else allowed[:, first:last].any(1)
                assert (visits[:n][needed] == 1).all(), (mask, h, t, by_rows, first, last, numbers)


@pytest.mark.parametrize("seed", range(12))
def test_full_tiles_hold_allowed_pairs_only(seed: int) -> None:
    generator = random.Random(seed)
    mask, h, t = draw(generator)
    allowed = dense_mask(mask, h, t)
    c, u, n = mask.num_context, mask.num_context + h, mask.num_context + h + t
    has_local = mask.local is not None
    g = max(c, u - mask.global_rows) if has_local else c
    bounds = (n, u, c, g, c + min(h, mask.global_columns), mask.local if has_local else -1)
    out = torch.zeros(1, dtype=torch.int32, device=DEVICE)
    for _ in range(20 if n else 0):
        row, key = generator.randrange(n), generator.randrange(n)
        tile = allowed[row : row + BLOCK, key : key + BLOCK]
        full_kernel[(1,)](out, row, row + BLOCK, key, key + BLOCK, *bounds, HAS_LOCAL=has_local)
        if out.item():
            assert tile.shape == (BLOCK, BLOCK) and tile.all(), (mask, h, t, row, key)
