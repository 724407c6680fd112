"""The report names every table, its reasons and every rank's memory; the comparison counts the rows that move."""

import doctest
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from torch import nn

import embeddings.plan
import embeddings.planning.report
from embeddings.__main__ import main
from embeddings.config import PlacementConfig, SparseOptimizerConfig, TableConfig, TableConstraint
from embeddings.machine import Machine
from embeddings.plan import Plan
from embeddings.planner import plan_tables
from embeddings.planning.plan_file import write_plan
from embeddings.planning.problem import BatchLoad
from embeddings.planning.report import plan_differences, plan_report, plan_summary

TABLES = (
    TableConfig(name="item", num_embeddings=64_000_000, embedding_dim=64, features=("item",)),
    TableConfig(name="user", num_embeddings=1_000_000, embedding_dim=64, features=("user",)),
)


def plan(world_size: int = 16, item: tuple[str, ...] = ("table_wise", "row_wise")) -> Plan:
    """A plan in which the item table may be sharded as `item` says."""
    return plan_tables(
        nn.Linear(4, 4),
        TABLES,
        machine=Machine(
            world_size=world_size, local_world_size=min(8, world_size), compute_device="cuda", hbm_gib=80.0
        ),
        placement=PlacementConfig(
            sharding_types=("table_wise", "row_wise"), tables={"item": TableConstraint(sharding_types=item)}
        ),
        optimizer=SparseOptimizerConfig(),
        load=BatchLoad(samples_per_rank=32, ids_per_sample={"item": 1000.0}),
    )


def test_examples_in_docstrings() -> None:
    for module in (embeddings.plan, embeddings.planning.report):
        assert doctest.testmod(module).failed == 0


def test_report_shows_placement_reasons_and_memory() -> None:
    made = plan()
    report = plan_report(made)
    lines = report.splitlines()
    assert "16 cuda ranks (2 x 8), 80 GiB each, bandwidths of H100-80" in lines[0]
    item = next(line.split() for line in lines if line.startswith("  item "))
    assert item == ["item", "64,000,000", "x", "64", "15.26", "GiB", "row_wise", "fused", "0-15", item[-1]]
    reason = next(line for line in lines if line.startswith("  item: "))
    assert "row_wise" in reason.split(";")[0]
    assert "table_wise" in reason.split(";")[1]
    # 65M rows of 64 float32 over 16 ranks, and one float32 a row.
    first = next(line for line in lines if line.lstrip().startswith("0-15"))
    assert " 991.82 MiB  15.50 MiB " in first
    assert "imbalance (largest over mean): memory 1.00, time 1.00" in report
    assert report.isascii()
    # A run says less of it.
    assert set(plan_summary(made).splitlines()) < set(lines)


def test_one_rank_sends_nothing() -> None:
    assert "a rank sends" in plan_report(plan())
    assert "a rank sends" not in plan_report(plan(world_size=1, item=("table_wise",)))


def test_report_of_a_thousand_ranks_fits_a_screen() -> None:
    report = plan_report(plan(world_size=1024))
    assert len(report.splitlines()) < 60
    assert "0-1023" in report


def test_differences_count_the_rows_that_move() -> None:
    cut, whole = plan(item=("row_wise",)), plan(item=("table_wise",))
    assert plan_differences(cut, cut) == "the plans place every row alike"
    text = plan_differences(cut, whole)
    # One of sixteen blocks is already on the rank that gets the whole table.
    assert "item: row_wise/fused on 0-15 -> table_wise/fused on" in text
    assert "14.31 GiB of rows move" in text


def test_differences_name_added_removed_and_reshaped_tables() -> None:
    old = plan()
    new = replace(old, tables={"item": replace(old.tables["item"], num_embeddings=5), "extra": old.tables["user"]})
    text = plan_differences(old, new)
    assert "extra: added" in text
    assert "user: removed" in text
    assert "item: 64,000,000 x 64 -> 5 x 64" in text


def test_command_prints_plans_and_differences_without_torch(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_plan(tmp_path / "a.json", plan(item=("row_wise",)))
    write_plan(tmp_path / "b.json", plan(item=("table_wise",)))
    command = [sys.executable, "-X", "importtime", "-m", "embeddings", str(tmp_path / "a.json")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout == plan_report(plan(item=("row_wise",))) + "\n"
    assert "torch" not in done.stderr
    reading, writing = os.pipe()
    os.close(reading)
    cut = subprocess.run(command[:1] + command[3:], stdout=writing, stderr=subprocess.PIPE, text=True, check=False)
    os.close(writing)
    assert (cut.returncode, cut.stderr) == (-signal.SIGPIPE, ""), "`| head` has seen enough"
    assert main([str(tmp_path / "a.json"), str(tmp_path / "b.json")]) == 0
    assert "14.31 GiB of rows move" in capsys.readouterr().out
    assert main([str(tmp_path / "c.json")]) == 2
    assert capsys.readouterr().err.startswith("error: cannot read")
