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

TRAINED = [(ranks, layout) for ranks, layouts in sharded.TRAINED_BY.items() for layout in layouts]
LOADED = [(ranks, layout) for ranks, layouts in sharded.LOADED_BY.items() for layout in layouts]

Results = dict[int, list[dict[str, Any]]]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    """For each world size, what every rank returned.  Two ranks save and four do; four, one and three load."""
    folder = str(tmp_path_factory.mktemp("sharded"))
    return {
        2: run_ranks(2, sharded.run_rank, folder),
        4: run_ranks(4, run_four, folder),
        1: run_ranks(1, sharded.run_rank, folder),
        3: run_ranks(3, sharded.run_rank, folder),
    }


@pytest.fixture(scope="module")
def expected() -> tuple[dict[str, Tensor], list[dict[str, Tensor]]]:
    """The unsharded model's final state, under the checkpoint's names, and its outputs."""
    return sharded.oracle()


@pytest.mark.parametrize(("world_size", "layout"), TRAINED)
def test_initial_values_depend_on_neither_plan_nor_ranks(results: Results, world_size: int, layout: str) -> None:
    reference = sharded.whole([rank["row_wise"]["initial"] for rank in results[1]])
    initial = sharded.whole([rank[layout]["initial"] for rank in results[world_size]])
    assert initial.keys() == reference.keys()
    for name, value in reference.items():
        torch.testing.assert_close(initial[name], value, rtol=0, atol=0)


@pytest.mark.parametrize(("world_size", "layout"), TRAINED)
def test_outputs_equal_the_unsharded_tables(results: Results, expected: Any, world_size: int, layout: str) -> None:
    for step, reference in enumerate(expected[1]):
        for feature, values in reference.items():
            samples: list[Tensor] = [torch.empty(0)] * sharded.GLOBAL_SAMPLES
            for rank in range(world_size):
                samples[rank::world_size] = results[world_size][rank][layout]["outputs"][step][feature]
            tolerance = 1e-3 if feature == "brand" else 1e-6
            torch.testing.assert_close(torch.cat(samples), values, rtol=10 * tolerance, atol=tolerance)


@pytest.mark.parametrize(("world_size", "layout"), TRAINED)
def test_updates_equal_the_unsharded_tables(results: Results, expected: Any, world_size: int, layout: str) -> None:
    final = sharded.whole([rank[layout]["final"] for rank in results[world_size]])
    assert final.keys() == expected[0].keys()
    for name, value in expected[0].items():
        # Adding up gradients in another order may round a float16 row to its neighbour.
        tolerance = 1e-3 if value.dtype == torch.float16 else 1e-6
        torch.testing.assert_close(final[name], value, rtol=10 * tolerance, atol=tolerance)


@pytest.mark.parametrize(("world_size", "layout"), TRAINED)
def test_planned_bytes_equal_the_bytes_of_local_shards(results: Results, world_size: int, layout: str) -> None:
    for rank in results[world_size]:
        held = {"tables": 0, "optimizer": 0}
        for name, pieces in rank[layout]["final"].items():
            held[name.split("/")[0]] += sum(values.numel() * values.element_size() for _, values in pieces)
        assert (held["tables"], held["optimizer"]) == rank[layout]["planned_bytes"]


@pytest.mark.parametrize(("world_size", "layout"), LOADED)
@pytest.mark.parametrize("saved", sharded.SAVED_BY)
def test_checkpoint_carries_tables_and_optimizer_to_another_plan(
    results: Results, world_size: int, saved: str, layout: str
) -> None:
    written = sharded.whole([rank[saved]["final"] for rank in results[sharded.SAVED_BY[saved]]])
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

SUMS = next(table for table in sharded.TABLES if table.pooled)
PAIR = tuple(
    replace(SUMS, name=feature, features=(feature,), optimizer=SparseOptimizerConfig(kind=kind))
    for feature, kind in zip(SUMS.features, ("adagrad", "sgd"), strict=True)
)
"""Pooled tables that are looked up together."""
PAIRED = ("table_row_wise", "nodes")
"""Each on a node of its own; one on a node, and the other's first columns on the second node, the last on the first."""


def run_four(folder: str) -> dict[str, Any]:
    """What takes four ranks, two nodes of two: the layouts over nodes, and tables that are not the others'."""
    os.environ["LOCAL_WORLD_SIZE"] = "2"
    results = sharded.run_rank(folder)
    results |= {name: sharded.train("row_wise", Path(folder), configs=(table,)) for name, table in ALONE.items()}
    return results | {f"pair {kind}": sharded.train(kind, Path(folder), configs=PAIR) for kind in PAIRED}


@pytest.mark.parametrize("name", ALONE)
def test_ranks_without_a_row_of_any_table_take_part(results: Results, name: str) -> None:
    final = sharded.whole([rank[name]["final"] for rank in results[4]])
    expected = sharded.oracle((ALONE[name],))[0]
    assert final.keys() == expected.keys()
    for part, value in expected.items():
        tolerance = 1e-3 if value.dtype == torch.float16 else 1e-6
        torch.testing.assert_close(final[part], value, rtol=10 * tolerance, atol=tolerance)


@pytest.mark.parametrize("kind", PAIRED)
def test_tables_of_one_lookup_lie_on_different_nodes(results: Results, kind: str) -> None:
    ranks = [rank[f"pair {kind}"] for rank in results[4]]
    places = {
        name: [[offset for offset, _ in rank["final"].get(f"tables/{name}", [])] for rank in ranks]
        for name in SUMS.features
    }
    assert places["title"] == [[[0, 0]], [[3, 0]], [], []]
    whole, columns = [[], [], [[0, 0]], [[3, 0]]], [[[0, 32]], [[3, 32]], [[0, 0]], [[3, 0]]]
    assert places["query"] == (whole if kind == "table_row_wise" else columns)
    state, outputs = sharded.oracle(PAIR)
    final = sharded.whole([rank["final"] for rank in ranks])
    for part, value in state.items():
        torch.testing.assert_close(final[part], value, rtol=1e-5, atol=1e-6)
    for step, expected in enumerate(outputs):
        for feature, values in expected.items():
            samples: list[Tensor] = [torch.empty(0)] * sharded.GLOBAL_SAMPLES
            for number, rank in enumerate(ranks):
                samples[number::4] = rank["outputs"][step][feature]
            torch.testing.assert_close(torch.cat(samples), values, rtol=1e-5, atol=1e-6)
