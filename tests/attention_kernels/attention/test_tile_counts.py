"""Sparsity is counted: how many tiles the kernels visit, and how many of them they mask element by element.

A mask that visits too many tiles, or finds none of them full, computes the right numbers slowly; only a count shows it.
Counts are taken where the kernels take them, from the schedule's items through `live_keys`, `live_rows` and `is_full`.
"""

import itertools
from typing import NamedTuple

import pytest
import torch
import triton
import triton.language as tl

from attention_kernels import SemiLocalMask, make_plan, plan_of_newest, plan_of_targets
from attention_kernels.attention.items import load_item
from attention_kernels.attention.schedule import Shape, schedules
from attention_kernels.attention.tiles import is_full, live_keys, live_rows, part_range, partner_start
from attention_kernels.reference import dense_mask
from trainer.models.flops import allowed_pairs

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BLOCK = 16


@triton.jit
def count_kernel(out, table, PARTNER: tl.constexpr, BY_ROWS: tl.constexpr, HAS_LOCAL: tl.constexpr):
    """Of an item: which part of its tile it is, positions of the tile, partner tiles that it visits, full ones."""
    i_item = tl.program_id(0)
    item = load_item(table, i_item)
    bounds, first, last = item.bounds, item.first, item.last
    if BY_ROWS:
        partners = live_keys(first, last, bounds, PARTNER, HAS_LOCAL)
    else:
        partners = live_rows(first, last, bounds, PARTNER, HAS_LOCAL)
    begin, end = part_range(partners, item.part, item.parts, True)
    full = 0
    for j in range(begin, end):
        other = partner_start(j, partners, PARTNER)
        if BY_ROWS:
            tile_is_full = is_full(first, last, other, other + PARTNER, bounds, HAS_LOCAL)
        else:
            tile_is_full = is_full(other, other + PARTNER, first, last, bounds, HAS_LOCAL)
        full += tile_is_full.to(tl.int32)
    tl.store(out + i_item * 4, item.part)
    tl.store(out + i_item * 4 + 1, last - first)
    tl.store(out + i_item * 4 + 2, end - begin)
    tl.store(out + i_item * 4 + 3, full)


class Counts(NamedTuple):
    """Of a batch and one kind of tiles."""

    live: int
    """(tile, partner tile) pairs that are visited."""
    full: int
    """Those that need no mask."""
    pairs: int
    """(query, key) pairs that are computed, the forbidden ones included."""
    tiles: int
    """Tiles, parts of one not counted apart."""


def count(
    mask: SemiLocalMask,
    sequences: list[tuple[int, int]],
    *,
    by_rows: bool,
    block: int = BLOCK,
    partner: int = BLOCK,
    newest: int | None = None,
) -> Counts:
    """Counts of a batch of sequences, (history, candidates) each, by row tiles or key tiles; `newest` as in `walks`."""
    out = walks(mask, sequences, by_rows=by_rows, block=block, partner=partner, newest=newest)
    return Counts(
        live=int(out[:, 2].sum()),
        full=int(out[:, 3].sum()),
        pairs=int((out[:, 1] * out[:, 2]).sum()) * partner,
        tiles=int((out[:, 0] == 0).sum()),
    )


def walks(
    mask: SemiLocalMask,
    sequences: list[tuple[int, int]],
    *,
    by_rows: bool,
    block: int = BLOCK,
    partner: int = BLOCK,
    newest: int | None = None,
) -> torch.Tensor:
    """[items, 4] what `count_kernel` tells of each item of the schedule, in its order.

    Of all rows, or of targets, the `newest` events and context, or for 0 of targets alone.
    """
    lengths = [mask.num_context + h + t for h, t in sequences]
    offsets = torch.tensor([0, *itertools.accumulate(lengths)], device=DEVICE)
    plan = make_plan(offsets, mask, num_targets=torch.tensor([t for _, t in sequences], device=DEVICE), max_len=10000)
    num_rows = sum(lengths)
    if newest is not None:
        plan = plan_of_newest(plan, newest) if newest else plan_of_targets(plan)
        num_rows = int(plan.row_offsets[-1])
    shape = Shape(num_rows=num_rows, num_positions=sum(lengths), num_heads=1, split_programs=16, position_bytes=1024)
    rows, keys = schedules(plan, shape, row_block=block if by_rows else None, key_block=None if by_rows else block)
    tiles = rows if by_rows else keys
    assert tiles is not None
    items = int(tiles.table[0])
    out = torch.zeros(items, 4, dtype=torch.int32, device=DEVICE)
    has_local = plan.mask.local is not None
    count_kernel[(items,)](out, tiles.table, PARTNER=partner, BY_ROWS=by_rows, HAS_LOCAL=has_local)
    return out


