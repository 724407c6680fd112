"""The probe finds the rates with which the planner's estimates are what was measured, and its file is a machine's."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from embeddings.config import ComputeKernel, PlacementConfig, TableConfig
from embeddings.hardware import Rates, node_type
from embeddings.machine import Machine
from embeddings.measuring import probe
from embeddings.measuring.trial import OPTIMIZER
from embeddings.planning.frequencies import Frequencies
from embeddings.planning.problem import BatchLoad, Problem, reserve
from embeddings.planning.solver import solve

TRUE = Rates(
    device=2900.0,
    within_node=310.0,
    across_nodes=41.0,
    host_link=54.0,
    cached=700.0,
    uncached=31.0,
    lookup_group_ms=0.4,
    lookups_ms=1.7,
    id_ns=0.3,
    cache_ms=0.15,
    cache_id_ns=1.1,
)


def planned_ms(
    tables: list[TableConfig], ids: int, machine: Machine, kernel: ComputeKernel, *, hot_rows: int | None = None
) -> float:
    """What a machine of the true rates takes for a step, by the planner."""
    placement = PlacementConfig(sharding_types=(probe._kind(machine),), compute_kernels=(kernel,))
    true = Machine(
        world_size=machine.world_size,
        local_world_size=machine.local_world_size,
        compute_device="cuda",
        hbm_gib=141.0,
        rates=TRUE,
    )
    hot = {} if hot_rows is None else {table.name: Frequencies(((float(hot_rows), 1.0),)) for table in tables}
    ids_of = {table.features[0]: float(ids) for table in tables}
    load = BatchLoad(samples_per_rank=1, ids_per_sample=ids_of, frequencies=hot)
    reservation = reserve(true, placement, dense_bytes=0)
    return solve(
        Problem(
            tables=tuple(tables),
            machine=true,
            placement=placement,
            optimizer=OPTIMIZER,
            load=load,
            reservation=reservation,
        )
    ).step_ms


@pytest.mark.parametrize("world_size", [1, 8, 16])
@pytest.mark.parametrize(
    ("kernel", "rate"), [("fused", "device"), ("fused_uvm_caching", "cached"), ("fused_uvm", "uncached")]
)
def test_rates_are_found_that_make_the_estimates_true(
    kernel: ComputeKernel, rate: str, world_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(probe, "_step_ms", planned_ms)
    guess: dict[str, Any] = {"device": TRUE.device if rate != "device" else 1000.0}
    known = {name: getattr(TRUE, name) for name in ("id_ns", "cache_id_ns")}
    rates = Rates(**guess, **known, within_node=310.0, across_nodes=41.0, host_link=54.0)
    machine = Machine(
        world_size=world_size,
        local_world_size=min(world_size, 8),
        compute_device="cuda",
        hbm_gib=141.0,
        rates=rates,
    )
    assert probe._lookup_rate(machine, kernel, rate) == pytest.approx(getattr(TRUE, rate), rel=1e-6)
    assert probe._group_ms(machine) == pytest.approx(TRUE.lookup_group_ms, rel=0.05)
    assert probe._lookups_ms(replace(machine, rates=TRUE)) == pytest.approx(TRUE.lookups_ms, rel=1e-6)
    assert probe._cache_ms(machine) == pytest.approx((TRUE.cache_ms, TRUE.cache_id_ns), rel=1e-6)
    assert probe._error(replace(machine, rates=TRUE)) == pytest.approx(0.0, abs=1e-9)
    monkeypatch.setattr(probe, "_step_ms", lambda *arguments: planned_ms(*arguments) / 1.25)
    assert probe._error(replace(machine, rates=TRUE)) == pytest.approx(0.25)


def test_a_machine_that_tells_no_rate_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "_step_ms", lambda *_: 1.0)
    machine = Machine(world_size=1, local_world_size=1, compute_device="cuda", hbm_gib=141.0, rates=TRUE)
    with pytest.raises(ValueError, match="measure again while nothing else runs"):
        probe._lookup_rate(machine, "fused", "device")


@pytest.mark.slow
def test_command_measures_two_processes_and_writes_a_machines_file(tmp_path: Path) -> None:
    out = tmp_path / "here.json"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["-m", "embeddings", "probe", "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    node = node_type(str(out))
    assert node.gpus == 0 and node.rates.lookup_group_ms > 0
    assert (
        "exchange of 2 ranks" in node.calibration
        and "other lookups planned" in node.calibration
        and json.loads(out.read_text())["rates"]["within_node"] > 0
    )
    assert done.stdout.count("written to") == 1
