"""The planner: as good as TorchRec's, fast, deterministic, honest about memory, and clear when nothing fits."""

import random
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from benchmarks.planner import torchrec_plan
from embeddings.config import PlacementConfig, SparseOptimizerConfig, TableConfig, TableConstraint, UnboundedConfig
from embeddings.hardware import Rates
from embeddings.machine import Machine
from embeddings.plan import Plan
from embeddings.planner import DENSE_COPIES, dense_bytes, plan_tables
from embeddings.planning.packing import Packer, Packing
from embeddings.planning.problem import GIB, BatchLoad
from embeddings.planning.report import plan_report
from embeddings.sharding import apply_plan
from embeddings.tables import build_tables

GPUS_16 = Machine(world_size=16, local_world_size=8, compute_device="cuda", hbm_gib=80.0)
NO_DENSE = nn.Module()


def table(name: str, rows: int, dim: int = 64) -> TableConfig:
    """A table that looks up the feature of its own name."""
    return TableConfig(name=name, num_embeddings=rows, embedding_dim=dim, features=(name,))


def plan(tables: list[TableConfig], *, model: nn.Module = NO_DENSE, machine: Machine = GPUS_16, **changes: Any) -> Plan:
    """A plan with plain settings but for `changes`."""
    arguments: dict[str, Any] = {
        "placement": PlacementConfig(),
        "optimizer": SparseOptimizerConfig(),
        "load": BatchLoad(samples_per_rank=32),
    }
    return plan_tables(model, tables, machine=machine, **arguments | changes)


@pytest.mark.parametrize("seed", range(4))
def test_plan_is_at_least_as_good_as_torchrecs(seed: int) -> None:
    draw = random.Random(seed)
    machine = replace(GPUS_16, hbm_gib=8.0)
    # Multiples of the ranks, so that TorchRec's cost model and ours (which counts uneven blocks) agree.
    tables = [table(f"t{i}", 16 * int(10 ** draw.uniform(2, 5.5))) for i in range(9)]
    load = BatchLoad(samples_per_rank=32, ids_per_sample={t.name: 10 ** draw.uniform(0, 3) for t in tables})
    ours = plan(tables, machine=machine, load=load)
    assert ours.step_ms <= torchrec_plan(tables, machine, load)[0] * (1 + 1e-9)


def test_plan_is_a_function_of_the_problem() -> None:
    tables = [table(f"t{i}", 1000 + 997 * i, dim=128) for i in range(100)]
    machine = replace(GPUS_16, world_size=256)
    assert plan(tables, machine=machine) == plan(tables, machine=machine)


