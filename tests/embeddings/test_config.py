"""Table, optimizer, placement and machine settings refuse what cannot work, in one line that says the fix."""

import math
from collections.abc import Callable
from typing import Any

import pytest

from embeddings.config import PlacementConfig, SparseOptimizerConfig, TableConfig, TableConstraint
from embeddings.hardware import GPUS
from embeddings.machine import Machine
from embeddings.planning.problem import BatchLoad


def table(**changes: Any) -> TableConfig:
    """A valid table but for `changes`."""
    return TableConfig(**{"name": "item", "num_embeddings": 10, "embedding_dim": 8, "features": ("item",)} | changes)


def cuda(**changes: Any) -> Machine:
    """A valid machine but for `changes`."""
    values = {"world_size": 4, "local_world_size": 2, "compute_device": "cuda", "hbm_gib": 80.0}
    return Machine(**values | changes)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: table(name=""), "name must be printable"),
        (lambda: table(name="a.b"), "without a dot or slash"),
        (lambda: table(name="a\nb"), "printable text"),
        (lambda: table(features=("a", "a")), "must be different names"),
        (lambda: table(pooled=""), "pooled must be a word"),
        (lambda: PlacementConfig(cached_part=0.0), r"cached_part must lie in \(0, 1\]"),
        (lambda: table(num_embeddings=0), "num_embeddings must be at least 1"),
        (lambda: table(embedding_dim=6), "multiple of 4"),
        (lambda: table(features=()), "has no features"),
        (lambda: SparseOptimizerConfig(learning_rate=0), "learning_rate must be above 0"),
        (lambda: SparseOptimizerConfig(eps=0), "eps must be above 0"),
        (lambda: SparseOptimizerConfig(kind="sgd", eps=1e-8), "null for sgd"),
        (lambda: TableConstraint(sharding_types=()), "at least one choice"),
        (lambda: PlacementConfig(compute_kernels=()), "at least one choice"),
        (lambda: PlacementConfig(reserved_fraction=1), "must lie in"),
        (lambda: PlacementConfig(activation_gib=-1), "at least 0"),
        (lambda: cuda(world_size=3), "multiple of local_world_size=2"),
        (lambda: cuda(compute_device="tpu"), "cuda or cpu"),
        (lambda: cuda(hbm_gib=None), "cuda needs it"),
        (lambda: cuda(compute_device="cpu"), "a cpu has none"),
        (lambda: cuda(hbm_gib=-1.0), "above 0"),
        (lambda: cuda(hbm_gib=math.nan), "above 0"),
        (lambda: cuda(hbm_gib=math.inf), "above 0"),
        (lambda: BatchLoad(samples_per_rank=0), "at least 1"),
        (lambda: BatchLoad(ids_per_sample={"item": 0}), "above 0"),
    ],
)
def test_wrong_value_is_refused_in_one_line(build: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        build()
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", [name for name in GPUS if name != "H100-PCIe"])
def test_a_gpus_own_memory_finds_its_rates(name: str) -> None:
    assert cuda(hbm_gib=GPUS[name].hbm_gib).effective_rates == GPUS[name].rates


def test_the_round_number_of_a_product_finds_its_rates() -> None:
    assert cuda(hbm_gib=80.0).nearest_gpu == "H100-80"
    assert cuda(hbm_gib=141.0).nearest_gpu == "H200-141"
    assert cuda(hbm_gib=40.0).nearest_gpu == "A100-40"