def grid_counts(mask: SemiLocalMask, h: int, t: int, *, left_out: int = 0) -> tuple[int, int]:
    """(live, full) tiles of the mask itself, cut at multiples of a block: those with an allowed pair, with no other;
    without the rows of so many oldest events."""
    allowed = dense_mask(mask, h, t)
    allowed[mask.num_context : mask.num_context + left_out] = False
    size = allowed.shape[0] // BLOCK
    tiles = allowed.view(size, BLOCK, size, BLOCK).transpose(1, 2).flatten(2)
    return int(tiles.any(2).sum()), int(tiles.all(2).sum())


def triangle(count: int) -> int:
    return count * (count + 1) // 2


M, W, G = 14, 3, 4
"""Blocks of a sequence, of the window, of the global rows."""


@pytest.mark.parametrize("by_rows", [True, False])
@pytest.mark.parametrize(
    ("mask", "live", "full"),
    [
        # The diagonal's tiles are masked, all before it are full.
        (SemiLocalMask(), triangle(M), triangle(M - 1)),
        # W + 1 tiles a tile, of which the diagonal's and the band's oldest are masked; fewer at the start.
        (
            SemiLocalMask(local=W * BLOCK),
            sum(min(i, W) + 1 for i in range(M)),
            sum(min(i, W - 1) for i in range(M)),
        ),
        # The last G tiles see all before them.
        (
            SemiLocalMask(local=W * BLOCK, global_rows=G * BLOCK),
            sum(min(i, W) + 1 for i in range(M - G)) + triangle(M) - triangle(M - G),
            sum(min(i, W - 1) for i in range(M - G)) + triangle(M - 1) - triangle(M - G - 1),
        ),
        # A window of nothing: the diagonal alone.
        (SemiLocalMask(local=0), M, 0),
    ],
    ids=["full causal", "local", "semi-local", "local 0"],
)
def test_tiles_are_as_many_as_the_closed_form(mask: SemiLocalMask, live: int, full: int, by_rows: bool) -> None:
    counts = count(mask, [(M * BLOCK, 0)], by_rows=by_rows)
    assert (counts.live, counts.full) == (live, full) == grid_counts(mask, M * BLOCK, 0)


@pytest.mark.parametrize("by_rows", [True, False])
@pytest.mark.parametrize(
    ("mask", "h", "t"),
    [
        (SemiLocalMask(num_context=BLOCK), 8, 0),
        (SemiLocalMask(), 8, 2),
        (SemiLocalMask(local=2 * BLOCK, global_columns=2 * BLOCK), 10, 0),
        (SemiLocalMask(local=2 * BLOCK, num_context=2 * BLOCK), 10, 2),
        (SemiLocalMask(local=2 * BLOCK, global_rows=2 * BLOCK, global_columns=BLOCK, num_context=BLOCK), 10, 2),
    ],
    ids=["context", "candidates", "columns", "context and candidates", "everything"],
)
def test_aligned_sequences_visit_the_tiles_that_the_mask_needs(
    mask: SemiLocalMask, h: int, t: int, by_rows: bool
) -> None:
    """Where every boundary is a multiple of a block, not one tile more than those that hold an allowed pair."""
    counts = count(mask, [(h * BLOCK, t * BLOCK)], by_rows=by_rows)
    assert (counts.live, counts.full) == grid_counts(mask, h * BLOCK, t * BLOCK)


@pytest.mark.parametrize("by_rows", [True, False])
def test_a_window_of_256_costs_five_tiles_of_64_of_which_three_are_full(by_rows: bool) -> None:
    mask = SemiLocalMask(local=256)
    short, long = (count(mask, [(n, 0)], by_rows=by_rows, block=64, partner=64) for n in (1024, 1024 + 640))
    assert long.tiles - short.tiles == 10
    assert long.live - short.live == 10 * 5
    assert long.full - short.full == 10 * 3


