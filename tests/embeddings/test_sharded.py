"""Sharded tables on real processes equal the unsharded ones: values, updates, memory, and state across plans."""

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from embeddings.config import SparseOptimizerConfig, TableConfig
from tests.embeddings import sharded
from tests.support.distributed import run_ranks

WORLD_SIZES = (1, 2, 3)
SAVED_BY = 2

Results = dict[int, list[dict[str, Any]]]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    """For each world size, what every rank returned.  Two ranks save, then one and three load."""
    folder = str(tmp_path_factory.mktemp("sharded"))
    return {
        world_size: run_ranks(world_size, sharded.run_rank, folder, world_size == SAVED_BY)
        for world_size in (SAVED_BY, 1, 3)
    }


@pytest.fixture(scope="module")
def expected() -> tuple[dict[str, Tensor], list[dict[str, Tensor]]]:
    """The unsharded model's final state, under the checkpoint's names, and its outputs."""
    return sharded.oracle()


@pytest.mark.parametrize("layout", sharded.LAYOUTS)
@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_initial_values_depend_on_neither_plan_nor_ranks(results: Results, world_size: int, layout: str) -> None:
    reference = sharded.whole([rank["row_wise"]["initial"] for rank in results[1]])
    initial = sharded.whole([rank[layout]["initial"] for rank in results[world_size]])
    assert initial.keys() == reference.keys()
    for name, value in reference.items():
        torch.testing.assert_close(initial[name], value, rtol=0, atol=0)


@pytest.mark.parametrize("layout", sharded.LAYOUTS)
@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_outputs_equal_the_unsharded_tables(results: Results, expected: Any, world_size: int, layout: str) -> None:
    for step, reference in enumerate(expected[1]):
        for feature, values in reference.items():
            samples: list[Tensor] = [torch.empty(0)] * sharded.GLOBAL_SAMPLES
            for rank in range(world_size):
                samples[rank::world_size] = results[world_size][rank][layout]["outputs"][step][feature]
            tolerance = 1e-3 if feature == "brand" else 1e-6
            torch.testing.assert_close(torch.cat(samples), values, rtol=10 * tolerance, atol=tolerance)


@pytest.mark.parametrize("layout", sharded.LAYOUTS)
@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_updates_equal_the_unsharded_tables(results: Results, expected: Any, world_size: int, layout: str) -> None:
    final = sharded.whole([rank[layout]["final"] for rank in results[world_size]])
    assert final.keys() == expected[0].keys()
    for name, value in expected[0].items():
        # Adding up gradients in another order may round a float16 row to its neighbour.
        tolerance = 1e-3 if value.dtype == torch.float16 else 1e-6
        torch.testing.assert_close(final[name], value, rtol=10 * tolerance, atol=tolerance)


@pytest.mark.parametrize("layout", sharded.LAYOUTS)
@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_planned_bytes_equal_the_bytes_of_local_shards(results: Results, world_size: int, layout: str) -> None:
    for rank in results[world_size]:
        held = {"tables": 0, "optimizer": 0}
        for name, pieces in rank[layout]["final"].items():
            held[name.split("/")[0]] += sum(values.numel() * values.element_size() for _, values in pieces)
        assert (held["tables"], held["optimizer"]) == rank[layout]["planned_bytes"]


@pytest.mark.parametrize("layout", sharded.LAYOUTS)
@pytest.mark.parametrize("saved", sharded.LAYOUTS)
@pytest.mark.parametrize("world_size", [size for size in WORLD_SIZES if size != SAVED_BY])
def test_checkpoint_carries_tables_and_optimizer_to_another_plan(
    results: Results, world_size: int, saved: str, layout: str
) -> None:
    written = sharded.whole([rank[saved]["final"] for rank in results[SAVED_BY]])
    loaded = sharded.whole([rank[f"{saved}->{layout}"] for rank in results[world_size]])
    assert loaded.keys() == written.keys()
    for name, value in written.items():
        torch.testing.assert_close(loaded[name], value, rtol=0, atol=0)
        assert value.abs().sum() > 0