def test_effort_grows_with_the_tables_and_not_with_the_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Placements that are dealt out, for ten tables and for a hundred, on 16 ranks and on 1,024."""
    counts = {}
    original = Packer.pack
    for number in (10, 100):
        for ranks in (16, 1024):
            made = []

            def pack(self: Packer, choice: tuple[int, ...], made: list[int] = made) -> Packing:
                made.append(1)
                return original(self, choice)

            monkeypatch.setattr(Packer, "pack", pack)
            tables = [table(f"t{i}", 1000 + 997 * i, dim=128) for i in range(number)]
            plan(tables, machine=replace(GPUS_16, world_size=ranks))
            counts[number, ranks] = len(made)
    assert max(counts.values()) < 3000
    assert counts[100, 1024] < 3 * counts[100, 16] + 100


def test_estimated_ranks_add_up_to_the_tables() -> None:
    tables = [table("item", 1_000_003), table("user", 5_000), table("gender", 3)]
    made = plan(tables, placement=PlacementConfig(sharding_types=("table_wise", "row_wise")))
    elements = sum(t.num_embeddings * t.embedding_dim for t in tables)
    assert sum(rank.weight_bytes for rank in made.ranks) == 4 * elements
    assert sum(rank.optimizer_bytes for rank in made.ranks) == 4 * sum(t.num_embeddings for t in tables)
    for name, placed in made.tables.items():
        assert sum(len(shard.rows) for shard in made.shards(name)) == placed.num_embeddings, name


def test_table_with_fewer_rows_than_ranks_leaves_the_others_empty() -> None:
    constraint = PlacementConfig(tables={"gender": TableConstraint(sharding_types=("row_wise",))})
    made = plan([table("gender", 3)], placement=constraint)
    assert [len(shard.rows) for shard in made.shards("gender")] == [1, 1, 1] + [0] * 13


def test_hot_table_is_cut_and_cold_ones_stay_whole() -> None:
    tables = [table("item", 10_000_000), *(table(f"t{i}", 100) for i in range(16))]
    made = plan(tables, load=BatchLoad(samples_per_rank=32, ids_per_sample={"item": 1000.0}))
    assert made.tables["item"].sharding_type == "row_wise"
    chosen, *others = made.tables["item"].candidates
    assert chosen.plan_ms == pytest.approx(made.step_ms)
    whole = next(other for other in others if other.sharding_type == "table_wise")
    assert whole.plan_ms is not None and whole.plan_ms > 5 * made.step_ms


def test_memory_is_kept_for_the_dense_model_and_its_activations() -> None:
    model = nn.Module()
    model.tower = nn.Linear(1024, 1024, bias=False)
    model.tables = build_tables([table("item", 1000)], device=torch.device("meta"))
    assert dense_bytes(model) == DENSE_COPIES * 4 * 1024 * 1024
    placement = PlacementConfig(reserved_fraction=0.25, activation_gib=2.0)
    made = plan([table("item", 1000)], model=model, placement=placement)
    assert made.reservation.total_bytes == 20 * GIB + DENSE_COPIES * 4 * 1024 * 1024 + 2 * GIB
    assert made.available_bytes == 80 * GIB - made.reservation.total_bytes


def test_maps_of_unbounded_ids_take_host_memory_and_their_rows_no_cache() -> None:
    """Twice a key, a count and a time for each row, and again for keys that wait; of the device nothing."""
    maps = {
        min_count: plan([replace(table("item", 1_000_000), unbounded=UnboundedConfig(min_count=min_count))])
        for min_count in (1, 2)
    }
    ranks = maps[1].machine.world_size
    assert maps[1].reservation.maps_bytes == 2 * 16 * -(-1_000_000 // ranks)
    assert maps[2].reservation.maps_bytes == 2 * maps[1].reservation.maps_bytes
    assert maps[2].available_bytes == plan([table("item", 1_000_000)]).available_bytes
    assert "maps of unbounded ids" in plan_report(maps[1])
    cached = PlacementConfig(compute_kernels=("fused_uvm_caching",))
    with pytest.raises(ValueError, match="begin anew where they lie"):
        plan([replace(table("item", 1_000_000), unbounded=UnboundedConfig())], placement=cached)


def test_maps_that_leave_no_memory_are_named() -> None:
    """Maps of 10^8 rows take 1.49 GiB on each of two ranks."""
    tables = [replace(table("item", 100_000_000, 4), unbounded=UnboundedConfig())]
    gpus = Machine(world_size=2, local_world_size=2, compute_device="cuda", hbm_gib=80.0, ddr_gib=1.0)
    with pytest.raises(
        ValueError, match=r"host memory is too small on .*: maps of unbounded ids 1.49 GiB a rank, of 1"
    ):
        plan(tables, machine=gpus)
    cpus = Machine(world_size=2, local_world_size=2, compute_device="cpu", ddr_gib=1.0)
    with pytest.raises(ValueError, match=r"no memory is left .*activations 0, maps of unbounded ids 1.49 GiB; lower"):
        plan(tables, machine=cpus)


def test_fixes_stay_within_what_is_a_cluster() -> None:
    """More ranks do not make buffers smaller, however many are asked about."""
    load = BatchLoad(samples_per_rank=64, ids_per_sample={"item": 1e9})
    with pytest.raises(ValueError, match="the tables do not fit on 32768 cuda ranks"):
        plan([table("item", 1_000_000)], machine=replace(GPUS_16, world_size=2**15), load=load)


def test_small_table_that_is_looked_up_often_is_replicated() -> None:
    """A row-wise table of 128 rows on 16 ranks would load as if it were large."""
    tables = [table("item", 10_000_000, 256), table("category", 128, 256)]
    load = BatchLoad(samples_per_rank=32, ids_per_sample={"item": 4096.0, "category": 4096.0})
    made = plan(tables, load=load)
    assert made.tables["category"].sharding_type == "replicated"
    assert [len(shard.rows) for shard in made.shards("category")] == [128] * 16
    sharded = plan(tables, load=load, placement=PlacementConfig(sharding_types=("table_wise", "row_wise")))
    assert made.step_ms < 0.7 * sharded.step_ms


def test_wide_table_of_another_optimizer_may_be_cut_by_columns() -> None:
    wide = TableConfig(
        name="item",
        num_embeddings=10_000,
        embedding_dim=512,
        features=("item",),
        optimizer=SparseOptimizerConfig(kind="adagrad"),
    )
    kinds = PlacementConfig(sharding_types=("table_wise", "column_wise"))
    made = plan([wide], placement=kinds, load=BatchLoad(ids_per_sample={"item": 100.0}))
    assert made.tables["item"].sharding_type == "column_wise"
    shards = made.shards("item")
    assert len(shards) == len({shard.rank for shard in shards}) == 8
    assert [shard.columns for shard in shards] == [range(64 * i, 64 * (i + 1)) for i in range(8)]


@pytest.mark.parametrize("dim", [4, 16, 64, 128, 512])
def test_one_rank_keeps_tables_whole(dim: int) -> None:
    """TorchRec would put the ids and rows of a row-wise table in order, and back, for its one block."""
    machine = replace(GPUS_16, world_size=1, local_world_size=1)
    made = plan([table("item", 1000, dim), table("user", 10, dim)], machine=machine)
    assert {placed.sharding_type for placed in made.tables.values()} == {"table_wise"}


def test_table_that_fits_no_rank_is_cut() -> None:
    made = plan([table("item", 500_000_000)], load=BatchLoad(samples_per_rank=1))
    assert made.tables["item"].sharding_type == "row_wise"
    assert all(candidate.plan_ms is None for candidate in made.tables["item"].candidates[1:])


def test_tables_that_do_not_fit_are_named_with_rank_need_and_fixes() -> None:
    tables = [table("item", 10_000_000_000), table("user", 100)]
    with pytest.raises(ValueError, match="do not fit") as error:
        plan(tables)
    message = str(error.value)
    assert "\n" not in message
    # 10^10 rows of 64 float32 and one row sum: 2421.44 GiB; 68 GiB a rank are available.
    for part in (
        "rank 0 needs 151.",
        "more than the 68.00 GiB",
        "item 2421.44 GiB",
        "at least 40",
        "1088.00 GiB are there",
    ):
        assert part in message, message


def limits(message: str) -> dict[str, str]:
    """The fixes that an error names, by their first words."""
    fixes = message.split("; fixes: ")[1].split("; or ")
    return {fix.split(" (")[0]: fix.split(" (")[1].rstrip(")") for fix in fixes if " (" in fix}


def apply(fix: str, detail: str, machine: Machine, placement: PlacementConfig) -> tuple[Machine, PlacementConfig]:
    """What the user does who follows a fix."""
    number = float(next((word for word in detail.replace("(", " ").split() if word.replace(".", "").isdigit()), "nan"))
    if fix == "use more ranks":
        return replace(machine, world_size=int(number)), placement
    if fix == "use ranks with more memory":
        return replace(machine, hbm_gib=number), placement
    if fix == "use nodes with more host memory":
        return replace(machine, ddr_gib=number), placement
    if fix == "keep cold rows in host memory":
        kernel: Any = detail.split()[1]
        return machine, replace(placement, compute_kernels=(*placement.compute_kernels, kernel))
    if fix == "lower placement.reserved_fraction":
        return machine, replace(placement, reserved_fraction=number)
    if fix == "allow more sharding types":
        return machine, replace(placement, sharding_types=None)
    assert fix.startswith("allow more sharding types for ")
    return machine, replace(placement, tables={})


def refused(draw: random.Random) -> tuple[list[TableConfig], Machine, PlacementConfig, BatchLoad]:
    """A random problem whose tables are about as large as the memory, or larger."""
    machine = replace(GPUS_16, world_size=draw.choice([8, 16, 32]), hbm_gib=draw.choice([4.0, 16.0, 40.0]))
    machine = replace(machine, ddr_gib=draw.choice([2.0, 32.0, 256.0]))
    room = machine.world_size * machine.hbm_gib * GIB * draw.uniform(0.5, 6)
    number = draw.choice([1, 2, 5, 12])
    tables = [
        table(f"t{i}", max(1, int(room / number / 260 * draw.uniform(0.2, 1.8))), draw.choice([32, 64]))
        for i in range(number)
    ]
    placement = PlacementConfig(
        sharding_types=draw.choice([None, ("table_wise",), ("table_wise", "row_wise")]),
        compute_kernels=draw.choice([("fused",), ("fused", "fused_uvm_caching")]),
        tables={"t0": TableConstraint(sharding_types=("table_wise",))} if draw.random() < 0.3 else {},
        reserved_fraction=draw.choice([0.15, 0.3]),
        activation_gib=draw.choice([0.0, 1.0]),
    )
    load = BatchLoad(samples_per_rank=draw.choice([1, 32]), ids_per_sample={"t0": draw.choice([1.0, 2000.0])})
    return tables, machine, placement, load


@pytest.mark.parametrize("seed", range(12))
def test_every_fix_that_an_error_names_works(seed: int) -> None:
    draw = random.Random(seed)
    for _ in range(4):
        tables, machine, placement, load = refused(draw)
        try:
            plan(tables, machine=machine, placement=placement, load=load)
        except ValueError as error:
            assert "\n" not in str(error)
            for fix, detail in limits(str(error)).items():
                changed, settings = apply(fix, detail, machine, placement)
                made = plan(tables, machine=changed, placement=settings, load=load)
                assert max(rank.memory_bytes for rank in made.ranks) <= made.available_bytes
                assert max(rank.host_bytes for rank in made.ranks) <= changed.ddr_gib * GIB


def test_cached_table_lies_in_host_memory() -> None:
    tables = [table("item", 10_000_000_000)]
    placement = PlacementConfig(compute_kernels=("fused", "fused_uvm_caching"))
    cached = plan(tables, placement=placement, machine=replace(GPUS_16, ddr_gib=256.0))
    assert cached.tables["item"].kernel == "fused_uvm_caching"
    assert all(rank.host_bytes > rank.weight_bytes for rank in cached.ranks)


def test_only_as_many_tables_as_needed_move_to_host_memory() -> None:
    tables = [table(f"t{i}", 40_000_000) for i in range(8)]  # 9.7 GiB each, of 8 x 8 GiB available
    placement = PlacementConfig(compute_kernels=("fused", "fused_uvm_caching"), reserved_fraction=0.0)
    machine = Machine(world_size=8, local_world_size=8, compute_device="cuda", hbm_gib=8.0)
    made = plan(tables, machine=machine, placement=placement)
    cached = [placed for placed in made.tables.values() if placed.kernel == "fused_uvm_caching"]
    assert 1 <= len(cached) <= 3
    assert all(rank.memory_bytes <= made.available_bytes for rank in made.ranks)


def test_tables_that_only_both_memories_together_hold_are_split_among_them() -> None:
    """8 tables of 9.7 GiB on 8 ranks with 7 GiB of device and 4 GiB of host memory each: neither holds all."""
    tables = [table(f"t{i}", 40_000_000) for i in range(8)]
    placement = PlacementConfig(compute_kernels=("fused", "fused_uvm_caching"), reserved_fraction=0.0)
    machine = Machine(world_size=8, local_world_size=8, compute_device="cuda", hbm_gib=7.0, ddr_gib=4.0)
    made = plan(tables, machine=machine, placement=placement)
    assert {placed.kernel for placed in made.tables.values()} == {"fused", "fused_uvm_caching"}
    assert all(rank.memory_bytes <= made.available_bytes and rank.host_bytes <= 4 * GIB for rank in made.ranks)


def test_table_kept_whole_by_a_constraint_is_named_when_too_large() -> None:
    placement = PlacementConfig(tables={"item": TableConstraint(sharding_types=("table_wise",))})
    with pytest.raises(ValueError, match="allow more sharding types for item"):
        plan([table("item", 500_000_000)], placement=placement)


@pytest.mark.parametrize(
    ("placement", "machine", "message"),
    [
        (PlacementConfig(tables={"nope": TableConstraint()}), GPUS_16, "'nope', which is no table"),
        (PlacementConfig(activation_gib=80.0), GPUS_16, "no memory is left"),
        (
            PlacementConfig(compute_kernels=("fused_uvm",)),
            Machine(world_size=2, local_world_size=2, compute_device="cpu"),
            "a cpu has only fused",
        ),
    ],
)
def test_wrong_settings_are_refused(placement: PlacementConfig, machine: Machine, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plan([table("item", 1000)], placement=placement, machine=machine)


def test_adam_is_refused_on_a_cpu_which_has_no_kernel() -> None:
    cpus = Machine(world_size=2, local_world_size=2, compute_device="cpu")
    adam = SparseOptimizerConfig(kind="adam")
    tables = [table("item", 1000), replace(table("user", 10), optimizer=adam)]
    assert plan(tables).tables["user"].optimizer == "adam"
    with pytest.raises(ValueError, match="table 'user' has the optimizer adam, of which FBGEMM has no CPU kernel"):
        plan(tables, machine=cpus)


def test_sharding_type_that_a_table_cannot_have_is_refused_with_the_reason() -> None:
    columns = PlacementConfig(tables={"item": TableConstraint(sharding_types=("row_wise", "column_wise"))})
    with pytest.raises(ValueError, match="'item' to be column_wise, which it cannot be: row-wise Adagrad"):
        plan([table("item", 1000)], placement=columns)
    with pytest.raises(ValueError, match="no sharding type 'rows': known are table_wise, row_wise"):
        plan([table("item", 1000)], placement=PlacementConfig(sharding_types=("rows",)))
    # For all tables in general, each takes what it can have.
    general = PlacementConfig(sharding_types=("row_wise", "column_wise"))
    assert plan([table("item", 1000)], placement=general).tables["item"].sharding_type == "row_wise"


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_torchrec_plan_has_every_shard_on_its_device(device: str) -> None:
    hbm = 80.0 if device == "cuda" else None
    machine = Machine(world_size=4, local_world_size=2, compute_device=device, hbm_gib=hbm)
    placement = PlacementConfig(tables={"item": TableConstraint(sharding_types=("row_wise",))})
    model = nn.Module()
    model.tables = build_tables([table("item", 10)], device=torch.device("meta"))
    made = plan([table("item", 10)], machine=machine, placement=placement)
    sharding = apply_plan(model, made, device=torch.device("cpu")).plan["tables.collections.0"]["item"]
    expected = ["cuda:0", "cuda:1", "cuda:0", "cuda:1"] if device == "cuda" else ["cpu"] * 4
    shards = sharding.sharding_spec.shards
    assert [str(shard.placement) for shard in shards] == [f"rank:{rank}/{name}" for rank, name in enumerate(expected)]
    assert [(shard.shard_offsets, shard.shard_sizes) for shard in shards] == [
        ([0, 0], [3, 64]),
        ([3, 0], [3, 64]),
        ([6, 0], [3, 64]),
        ([9, 0], [1, 64]),
    ]


def test_model_with_other_tables_than_the_plan_is_refused() -> None:
    made = plan([table("item", 10)])
    for other, message in ((table("user", 10), "no table 'user'"), (table("item", 11), "11 x 64 float32 in the model")):
        model = nn.Module()
        model.tables = build_tables([other], device=torch.device("meta"))
        with pytest.raises(ValueError, match=message):
            apply_plan(model, made, device=torch.device("cpu"))


def test_an_exchange_goes_at_the_rate_of_its_slowest_link() -> None:
    rates = Rates(device=1000, within_node=400, across_nodes=50, across_racks=10, host_link=50)
    node = Machine(world_size=8, local_world_size=8, compute_device="cuda", hbm_gib=80, rates=rates)
    nodes = replace(node, world_size=32)
    racks = replace(nodes, racks=2)
    unknown = replace(racks, rates=replace(rates, across_racks=None))
    assert [machine.exchange_rate for machine in (node, nodes, racks, unknown)] == [400, 50, 10, 50]
    with pytest.raises(ValueError, match="racks=5 must be between 1 and the number of nodes, 4"):
        replace(nodes, racks=5)


def test_a_large_refusal_takes_few_packings(monkeypatch: pytest.MonkeyPatch) -> None:
    """With all fixes planned: what would be a search for a plan is a few packings of what is tightest."""
    made = []
    original = Packer.pack_by_size
    monkeypatch.setattr(Packer, "pack_by_size", lambda self, choice: made.append(1) or original(self, choice))
    monkeypatch.setattr(Packer, "pack", lambda *_: pytest.fail("a refusal looks for no good plan"))
    tables = [table(f"t{i}", 1000 + 9973 * i, dim=128) for i in range(1500)]
    machine = replace(GPUS_16, world_size=256, hbm_gib=16.0)
    with pytest.raises(ValueError, match="or use ranks with more memory"):
        plan(tables, machine=machine)
    assert len(made) < 150
