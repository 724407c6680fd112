"""What a cache answers: as a cache that is simulated, all alike as before, and in plans, their files and reports."""

from collections import OrderedDict
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from embeddings.config import CACHED_PART, PlacementConfig, SparseOptimizerConfig, TableConfig
from embeddings.machine import Machine
from embeddings.plan import Plan
from embeddings.planning.frequencies import Frequencies, zipf
from embeddings.planning.plan_file import read_plan, write_plan
from embeddings.planning.problem import BatchLoad, Problem, reserve
from embeddings.planning.report import plan_report
from embeddings.planning.solver import solve
from trainer.lookups import item_frequencies

ROWS, LOOKUPS = 2000, 60_000


def simulated(ids: np.ndarray, room: int) -> float:
    """Part of the later half of the lookups that a cache of the last used rows answers."""
    cache: OrderedDict[int, None] = OrderedDict()
    hits = 0
    for number, row in enumerate(ids.tolist()):
        if row in cache:
            cache.move_to_end(row)
            hits += number >= len(ids) // 2
            continue
        cache[row] = None
        if len(cache) > room:
            cache.popitem(last=False)
    return hits / (len(ids) - len(ids) // 2)


@pytest.mark.parametrize("exponent", [0.5, 0.8, 1.0, 1.3])
@pytest.mark.parametrize("room", [20, 400])
def test_as_many_lookups_are_answered_as_by_a_simulated_cache(exponent: float, room: int) -> None:
    weights = np.arange(1, ROWS + 1) ** -exponent
    ids = np.random.default_rng(0).choice(ROWS, LOOKUPS, p=weights / weights.sum())
    assert zipf(ROWS, exponent).hit_rate(room) == pytest.approx(simulated(ids, room), abs=0.02)


def test_of_rows_that_are_all_looked_up_alike_a_cache_answers_its_part() -> None:
    alike = Frequencies(((1.0, 1 / ROWS), (float(ROWS), 1.0)))
    assert alike.hit_rate(CACHED_PART * ROWS) == pytest.approx(CACHED_PART)
    assert alike.hit_rate(ROWS) == 1


@pytest.mark.parametrize("exponent", [0.3, 1.0, 1.7, 4.0])
def test_zipfs_law_has_the_shares_of_its_sum(exponent: float) -> None:
    weights = np.arange(1.0, ROWS + 1) ** -exponent
    for rows, share in zipf(ROWS, exponent).points:
        assert share == pytest.approx(weights[: int(rows)].sum() / weights.sum(), rel=1e-3)


@pytest.mark.parametrize("points", [(), ((1.0, 0.5),), ((1.0, 0.5), (1.0, 1.0)), ((2.0, 0.6), (5.0, 0.5), (9.0, 1.0))])
def test_points_that_do_not_rise_to_all_lookups_are_refused(points: tuple[tuple[float, float], ...]) -> None:
    with pytest.raises(ValueError, match="frequencies are pairs of rows and their share"):
        Frequencies(points)


def test_a_preparations_counts_become_frequencies_of_few_items_too() -> None:
    counted = {"items": 6361, "top_item_share": 0.0066, "top_1_percent_share": 0.174, "top_10_percent_share": 0.599}
    known = item_frequencies(counted)
    assert known is not None and known.points[2] == (636.1, 0.599)
    # Less than if the cache held the hottest.
    assert 2 * CACHED_PART < known.hit_rate(CACHED_PART * 6361) < 0.75
    one = {"items": 1, "top_item_share": 1.0, "top_1_percent_share": 1.0, "top_10_percent_share": 1.0}
    few = {"items": 4, "top_item_share": 0.4, "top_1_percent_share": 0.4, "top_10_percent_share": 0.4}
    assert item_frequencies(one) == Frequencies(((1.0, 1.0),))
    assert item_frequencies(few) == Frequencies(((1.0, 0.4), (4.0, 1.0)))
    assert item_frequencies({}) is None


TABLE = TableConfig(name="item", num_embeddings=300_000_000, embedding_dim=128, features=("item",))


def problem(exponent: float | None) -> Problem:
    """A table that fits two GPUs only in host memory, looked up by Zipf's law or all rows alike."""
    machine = Machine(world_size=2, local_world_size=2, compute_device="cuda", hbm_gib=80.0, ddr_gib=300.0)
    placement = PlacementConfig(compute_kernels=("fused", "fused_uvm_caching"))
    frequencies = {} if exponent is None else {"item": zipf(TABLE.num_embeddings, exponent)}
    return Problem(
        tables=(TABLE,),
        machine=machine,
        placement=placement,
        optimizer=SparseOptimizerConfig(),
        load=BatchLoad(ids_per_sample={"item": 4096.0}, frequencies=frequencies),
        reservation=reserve(machine, placement, dense_bytes=0),
    )


def test_a_cached_table_costs_what_its_cache_does_not_answer() -> None:
    plans: list[Plan] = [solve(problem(exponent)) for exponent in (None, 0.8, 1.0, 1.2, 1.5)]
    assert {plan.tables["item"].kernel for plan in plans} == {"fused_uvm_caching"}
    times = [plan.step_ms for plan in plans]
    assert times == sorted(times, reverse=True) and times[-1] < times[0] / 4
    # As fast as device memory where everything is answered.
    work = problem(None).work(TABLE, "fused_uvm_caching")
    on_device = problem(None).work(TABLE, "fused").device_bytes_per_ms
    assert replace(work, hit_rate=1.0).device_bytes_per_ms == pytest.approx(on_device)


def test_a_plans_file_and_report_say_by_what_rate_it_was_made(tmp_path: Path) -> None:
    plan = solve(problem(1.2))
    write_plan(tmp_path / "plan.json", plan)
    assert read_plan(tmp_path / "plan.json", problem(1.2)) == plan
    assert "lookups that caches of 20% of the rows answer: item 9" in plan_report(plan)
    assert "caches" not in plan_report(solve(replace(problem(1.2), tables=(replace(TABLE, num_embeddings=10_000),))))
