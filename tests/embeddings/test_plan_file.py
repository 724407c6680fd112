"""Plan files: written and read back unchanged, readable, and refused with one line when they do not fit the job."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from embeddings.config import PlacementConfig, SparseOptimizerConfig, TableConfig, TableConstraint
from embeddings.machine import Machine
from embeddings.plan import BatchLoad, Plan
from embeddings.plan_file import read_plan, write_plan
from embeddings.planner import plan_tables

TABLES = (
    TableConfig(name="item", num_embeddings=10, embedding_dim=8, features=("item",)),
    TableConfig(name="user", num_embeddings=7, embedding_dim=8, features=("user",)),
)
MACHINE = Machine(world_size=4, local_world_size=2, compute_device="cuda", hbm_gib=80.0)


@pytest.fixture(scope="module")
def plan() -> Plan:
    """Item row-wise, user table-wise."""
    return plan_tables(
        nn.Linear(4, 4),
        TABLES,
        machine=MACHINE,
        placement=PlacementConfig(
            tables={
                "item": TableConstraint(sharding_types=("row_wise",)),
                "user": TableConstraint(sharding_types=("table_wise",)),
            }
        ),
        optimizer=SparseOptimizerConfig(),
        load=BatchLoad(samples_per_rank=16, ids_per_sample={"item": 12.5}),
    )


def test_plan_survives_the_file(plan: Plan, tmp_path: Path) -> None:
    write_plan(tmp_path / "plan.json", plan)
    assert read_plan(tmp_path / "plan.json", tables=TABLES, machine=MACHINE) == plan
    assert [path.name for path in tmp_path.iterdir()] == ["plan.json"]


def test_file_is_readable_with_one_shard_a_line(plan: Plan, tmp_path: Path) -> None:
    write_plan(tmp_path / "plan.json", plan)
    text = (tmp_path / "plan.json").read_text()
    assert '    {"rank": 1, "offset": [3, 0], "size": [3, 8]},\n' in text
    values = json.loads(text)
    assert values["version"] == 2
    assert values["machine"]["world_size"] == 4
    assert values["tables"]["item"]["sharding_type"] == "row_wise"
    assert values["tables"]["item"]["kernel"] == "fused"
    assert [rank["rank"] for rank in values["ranks"]] == [0, 1, 2, 3]


def test_plan_serves_a_machine_of_the_same_number_of_ranks(plan: Plan, tmp_path: Path) -> None:
    write_plan(tmp_path / "plan.json", plan)
    cpus = Machine(world_size=4, local_world_size=4, compute_device="cpu")
    assert read_plan(tmp_path / "plan.json", tables=TABLES, machine=cpus) == replace(plan, machine=cpus)


def test_plan_without_candidates_is_taken(plan: Plan, tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    write_plan(path, plan)
    values = json.loads(path.read_text())
    del values["tables"]["item"]["candidates"]
    path.write_text(json.dumps(values))
    assert read_plan(path, tables=TABLES, machine=MACHINE).tables["item"].shards == plan.tables["item"].shards


def item(values: dict[str, Any]) -> dict[str, Any]:
    """The item table of a file's values."""
    table: dict[str, Any] = values["tables"]["item"]
    return table


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda v: v.update(version=1), "has version 1, this code reads version 2"),
        (lambda v: v.pop("version"), "has version None"),
        (lambda v: v.pop("machine"), "misses the key 'machine'"),
        (lambda v: v["machine"].update(gpus=3), "malformed"),
        (lambda v: v["machine"].update(world_size=8), "made for 8 ranks, but this job has 4: plan again with"),
        (lambda v: v["tables"].pop("user"), "has no table 'user'"),
        (lambda v: v["tables"].update(extra=item(v)), "places table 'extra', which the model does not have"),
        (lambda v: item(v).update(num_embeddings=11), "'item' is 11 x 8 there, 10 x 8 in the model"),
        (lambda v: item(v).update(sharding_type="column_wise"), "sharding_type must be one of"),
        (lambda v: item(v).update(kernel="dense"), "kernel must be one of"),
        (lambda v: item(v)["shards"][1].update(offset=[2, 0]), "'item' has rows 2 to 2 twice"),
        (lambda v: item(v)["shards"][1].update(offset=[4, 0]), "'item' has rows 3 to 3 nowhere"),
        (lambda v: item(v)["shards"].pop(), "'item' has rows 9 to 9 nowhere"),
        (lambda v: item(v)["shards"][1].update(rank=4), "shard on rank 4, but ranks are 0 to 3"),
        (lambda v: item(v)["shards"][1].update(rank=0), "row_wise, which means equal blocks on ranks 0, 1"),
        (lambda v: item(v)["shards"][1].update(size=[3, 4]), "must hold all 8 columns"),
        (lambda v: item(v).update(sharding_type="table_wise"), "table_wise, which means one shard"),
        (lambda v: item(v).update(shards=[{"rank": 0}]), "misses the key 'offset'"),
        (lambda v: v["ranks"].pop(), "estimates 3 ranks of 4"),
        (
            lambda v: v["ranks"][0].update(weight_bytes=8),
            "puts 96 B of rows on rank 0, but its weight_bytes say 8 B: set them to 96",
        ),
        (lambda v: v["ranks"][0].update(weight_bytes=2**40), "needs 1024.00 GiB on one rank"),
        (lambda v: v["ranks"][0].update(host_bytes=2**40), "needs 1024.00 GiB of host memory"),
        (lambda v: v.update(tables=[]), "malformed"),
    ],
)
def test_wrong_plan_is_refused_in_one_line(
    plan: Plan, tmp_path: Path, change: Callable[[dict[str, Any]], Any], message: str
) -> None:
    path = tmp_path / "plan.json"
    write_plan(path, plan)
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))
    with pytest.raises(ValueError, match=message) as error:
        read_plan(path, tables=TABLES, machine=MACHINE)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("text", "message"), [("", "is not JSON"), ("{", "is not JSON"), ("[1]", "has version None")])
def test_text_that_is_no_plan_is_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "plan.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        read_plan(path, tables=TABLES, machine=MACHINE)


def test_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"cannot read plan .*: No such file"):
        read_plan(tmp_path / "plan.json", tables=TABLES, machine=MACHINE)


def test_host_memory_kernel_is_refused_on_a_cpu(plan: Plan, tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    cached = replace(plan.tables["item"], kernel="fused_uvm_caching")
    write_plan(path, replace(plan, tables={**plan.tables, "item": cached}))
    cpus = Machine(world_size=4, local_world_size=4, compute_device="cpu")
    with pytest.raises(ValueError, match="a cpu has only fused"):
        read_plan(path, tables=TABLES, machine=cpus)


def test_file_that_cannot_be_written_is_named(plan: Plan, tmp_path: Path) -> None:
    path = tmp_path / "missing" / "plan.json"
    with pytest.raises(ValueError, match=r"cannot write plan .*plan.json: No such file"):
        write_plan(path, plan)
