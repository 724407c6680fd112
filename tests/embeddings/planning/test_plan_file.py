"""Plan files: written and read back unchanged, readable, and refused with one line when they do not fit the job."""

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from embeddings.config import PlacementConfig, SparseOptimizerConfig, TableConfig, TableConstraint
from embeddings.machine import Machine
from embeddings.plan import Plan
from embeddings.planning.plan_file import parse_plan, read_plan, write_plan
from embeddings.planning.problem import BatchLoad, Problem, reserve
from embeddings.planning.report import plan_differences, plan_report
from embeddings.planning.solver import solve

ADAGRAD = SparseOptimizerConfig(kind="adagrad")
TABLES = (
    TableConfig(name="item", num_embeddings=10, embedding_dim=8, features=("item",)),
    TableConfig(name="user", num_embeddings=7, embedding_dim=8, features=("user",)),
    TableConfig(name="tag", num_embeddings=50, embedding_dim=128, features=("tag",), optimizer=ADAGRAD),
)
MACHINE = Machine(world_size=4, local_world_size=2, compute_device="cuda", hbm_gib=80.0)


PLACEMENT = PlacementConfig(
    tables={
        "item": TableConstraint(sharding_types=("row_wise", "replicated")),
        "user": TableConstraint(sharding_types=("table_wise",)),
        "tag": TableConstraint(sharding_types=("column_wise",)),
    }
)


def problem(**changes: Any) -> Problem:
    """Item row-wise, user table-wise, tag column-wise, but for `changes`."""
    machine = changes.pop("machine", MACHINE)
    values: dict[str, Any] = {
        "tables": TABLES,
        "machine": machine,
        "placement": PLACEMENT,
        "optimizer": SparseOptimizerConfig(),
        "load": BatchLoad(samples_per_rank=16, ids_per_sample={"item": 12.5}),
        "reservation": reserve(machine, PLACEMENT, dense_bytes=1000),
    }
    return Problem(**values | changes)


@pytest.fixture(scope="module")
def plan() -> Plan:
    """The plan of the problem as it stands."""
    return solve(problem())


def edited(plan: Plan, path: Path, change: Callable[[dict[str, Any]], Any]) -> Path:
    """A plan's file after somebody changed its values."""
    write_plan(path, plan)
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))
    return path


def without_estimates(values: dict[str, Any]) -> None:
    """Leave out what is computed."""
    del values["ranks"]
    for table in values["tables"].values():
        del table["candidates"]


def test_plan_survives_the_file(plan: Plan, tmp_path: Path) -> None:
    write_plan(tmp_path / "plan.json", plan)
    assert read_plan(tmp_path / "plan.json", problem()) == plan
    assert [path.name for path in tmp_path.iterdir()] == ["plan.json"]


def test_file_is_readable_with_one_table_and_one_candidate_a_line(plan: Plan, tmp_path: Path) -> None:
    write_plan(tmp_path / "plan.json", plan)
    text = (tmp_path / "plan.json").read_text()
    values = json.loads(text)
    assert values["version"] == 5
    assert values["machine"]["world_size"] == 4
    assert values["tables"]["item"]["sharding_type"] in ("row_wise", "replicated")
    assert len(values["tables"]["user"]["ranks"]) == 1
    assert sum(line.startswith('"item"') for line in text.splitlines()) == 1
    assert values["ranks"][0]["first"] == 0 and values["ranks"][-1]["last"] == 3


def test_many_row_wise_tables_on_many_ranks_take_little_room(tmp_path: Path) -> None:
    tables = tuple(replace(TABLES[0], name=f"t{i}", features=(f"t{i}",)) for i in range(200))
    machine = replace(MACHINE, world_size=2048, local_world_size=8)
    placement = PlacementConfig(sharding_types=("row_wise",))
    made = solve(problem(tables=tables, machine=machine, placement=placement))
    write_plan(tmp_path / "plan.json", made)
    assert (tmp_path / "plan.json").stat().st_size < 200 * 1000
    assert parse_plan(tmp_path / "plan.json") == made


