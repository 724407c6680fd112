"""Tables of unbounded ids train as one table with a dictionary of keys does, on any number of ranks, under any plan."""

import pytest
import torch

from tests.embeddings.lookups import unbounded_ranks
from tests.embeddings.sharded import whole
from tests.support.distributed import run_ranks

LAYOUTS = {
    1: ("table_wise",),
    2: ("row_wise", "column_wise"),
    3: ("row_wise", "table_wise", "replicated"),
}


@pytest.mark.parametrize("ranks", LAYOUTS)
def test_trains_as_a_plain_dictionary_of_keys_does(ranks: int) -> None:
    expected, maps, begun = unbounded_ranks.oracle()
    # Rows have passed to other keys, and some keys share row 0.
    assert begun > 50
    assert sum(row == 0 for step in maps for row in step.values()) > 50
    results = run_ranks(ranks, unbounded_ranks.run_rank, LAYOUTS[ranks])
    for layout in LAYOUTS[ranks]:
        for _, found, _ in (result[layout] for result in results):
            assert len(found) == len(maps)
            for mine, everywhere in zip(found, maps, strict=True):
                assert mine == {key: everywhere[key] for key in mine}
        state = whole([result[layout][0] for result in results])
        for name, values in expected.items():
            torch.testing.assert_close(state[name], values, rtol=1e-5, atol=1e-6)
        held = whole([result[layout][2] for result in results])
        last = {row - 1: key for key, row in maps[-1].items() if row}
        assert {slot: int(held["item/keys"][slot]) for slot in last} == last
        assert {len(part) for part in held.values()} == {unbounded_ranks.TABLE.num_embeddings - 1}
