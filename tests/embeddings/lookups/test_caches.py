"""What a pipeline has brought into caches for coming batches is there after an evaluation as it was before it."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from embeddings.lookups import caches
from embeddings.lookups.caches import Caches


def kernel(*, ahead: bool = True, cached: bool = True) -> Any:
    """What FBGEMM's kernel holds of a cache of four places, two of them locked for a batch in flight."""
    return SimpleNamespace(
        prefetch_pipeline=ahead,
        prefetch_stream=None,
        lxu_cache_weights=torch.zeros(4 if cached else 0, 8),
        lxu_cache_locking_counter=torch.tensor([1, 0, 2, 0], dtype=torch.int32),
        timesteps_prefetched=[7],
        lxu_cache_locations_list=[torch.tensor([0, 2])],
    )


def evaluate(each: Any) -> None:
    """As FBGEMM looks up without a backward pass: it fills places where none are prefetched, and locks them."""
    assert not each.timesteps_prefetched and not each.lxu_cache_locations_list
    each.lxu_cache_locking_counter += 1


def test_an_evaluation_leaves_what_was_prefetched(monkeypatch: pytest.MonkeyPatch) -> None:
    filled_ahead, not_ahead, on_the_device = kernel(), kernel(ahead=False), kernel(cached=False)
    tables: Any = SimpleNamespace(collections=[(filled_ahead,), (not_ahead, on_the_device)])
    monkeypatch.setattr(caches, "fbgemm_kernels", list)
    held = Caches(tables)
    places = filled_ahead.lxu_cache_locations_list
    with pytest.raises(KeyError), held.undisturbed():
        evaluate(filled_ahead)
        # One that fails, too.
        raise KeyError
    with held.undisturbed():
        evaluate(filled_ahead)
    assert filled_ahead.timesteps_prefetched == [7] and filled_ahead.lxu_cache_locations_list is places
    assert filled_ahead.lxu_cache_locking_counter.tolist() == [1, 0, 2, 0]
    for other in (not_ahead, on_the_device):
        assert other.timesteps_prefetched == [7] and other.lxu_cache_locking_counter.tolist() == [1, 0, 2, 0]
