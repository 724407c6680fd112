"""The schedule covers every position once, long tiles first, within the bound that needs no lengths."""

import pytest
import torch

from attention_kernels import AttentionPlan, SemiLocalMask, plan_of_targets
from attention_kernels.attention.items import ITEM_SIZE
from attention_kernels.attention.schedule import Shape, schedules

LENGTHS = (0, 1, 700, 64, 130, 1500)
FIELDS = ("start", "row_start", "n", "u", "c", "g", "s", "r", "first", "last", "part", "parts", "home", "e")


def items(
    mask: SemiLocalMask,
    *,
    by_rows: bool,
    targets: tuple[int, ...] | None = None,
    section: int = 10000,
    lengths: tuple[int, ...] = LENGTHS,
    only_targets: bool = False,
) -> list[dict[str, int]]:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    bounds = torch.tensor([0, *lengths], device=device).cumsum(0)
    number = None if targets is None else torch.tensor(targets, device=device)
    plan = AttentionPlan(offsets=bounds, mask=mask, num_targets=number, max_len=2000)
    num_rows = sum(lengths)
    if only_targets:
        plan, num_rows = plan_of_targets(plan), sum(targets or ())
    shape = Shape(
        num_rows=num_rows,
        num_positions=sum(lengths),
        num_heads=2,
        split_programs=1024,
        position_bytes=24 * 2**20 // section,
    )
    rows, keys = schedules(plan, shape, row_block=64 if by_rows else None, key_block=None if by_rows else 64)
    built = rows if by_rows else keys
    assert built is not None
    size = ITEM_SIZE.value
    num_items = int(built.table[0])
    assert num_items <= built.max_items
    assert not built.counters.any()
    table = built.table[size : size * (1 + num_items)].view(-1, size).tolist()
    return [dict(zip(FIELDS, row, strict=False)) for row in table]


@pytest.mark.parametrize("by_rows", [True, False])
@pytest.mark.parametrize(
    "mask",
    [
        SemiLocalMask(),
        SemiLocalMask(num_context=3),
        SemiLocalMask(local=100),
        SemiLocalMask(local=100, global_rows=90, global_columns=70, num_context=3),
        SemiLocalMask(local=100, global_rows=2**31 - 1, global_columns=2**31 - 1),
    ],
)
def test_every_position_belongs_to_one_tile(mask: SemiLocalMask, by_rows: bool) -> None:
    targets = (0, 0, 100, 0, 5, 1)
    seen = torch.zeros(sum(LENGTHS), dtype=torch.int64)
    for i, item in enumerate(items(mask, by_rows=by_rows, targets=targets)):
        assert 0 < item["last"] - item["first"] <= 64
        assert 0 <= item["part"] < item["parts"]
        assert item["home"] == i - item["part"]
        if item["part"] == 0:
            seen[item["start"] + item["first"] : item["start"] + item["last"]] += 1
    assert torch.equal(seen, torch.ones_like(seen))


def test_full_causal_starts_the_longest_tiles_first() -> None:
    lengths = [item["last"] for item in items(SemiLocalMask(), by_rows=True)]
    blocks = [(last + 63) // 64 for last in lengths]
    assert blocks == sorted(blocks, reverse=True)
    remaining = [(item["n"] - item["first"] + 63) // 64 for item in items(SemiLocalMask(), by_rows=False)]
    assert remaining == sorted(remaining, reverse=True)


@pytest.mark.parametrize("by_rows", [True, False])
def test_full_causal_works_on_what_fits_the_cache(by_rows: bool) -> None:
    lengths = (300, 0, 500, 260, 64, 520)
    scheduled = items(SemiLocalMask(), by_rows=by_rows, section=1100, lengths=lengths)
    sections = [item["start"] // 1100 for item in scheduled]
    assert sections == sorted(sections) and set(sections) == {0, 1}
    for section in (0, 1):
        inside = [item for item in scheduled if item["start"] // 1100 == section]
        blocks = [((item["last"] if by_rows else item["n"] - item["first"]) + 63) // 64 for item in inside]
        assert blocks == sorted(blocks, reverse=True)


def test_global_rows_come_first_and_are_split() -> None:
    scheduled = items(SemiLocalMask(local=100, global_rows=90), by_rows=True)
    is_long = [item["first"] >= item["g"] for item in scheduled]
    assert is_long == sorted(is_long, reverse=True)
    assert {item["parts"] for item in scheduled if item["n"] == 1500 and item["first"] >= item["g"]} == {2}