FEW_ROWS = next(table for table in sharded.TABLES if table.name == "gender")
ALONE: dict[str, TableConfig] = {
    **{kind: replace(FEW_ROWS, optimizer=SparseOptimizerConfig(kind=kind)) for kind in ("adagrad", "sgd")},
    "rowwise_adagrad": FEW_ROWS,
    "float16": replace(FEW_ROWS, dtype="float16"),
}
"""Tables without another of their width, so that a rank without a row of theirs has a kernel without any value."""


def train_alone(folder: str) -> dict[str, dict[str, Any]]:
    """Each of the tables above, row-wise."""
    return {name: sharded.train("row_wise", Path(folder), configs=(table,)) for name, table in ALONE.items()}


def test_ranks_without_a_row_of_any_table_take_part(tmp_path: Path) -> None:
    results = run_ranks(4, train_alone, str(tmp_path))
    for name, table in ALONE.items():
        final = sharded.whole([rank[name]["final"] for rank in results])
        expected = sharded.oracle((table,))[0]
        assert final.keys() == expected.keys()
        for part, value in expected.items():
            tolerance = 1e-3 if value.dtype == torch.float16 else 1e-6
            torch.testing.assert_close(final[part], value, rtol=10 * tolerance, atol=tolerance)


SUMS = next(table for table in sharded.TABLES if table.pooled)
NODES_SUMS = {
    "one": (SUMS,),
    "two": tuple(replace(SUMS, name=feature, features=(feature,)) for feature in SUMS.features),
}
"""Pooled tables of one node, beside one that has none, and of both."""


def train_on_nodes(folder: str) -> dict[str, dict[str, Any]]:
    """Each of these over the ranks of a node and whole, then each from the other's checkpoint."""
    os.environ["LOCAL_WORLD_SIZE"] = str(sharded.NODE)
    results: dict[str, dict[str, Any]] = {}
    for name, configs in NODES_SUMS.items():
        parts, kinds = Path(folder, name), ("table_row_wise", "table_wise")
        parts.mkdir(exist_ok=True)
        results[name] = {kind: sharded.train(kind, parts, save=True, configs=configs) for kind in kinds}
        for saved, kind in (kinds, kinds[::-1]):
            results[name][f"{saved}->{kind}"] = sharded.reload(saved, kind, parts, configs)
    return results


def test_rows_over_a_nodes_ranks_train_as_the_unsharded_table_and_move_to_another_plan(tmp_path: Path) -> None:
    results = run_ranks(4, train_on_nodes, str(tmp_path))
    for name, configs in NODES_SUMS.items():
        ranks = [rank[name] for rank in results]
        state, outputs = sharded.oracle(configs)
        final = {
            kind: sharded.whole([rank[kind]["final"] for rank in ranks]) for kind in ("table_row_wise", "table_wise")
        }
        held = [sum(len(pieces) for pieces in rank["table_row_wise"]["final"].values()) for rank in ranks]
        assert held == ([2, 2, 0, 0] if name == "one" else [2, 2, 2, 2])
        for part, value in state.items():
            torch.testing.assert_close(final["table_row_wise"][part], value, rtol=1e-5, atol=1e-6)
        for step, expected in enumerate(outputs):
            for feature, values in expected.items():
                samples: list[Tensor] = [torch.empty(0)] * sharded.GLOBAL_SAMPLES
                for number, rank in enumerate(ranks):
                    samples[number::4] = rank["table_row_wise"]["outputs"][step][feature]
                torch.testing.assert_close(torch.cat(samples), values, rtol=1e-5, atol=1e-6)
        for saved, kind in (("table_row_wise", "table_wise"), ("table_wise", "table_row_wise")):
            loaded = sharded.whole([rank[f"{saved}->{kind}"] for rank in ranks])
            assert loaded.keys() == final[saved].keys()
            assert all(torch.equal(loaded[part], value) for part, value in final[saved].items())
