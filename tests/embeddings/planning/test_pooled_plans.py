"""Plans of pooled tables on several nodes: cut within a node, or by columns over nodes where that is right and pays."""

import random
from dataclasses import replace

import pytest

from benchmarks.planner import torchrec_plan
from embeddings.config import PlacementConfig, SparseOptimizerConfig, TableConfig, TableConstraint
from embeddings.machine import Machine
from embeddings.planning.problem import BatchLoad
from embeddings.planning.report import plan_report
from tests.embeddings.planning.test_planner import GPUS_16, plan


def pooled(name: str, rows: int, dim: int, optimizer: str) -> TableConfig:
    """A table of sums."""
    return TableConfig(
        name=name,
        num_embeddings=rows,
        embedding_dim=dim,
        features=(name,),
        pooled="sample",
        optimizer=SparseOptimizerConfig(kind=optimizer),  # type: ignore[arg-type]
    )


@pytest.mark.parametrize("seed", range(3))
def test_plan_is_at_least_as_good_as_torchrecs_with_all_its_kinds(seed: int) -> None:
    draw = random.Random(seed)
    machine = replace(GPUS_16, hbm_gib=8.0)
    # Multiples of the ranks, so that TorchRec's cost model and ours (which counts uneven blocks) agree.
    tables = [
        pooled(f"t{i}", 16 * int(10 ** draw.uniform(2, 5.5)), draw.choice([64, 128]), "adagrad") for i in range(5)
    ]
    load = BatchLoad(samples_per_rank=1024, ids_per_sample={t.name: 1 + 10 ** draw.uniform(0, 2) for t in tables})
    ours = plan(tables, machine=machine, load=load)
    assert ours.step_ms <= torchrec_plan(tables, machine, load)[0] * (1 + 1e-9)


@pytest.mark.parametrize("nodes", [2, 4])
def test_heavy_table_is_cut_into_columns_over_nodes_where_its_optimizer_lets_it(nodes: int) -> None:
    machine = replace(GPUS_16, world_size=8 * nodes)
    load = BatchLoad(samples_per_rank=1024, ids_per_sample={"word": 20})
    columns, rows = (
        plan([pooled("word", 1_000_003, 512, optimizer)], machine=machine, load=load)
        for optimizer in ("sgd", "rowwise_adagrad")
    )
    assert rows.tables["word"].sharding_type == "table_row_wise"
    assert columns.tables["word"].sharding_type == "grid_shard"
    assert columns.tables["word"].ranks == tuple(range(8 * nodes))
    # Only the fixed times and the ids' own are not shared by the nodes.
    assert columns.step_ms < rows.step_ms * (0.7 if nodes == 2 else 0.4)
    sizes = {(len(shard.rows), len(shard.columns)) for shard in columns.shards("word")}
    assert sizes == {(125_001, 512 // nodes), (124_996, 512 // nodes)}
    assert f"word: grid_shard x {8 * nodes}" in plan_report(columns)


def test_full_node_leaves_blocks_of_columns_to_others() -> None:
    """Three nodes of two ranks; a block of columns fits on two of them beside what lies there."""
    machine = Machine(world_size=6, local_world_size=2, compute_device="cpu", ddr_gib=0.6)
    kinds = {"large": "table_row_wise", "word": "grid_shard"}
    made = plan(
        [pooled("large", 3_600_000, 64, "sgd"), pooled("word", 2_000_000, 64, "sgd")],
        machine=machine,
        placement=PlacementConfig(
            tables={name: TableConstraint(sharding_types=(kind,)) for name, kind in kinds.items()}
        ),
    )
    assert set(made.tables["word"].ranks) == set(range(6)) - set(made.tables["large"].ranks)
