"""The search beside the best of all placements, where these are few enough to be tried one by one."""

import itertools
import random
from dataclasses import replace

import pytest

from embeddings.config import ComputeKernel, PlacementConfig, SparseOptimizerConfig, TableConfig
from embeddings.machine import Machine
from embeddings.planning.options import Option, table_options
from embeddings.planning.packing import Packer, Packing, make_packer
from embeddings.planning.problem import BatchLoad, DoesNotFit, Problem, reserve
from embeddings.planning.search import best_packing, fits

ALL_KERNELS: tuple[ComputeKernel, ...] = ("fused", "fused_uvm_caching", "fused_uvm")
RANKS = 2


def packer_of(tables: list[TableConfig], ids: list[float], *, hbm_gib: float, host_gib: float) -> Packer:
    """The packer of tables on two GPUs that look up so many ids a step each."""
    machine = Machine(
        world_size=RANKS, local_world_size=RANKS, compute_device="cuda", hbm_gib=hbm_gib, ddr_gib=host_gib
    )
    placement = PlacementConfig(compute_kernels=ALL_KERNELS, activation_gib=0.0)
    problem = Problem(
        tables=tuple(tables),
        machine=machine,
        placement=placement,
        optimizer=SparseOptimizerConfig(kind="sgd"),
        load=BatchLoad(
            samples_per_rank=1,
            ids_per_sample={table.name: each for table, each in zip(tables, ids, strict=True)},
            bags_per_sample={table.name: each / 10 for table, each in zip(tables, ids, strict=True)},
        ),
        reservation=reserve(machine, placement, dense_bytes=0, tables=tables),
    )
    return make_packer(problem, table_options(problem))


def best_of_all(packer: Packer) -> Packing:
    """Every option of every table, on every rank that its blocks may have."""

    def ways(options: list[Option]) -> list[tuple[int, tuple[int, ...]]]:
        return [
            (index, ranks)
            for index, option in enumerate(options)
            for ranks in itertools.permutations(range(RANKS), len(option.pieces))
        ]

    tried = itertools.product(*(ways(list(options)) for options in packer.options))
    packings = (
        packer.estimate(tuple(index for index, _ in each), {i: ranks for i, (_, ranks) in enumerate(each) if ranks})
        for each in tried
    )
    return min(packings, key=lambda packing: packing.rating)


def table(number: int, rows: int, columns: int, pooled: str | None = None) -> TableConfig:
    return TableConfig(
        name=f"t{number}", num_embeddings=rows, embedding_dim=columns, features=(f"t{number}",), pooled=pooled
    )


@pytest.mark.parametrize("seed", range(40))
def test_a_plan_is_nearly_the_best_of_all(seed: int) -> None:
    draw = random.Random(seed)
    tables = [
        table(i, int(10 ** draw.uniform(1, 8)), draw.choice([16, 64, 256]), draw.choice([None, "sample"]))
        for i in range(draw.choice([2, 3]))
    ]
    ids = [10 ** draw.uniform(0, 6) for _ in tables]
    try:
        packer = packer_of(tables, ids, hbm_gib=draw.choice([2.0, 8.0, 40.0]), host_gib=draw.choice([4.0, 64.0]))
    except DoesNotFit:
        return
    found, best = best_packing(packer).rating, best_of_all(packer).rating
    assert bool(found[0]) == bool(best[0]), "a placement that fits is found where there is one"
    if not best[0]:
        assert found[1] <= 1.06 * best[1]


def test_a_table_makes_room_for_the_cache_of_another() -> None:
    """One change at a time finds no way out: the cache has no room before another table has left the device."""
    sizes = [(43_291_660, 16), (23_617_656, 32), (19_330_284, 64), (23_186_071, 16)]
    tables = [table(i, rows, columns) for i, (rows, columns) in enumerate(sizes)]
    tables[2:] = [replace(tables[2], dtype="float16", pooled="sample"), replace(tables[3], dtype="float16")]
    packer = packer_of(tables, [1200, 105_000, 125, 59_000], hbm_gib=1.88, host_gib=4.0)
    found, best = best_packing(packer), best_of_all(packer)
    assert found.rating[:2] == best.rating[:2]
    kernels = {options[index].kernel for options, index in zip(packer.options, found.choice, strict=True)}
    assert kernels == set(ALL_KERNELS)


def test_tables_too_wide_for_rows_are_cut_where_replicated_they_would_fill_every_rank() -> None:
    """40 tables of 2,048 columns, which a GPU's kernels take in blocks of columns or in plain PyTorch, on 64 ranks of 7
    GiB: a block of columns with the lookups of all ranks takes .6 GiB, a replica with those of one .4 GiB, but of each
    table."""
    machine = Machine(world_size=64, local_world_size=8, compute_device="cuda", hbm_gib=7.0)
    placement = PlacementConfig(reserved_fraction=0.0)
    tables = tuple(table(number, 10_000, 2048) for number in range(40))
    problem = Problem(
        tables=tables,
        machine=machine,
        placement=placement,
        optimizer=SparseOptimizerConfig(kind="adagrad"),
        load=BatchLoad(samples_per_rank=64, ids_per_sample={each.name: 50.0 for each in tables}),
        reservation=reserve(machine, placement, dense_bytes=0, tables=tables),
    )
    options = table_options(problem)
    needs = {o.kind.name: o.largest.memory_bytes for o in options[0] if len(o.pieces) in (0, 8)}
    assert 7 * 2**30 / 40 < needs["replicated"] < needs["column_wise"] < 7 * 2**30 / 8
    assert fits(make_packer(problem, options))