def test_plan_serves_another_machine_with_its_own_estimates(plan: Plan, tmp_path: Path) -> None:
    write_plan(tmp_path / "plan.json", plan)
    cpus = Machine(world_size=4, local_world_size=4, compute_device="cpu")
    served = read_plan(tmp_path / "plan.json", problem(machine=cpus))
    assert served.machine == cpus
    assert served.step_ms > plan.step_ms
    assert {name: table.ranks for name, table in served.tables.items()} == {
        name: table.ranks for name, table in plan.tables.items()
    }


def test_choice_changed_by_hand_is_taken_with_new_estimates(plan: Plan, tmp_path: Path) -> None:
    def change(values: dict[str, Any]) -> None:
        without_estimates(values)
        values["tables"]["user"]["ranks"] = [3 - plan.tables["user"].ranks[0]]
        values["tables"]["tag"]["ranks"] = [2, 0]

    path = edited(plan, tmp_path / "plan.json", change)
    assert "leaves the estimates out" in plan_report(parse_plan(path))
    assert plan_differences(plan, parse_plan(path)).splitlines()[-1].endswith("of rows move")
    served = read_plan(path, problem())
    assert served.tables["user"].ranks == (3 - plan.tables["user"].ranks[0],)
    weights = [rank.weight_bytes for rank in served.ranks]
    held = dict.fromkeys((0, 2), 50 * 64 * 4)
    held[served.tables["user"].ranks[0]] = held.get(served.tables["user"].ranks[0], 0) + 7 * 8 * 4
    rows = [3, 3, 3, 1] if served.tables["item"].sharding_type == "row_wise" else [10] * 4
    assert weights == [held.get(rank, 0) + rows[rank] * 8 * 4 for rank in range(4)]


def table(values: dict[str, Any], name: str = "item") -> dict[str, Any]:
    """A table of a file's values."""
    found: dict[str, Any] = values["tables"][name]
    return found