@pytest.mark.parametrize("by_rows", [True, False])
@pytest.mark.parametrize(
    "mask",
    [
        SemiLocalMask(),
        SemiLocalMask(local=33),
        SemiLocalMask(local=40, global_rows=50),
        SemiLocalMask(local=33, global_columns=21),
        SemiLocalMask(local=40, global_rows=50, global_columns=21, num_context=5),
    ],
    ids=["full causal", "local", "semi-local", "columns", "everything"],
)
def test_pairs_computed_are_the_allowed_ones_and_the_edges_of_tiles(mask: SemiLocalMask, by_rows: bool) -> None:
    """A tile of R positions sees up to three runs of partners, each rounded up to whole blocks; a run that follows
    the diagonal is R wider for all of the tile than for one of its positions, at either end.

    So beside the allowed pairs a tile computes at most R x (3 blocks + 2 R) others, however long the sequence is.
    """
    sequences = [(700, 3), (0, 0), (1, 1), (333, 20), (64, 0)]
    counts = count(mask, sequences, by_rows=by_rows)
    fields = {"num_context": mask.num_context, "local": mask.local}
    fields |= {"global_rows": mask.global_rows, "global_columns": mask.global_columns}
    needed = sum(int(allowed_pairs(h, t, **fields)) for h, t in sequences)
    assert needed <= counts.pairs <= needed + counts.tiles * BLOCK * (3 * BLOCK + 2 * BLOCK)


@pytest.mark.parametrize("by_rows", [True, False])
@pytest.mark.parametrize("mask", [SemiLocalMask(local=20), SemiLocalMask(local=20, global_rows=32, num_context=3)])
def test_a_band_costs_the_same_for_every_event(mask: SemiLocalMask, by_rows: bool) -> None:
    """With a window, so many more events are so many more tiles of the same cost, at any length; global rows add the
    tiles of their own width."""
    step = 20 * BLOCK
    lengths = [step, 2 * step, 3 * step]
    counts = [count(mask, [(n, 0)], by_rows=by_rows) for n in lengths]
    first, second = counts[1].live - counts[0].live, counts[2].live - counts[1].live
    assert first == second
    # A tile's window of 20 and its own 16 positions touch three blocks; rows or keys that are paired with all, 35 more.
    wide = 0 if mask.global_rows == 0 else 3 + 3
    assert first <= 20 * (3 + wide)


@pytest.mark.parametrize("by_rows", [True, False])
def test_most_tiles_of_a_long_sequence_are_full(by_rows: bool) -> None:
    """Per tile at most two partners are masked without a window: the diagonal's, and one where the sequence ends."""
    counts = count(SemiLocalMask(), [(700, 0), (217, 5)], by_rows=by_rows)
    assert counts.live - 2 * counts.tiles <= counts.full < counts.live


@pytest.mark.parametrize("mask", [SemiLocalMask(num_context=BLOCK), SemiLocalMask(local=BLOCK, num_context=BLOCK)])
def test_targets_alone_cost_their_own_tiles(mask: SemiLocalMask) -> None:
    """Whatever the mask, a tile of targets sees all tiles before the targets, and its own."""
    h, t = 6, 2
    by_rows, by_keys = (count(mask, [(h * BLOCK, t * BLOCK)], by_rows=rows, newest=0) for rows in (True, False))
    assert by_rows.tiles == t and by_keys.tiles == 1 + h + t
    assert by_rows.live == by_keys.live == t * (1 + h + 1)
    assert by_rows.full == by_keys.full == t * (1 + h)


@pytest.mark.parametrize("by_rows", [True, False])
@pytest.mark.parametrize(
    "mask",
    [
        SemiLocalMask(num_context=BLOCK),
        SemiLocalMask(local=2 * BLOCK, global_rows=BLOCK, num_context=BLOCK),
        SemiLocalMask(local=BLOCK, global_rows=6 * BLOCK, global_columns=2 * BLOCK),
    ],
    ids=["full causal", "semi-local", "more global rows, columns"],
)
def test_the_newest_alone_cost_their_own_tiles(mask: SemiLocalMask, by_rows: bool) -> None:
    """Not one of a row that is left out, and as many as before of the others."""
    h, kept, t = 10, 4, 2
    counts = count(mask, [(h * BLOCK, t * BLOCK)], by_rows=by_rows, newest=kept * BLOCK)
    assert (counts.live, counts.full) == grid_counts(mask, h * BLOCK, t * BLOCK, left_out=(h - kept) * BLOCK)


@pytest.mark.parametrize("by_rows", [True, False])
def test_parts_of_a_split_tile_share_its_partners_evenly(by_rows: bool) -> None:
    mask = SemiLocalMask(local=20, global_rows=BLOCK, global_columns=BLOCK)
    parts = walks(mask, [(96 * BLOCK, 0)], by_rows=by_rows)[:, [0, 2]].tolist()
    tiles: list[list[int]] = []
    for part, visited in parts:
        tiles += [[]] if part == 0 else []
        tiles[-1].append(visited)
    split = [visited for visited in tiles if len(visited) > 1]
    assert split
    assert all(max(visited) - min(visited) <= 1 for visited in split)