def numbers(values: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The places of all numbers that are estimates."""
    found = []
    for key, value in values.items() if isinstance(values, dict) else enumerate(values):
        if isinstance(value, dict | list):
            found += numbers(value, (*path, key))
        elif isinstance(value, int | float) and not isinstance(value, bool):
            found.append((*path, key))
    return found


def test_no_estimate_can_be_changed(plan: Plan, tmp_path: Path) -> None:
    """Each number of ranks and candidates, raised and lowered: every one is refused in one line."""
    path = tmp_path / "plan.json"
    write_plan(path, plan)
    values = json.loads(path.read_text())
    estimates = {
        "ranks": values["ranks"],
        "tables": {n: {"candidates": t["candidates"]} for n, t in values["tables"].items()},
    }
    places = numbers(estimates)
    assert len(places) > 30
    for place in places:
        for factor in (2, 0.5):

            def change(values: dict[str, Any], place: tuple[Any, ...] = place, factor: float = factor) -> None:
                for key in place[:-1]:
                    values = values[key]
                values[place[-1]] = values[place[-1]] * factor + (1 if factor > 1 else -1)

            with pytest.raises(ValueError, match="plan") as error:
                read_plan(edited(plan, path, change), problem())
            assert "\n" not in str(error.value), place


def leaves(values: Any, place: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The places of all values that are no objects or lists."""
    if isinstance(values, dict | list):
        for key in values if isinstance(values, dict) else range(len(values)):
            yield from leaves(values[key], (*place, key))
    else:
        yield place


def test_a_value_of_another_type_or_size_is_refused_wherever_it_stands(plan: Plan, tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    write_plan(path, plan)
    places = list(leaves(json.loads(path.read_text())))
    assert len(places) > 60
    for place in places:
        for wrong in ([7], {"a": 7}, float("nan"), 1e308, 10**30, *(() if place[-1] == "calibration" else ("seven",))):

            def change(values: dict[str, Any], place: tuple[Any, ...] = place, wrong: Any = wrong) -> None:
                for key in place[:-1]:
                    values = values[key]
                values[place[-1]] = wrong

            with pytest.raises(ValueError, match="plan") as error:
                # What can be printed without a problem is printed.
                plan_report(parse_plan(edited(plan, path, change)))
                read_plan(path, problem())
            assert "\n" not in str(error.value), place


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda v: v.update(version=1), "has version 1, this code reads version 5"),
        (lambda v: v.pop("version"), "is no plan, as it states no version"),
        (lambda v: v.pop("machine"), "misses the key 'machine'"),
        (lambda v: v["machine"].update(gpus=3), "malformed"),
        (lambda v: v.update(note="x"), "unknown key 'note'"),
        (lambda v: v["machine"].update(hbm_gib=141.0), "reserves .* bytes for a fraction"),
        (lambda v: v["reservation"].update(dense_bytes=-1), "must be at least 0"),
        (lambda v: v["machine"].update(calibration="a\nb"), "must be printable"),
        (lambda v: v["ranks"][0].update(weight_bytes=v["ranks"][0]["weight_bytes"] + 1), "says of rank 0 weight_bytes"),
        (lambda v: table(v)["candidates"][1].update(sharding_type="rows"), "there is no sharding type"),
        (lambda v: v["reservation"].update(fraction_bytes=0), "reserves 0 bytes for a fraction"),
        (lambda v: v["load"].update(samples_per_rank=8), "says of rank 0"),
        (lambda v: v["load"]["ids_per_sample"].update(item=1.0), "says of rank 0"),
        (lambda v: v["load"]["ids_per_sample"].update(item=-1.0), "must be above 0"),
        (lambda v: v["machine"].update(world_size=8), "made for 8 ranks, but this job has 4: plan again with"),
        (lambda v: v["tables"].pop("user"), "has no table 'user'"),
        (lambda v: v["tables"].update(extra=table(v)), "places table 'extra', which the model does not have"),
        (lambda v: table(v).update(num_embeddings=11), "'item' has rows 11 there, 10 in the model"),
        (lambda v: table(v).update(embedding_dim=16), "'item' has columns 16 there, 8 in the model"),
        (lambda v: table(v).update(dtype="float16"), "'item' has dtype float16 there"),
        (lambda v: table(v).update(dtype="int4"), "dtype' must be one of"),
        (lambda v: table(v).update(optimizer="sgd"), "'item' has optimizer sgd there, rowwise_adagrad in the model"),
        (lambda v: table(v).update(sharding_type="rows"), "there is no sharding type"),
        (lambda v: table(v).update(sharding_type="table_wise"), "its first candidate, which must be the choice"),
        (lambda v: table(v).update(kernel="dense"), "kernel' must be one of"),
        (lambda v: table(v).update(ranks=[0, 1, 2, 3]), "has a block on every rank: leave its ranks empty"),
        (lambda v: table(v, "user").update(ranks=[]), "needs the ranks of its blocks"),
        (lambda v: table(v, "user").update(ranks=[4]), "block on rank 4, but ranks are 0 to 3"),
        (lambda v: table(v, "user").update(ranks=[1.5]), "must be an integer"),
        (lambda v: table(v, "user").update(ranks=[3 - table(v, "user")["ranks"][0]]), "says of rank"),
        (lambda v: table(v, "user").update(ranks=[0, 1]), "cannot be table_wise on 2 ranks"),
        (lambda v: table(v, "tag").update(ranks=[1, 1]), "two blocks on one of the ranks"),
        (lambda v: table(v, "tag").update(ranks=[0, 1, 2]), "cannot be column_wise on 3 ranks"),
        (lambda v: v["ranks"].pop(), "estimates . ranks of 4"),
        (lambda v: v["ranks"][0].update(first=1), "follow 0 of 4 ranks"),
        (lambda v: v["ranks"][-1].update(last=2**40), "of 4 ranks"),
        (lambda v: v.update(tables=[]), "malformed"),
    ],
)
def test_wrong_plan_is_refused_in_one_line(
    plan: Plan, tmp_path: Path, change: Callable[[dict[str, Any]], Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message) as error:
        read_plan(edited(plan, tmp_path / "plan.json", change), problem())
    assert "\n" not in str(error.value)
    assert str(tmp_path / "plan.json") in str(error.value)


ON_NODES = {"table_row_wise": [(0, 1), (2, 3)], "grid_shard": [(0, 1, 2, 3), (2, 3, 0, 1)]}
"""Ranks that a table may have, as two nodes of two."""
NO_NODES: list[list[int]] = [[1, 2], [1, 0], [0], [0, 2], [2, 3, 1], [0, 1, 3, 2], [1, 2, 3, 0]]


@pytest.mark.parametrize(
    ("kind", "ranks", "message"),
    [
        *((kind, ranks, "name whole nodes, the 2 ranks of each in order") for kind in ON_NODES for ranks in NO_NODES),
        ("table_row_wise", [0, 1, 2, 3], "cannot be table_row_wise on 4 ranks"),
        ("grid_shard", [2, 3], "cannot be grid_shard on 2 ranks"),
    ],
)
def test_table_on_nodes_lies_on_all_ranks_of_each(tmp_path: Path, kind: str, ranks: list[int], message: str) -> None:
    sums = {"embedding_dim": 64, "pooled": "sample", "optimizer": SparseOptimizerConfig(kind="sgd")}
    word = TableConfig(name="word", num_embeddings=9, features=("word",), **sums)
    asked = problem(tables=(word,), placement=PlacementConfig(tables={"word": TableConstraint(sharding_types=(kind,))}))
    made = solve(asked)
    assert made.tables["word"].ranks in ON_NODES[kind]
    assert [len(shard.rows) for shard in made.shards("word")] == [5, 4] * (len(made.tables["word"].ranks) // 2)
    without = (lambda v: v.pop("ranks"), lambda v: table(v, "word").update(ranks=ON_NODES[kind][1]))
    other = edited(made, tmp_path / "plan.json", lambda v: [change(v) for change in without])
    assert read_plan(other, asked).tables["word"].ranks == ON_NODES[kind][1]
    path = edited(made, tmp_path / "plan.json", lambda v: table(v, "word").update(ranks=ranks))
    with pytest.raises(ValueError, match=message):
        read_plan(path, asked)
    path = edited(made, path, lambda v: table(v, "word").update(ranks=[]))
    with pytest.raises(ValueError, match="needs the ranks of its blocks"):
        parse_plan(path)


def test_plan_that_does_not_fit_the_machine_at_hand_is_refused_with_rank_and_room(plan: Plan, tmp_path: Path) -> None:
    write_plan(tmp_path / "plan.json", plan)
    small = replace(MACHINE, hbm_gib=0.00002)
    here = problem(machine=small, reservation=reserve(small, PLACEMENT, dense_bytes=0))
    with pytest.raises(ValueError, match=r"of memory for tables on rank \d, but 17.83 KiB are there"):
        read_plan(tmp_path / "plan.json", here)


@pytest.mark.parametrize(
    ("text", "message"), [("", "is not JSON"), ("{", "is not JSON"), ("[1]", "must hold a JSON object")]
)
def test_text_that_is_no_plan_is_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "plan.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        read_plan(path, problem())


def test_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"cannot read .*: No such file"):
        read_plan(tmp_path / "plan.json", problem())


def test_host_memory_kernel_is_refused_on_a_cpu(plan: Plan, tmp_path: Path) -> None:
    placement = PlacementConfig(compute_kernels=("fused_uvm_caching",))
    tables = (TABLES[0],)
    write_plan(tmp_path / "plan.json", solve(problem(tables=tables, placement=placement)))
    cpus = Machine(world_size=4, local_world_size=4, compute_device="cpu")
    with pytest.raises(ValueError, match="a cpu has only fused"):
        read_plan(tmp_path / "plan.json", problem(tables=tables, machine=cpus, placement=PlacementConfig()))


def test_file_that_cannot_be_written_is_named(plan: Plan, tmp_path: Path) -> None:
    path = tmp_path / "missing" / "plan.json"
    with pytest.raises(ValueError, match=r"cannot write plan .*plan.json: No such file"):
        write_plan(path, plan)
