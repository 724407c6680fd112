"""Capacity planning: each answer is the planner's for that cluster, the front is right, wrong files are named."""

import json
import re
import subprocess
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from embeddings.__main__ import main
from embeddings.config import PlacementConfig, SparseOptimizerConfig, TableConfig
from embeddings.hardware import GPUS, NODES
from embeddings.machine import Machine
from embeddings.planning.capacity import Copies, clusters, pareto, rank_numbers, read_nodes, read_prices
from embeddings.planning.capacity_report import capacity_page, capacity_text
from embeddings.planning.demand import read_demand
from embeddings.planning.problem import GIB, BatchLoad, Problem, reserve
from embeddings.planning.solver import solve

TABLES: dict[str, Any] = {
    "tables": [
        {"name": "item", "num_embeddings": 1_000_000_000, "embedding_dim": 128, "ids_per_sample": 4096.0},
        {"name": "city", "num_embeddings": 10_000, "embedding_dim": 16, "dtype": "float16"},
    ],
    "samples_per_rank": 32,
    "dense_gib": 1.5,
    "activation_gib": 20.0,
    "dense_ms": 40.0,
}
OWN = {
    "gpus": 4,
    "hbm_gib": 200.0,
    "host_gib": 800.0,
    "rates": {"device": 5000.0, "within_node": 600.0, "across_nodes": 80.0, "host_link": 60.0},
}


@pytest.fixture
def tables(tmp_path: Path) -> Path:
    """The tables' file."""
    path = tmp_path / "tables.json"
    path.write_text(json.dumps(TABLES))
    return path


def test_an_answer_is_the_planners(tables: Path) -> None:
    (found,) = clusters(read_demand(tables), {"h100x8": NODES["h100-8"]}, [16], samples=1e6, prices={"h100x8": 80.0})
    machine = Machine(
        world_size=16,
        local_world_size=8,
        compute_device="cuda",
        hbm_gib=GPUS["H100-80"].hbm_gib,
        ddr_gib=225.0,
        rates=GPUS["H100-80"].rates,
    )
    placement = PlacementConfig(activation_gib=20.0)
    plan = solve(
        Problem(
            tables=(
                TableConfig(name="item", num_embeddings=1_000_000_000, embedding_dim=128, features=("item",)),
                TableConfig(name="city", num_embeddings=10_000, embedding_dim=16, features=("city",), dtype="float16"),
            ),
            machine=machine,
            placement=placement,
            optimizer=SparseOptimizerConfig(),
            load=BatchLoad(samples_per_rank=32, ids_per_sample={"item": 4096.0}),
            reservation=reserve(machine, placement, dense_bytes=int(1.5 * GIB)),
        )
    )
    assert found.plan is not None and found.plan.tables == plan.tables and found.plan.ranks == plan.ranks
    assert found.step_ms == plan.step_ms + 40
    assert found.samples_per_s == pytest.approx(16 * 32 / found.step_ms * 1000)
    # A million samples, in hours of 16 GPUs, of which a node of 8 costs 80 an hour.
    assert found.gpu_hours == pytest.approx(1e6 / found.samples_per_s / 3600 * 16)
    assert found.price == pytest.approx(found.gpu_hours * 10)


def test_copies_are_planned_as_a_groups_tables_and_the_average_of_what_they_hold(tables: Path) -> None:
    demand, node = read_demand(tables), {"h200x8": NODES["h200-8"]}
    (group,) = clusters(demand, node, [16], samples=1e6, prices={})
    every = {
        steps: clusters(demand, node, [64], samples=1e6, prices={}, copies=[Copies(number=4, averaged_every=steps)])[0]
        for steps in (1, 100)
    }
    assert group.plan is not None
    for steps, found in every.items():
        assert found.plan == group.plan and (found.ranks, found.copies) == (64, 4)
        held = max(rank.weight_bytes + rank.optimizer_bytes for rank in group.plan.ranks)
        # Three quarters are sent on and three quarters come back, at 50 GB/s across nodes.
        assert found.step_ms - group.step_ms == pytest.approx(1.5 * held / 50e6 / steps)
    text = capacity_text(list(every.values()), 1e6)
    assert "as if its part of the batch were all" in text and "as if" not in capacity_text([group], 1e6)


@pytest.mark.parametrize(
    ("ranks", "copies", "dense", "message"),
    [
        ([8, 12], [1], {}, "12 ranks are no whole number of nodes h100x8"),
        ([8, 2**21], [1], {}, "which is no cluster"),
        ([8], [1, 3], {}, "cannot hold 3 copies"),
        ([8], [1], {"dense_ms": 0.0, "dense_tflop": 3.0, "dense_mfu": 0.3}, "h100x8 needs bf16_tflops"),
    ],
)
def test_what_no_cluster_can_have_is_refused_before_any_is_planned(
    tmp_path: Path, ranks: list[int], copies: list[int], dense: dict[str, float], message: str
) -> None:
    (tmp_path / "tables.json").write_text(json.dumps(TABLES | dense))
    begun: list[str] = []
    with pytest.raises(ValueError, match=message):
        clusters(
            read_demand(tmp_path / "tables.json"),
            {"h100x8": replace(NODES["h100-8"], bf16_tflops=None)},
            ranks,
            samples=1e6,
            prices={},
            copies=[Copies(number=number) for number in copies],
            begin=begun.append,
        )
    assert not begun


def test_no_cluster_of_the_front_is_beaten_and_every_other_is(tables: Path) -> None:
    nodes = {name: node for name, node in NODES.items() if node.gpus == 8}
    found = clusters(
        read_demand(tables), nodes, [8, 16, 32, 64], samples=1e6, prices={name: 70.0 + len(name) for name in nodes}
    )
    best = pareto(found)
    assert 0 < len(best) < len(found)

    def beats(a: Any, b: Any) -> bool:
        no_worse = a.samples_per_s >= b.samples_per_s and a.price <= b.price
        return no_worse and (a.samples_per_s > b.samples_per_s or a.price < b.price)

    for cluster in found:
        if cluster.plan is None:
            assert cluster not in best and "do not fit" in cluster.problem
        else:
            assert (cluster in best) != any(beats(other, cluster) for other in found if other.plan is not None)


def test_command_answers_without_torch_and_writes_a_page_without_links(tables: Path, tmp_path: Path) -> None:
    own, page = tmp_path / "own.json", tmp_path / "page.html"
    own.write_text(json.dumps(OWN))
    command = [sys.executable, "-X", "importtime", "-m", "embeddings", "plan", str(tables), "--ranks", "8..32"]
    command += ["--machines", f"h200x8,{own}", "--html", str(page)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "torch" not in done.stderr
    rows = [line.strip(" *>").split() for line in done.stdout.splitlines()[1:-1]]
    assert [row[:2] for row in rows] == [[name, str(n)] for name in ("h200x8", "own") for n in (8, 16, 32)]
    tags: list[str] = []

    class Tags(HTMLParser):
        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            tags.append(tag)
            assert not {"src", "href"} & {name for name, _ in attrs}

    Tags().feed(page.read_text())
    assert tags.count("summary") == 6 and "script" not in tags
    # Of each rank a bar of its memory and one of its time.
    assert page.read_text().count("<title>rank ") == 2 * 2 * (8 + 16 + 32)


def test_page_escapes_what_files_say(tables: Path) -> None:
    nodes = {"<b>": NODES["h100-8"]}
    text = capacity_page(clusters(read_demand(tables), nodes, [8], samples=1.0, prices={}), 1.0)
    assert "<b>" not in text and "&lt;b&gt;" in text


def test_nothing_fits_is_status_1_with_what_is_missing(tables: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(tables), "--machines", "a100-40x8", "--ranks", "8"]) == 1
    *_, missing, answer = capsys.readouterr().out.splitlines()
    assert missing.startswith("a100-40x8: the tables do not fit on 8 cuda ranks") and "fixes: " in missing
    assert answer == "none of these clusters holds one copy of the tables"


def test_each_type_of_node_says_what_it_lacks_where_no_number_of_them_will_do(
    tables: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", str(tables), "--machines", "a100-40x8,h200x8", "--ranks", "4..8"]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if ": the tables do not fit" in line]
    assert [line.partition(":")[0] for line in lines] == ["a100-40x8"] and "on 8 cuda ranks" in lines[0]


def test_nodes_are_paid_whole(tables: Path) -> None:
    demand, node = read_demand(tables), {"h200x8": NODES["h200-8"]}
    part, whole = clusters(demand, node, [4, 8], samples=1e6, prices={"h200x8": 80.0})
    assert (part.price, whole.price) == (part.hours * 80, whole.hours * 80)


def test_dense_model_takes_its_operations_at_a_part_of_the_peak(tables: Path) -> None:
    """12 TFLOP at 0.3 of 989 TFLOP/s; a node that does not say its peak cannot tell."""
    tables.write_text(json.dumps(TABLES | {"dense_ms": 0.0, "dense_tflop": 12.0, "dense_mfu": 0.3}))
    demand = read_demand(tables)
    (found,) = clusters(demand, {"h100x8": NODES["h100-8"]}, [16], samples=1e6, prices={})
    assert found.plan is not None and found.step_ms == pytest.approx(found.plan.step_ms + 12.0 / (989 * 0.3) * 1000)
    own = tables.with_name("own.json")
    own.write_text(json.dumps(OWN))
    with pytest.raises(ValueError, match="own needs bf16_tflops"):
        clusters(demand, read_nodes([str(own)]), [16], samples=1e6, prices={})


def test_answer_is_the_cheapest_cluster_that_trains_a_days_samples_in_a_day(
    tables: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One rank more or less does not change the price of a sample much: the least that keeps up is the answer."""
    prices = tmp_path / "prices.json"
    prices.write_text(json.dumps({"h100x8": 60.0, "h200x8": 80.0}))
    arguments = ["plan", str(tables), "--machines", "h100x8,h200x8", "--ranks", "8..64", "--prices", str(prices)]
    assert main([*arguments, "--samples-per-day", "2e9"]) == 0
    *rows, answer = capsys.readouterr().out.splitlines()
    assert answer.startswith("cheapest for 2,000,000,000 samples a day: h100x8, 32 ranks")
    assert [line[2] for line in rows if "too slow" in line] == [" "] * 3
    assert main([*arguments, "--samples-per-day", "1e12"]) == 1
    assert "none of these trains 1,000,000,000,000 samples a day: the fastest, h" in capsys.readouterr().out


def test_numbers_of_ranks_double() -> None:
    assert rank_numbers("8..100") == [8, 16, 32, 64]
    assert rank_numbers("24") == [24]


@pytest.mark.parametrize(
    ("change", "arguments", "message"),
    [
        ({"tables": []}, [], "at least one table"),
        ({"colour": 1}, [], "unknown key 'colour'"),
        ({"tables": {"name": "a"}}, [], "key 'tables' must be a list"),
        ({"tables": [5]}, [], "key 'tables[0]' must be"),
        ({"tables": [{"name": "a"}]}, [], "key 'tables[0].embedding_dim' is missing"),
        ({"tables": [TABLES["tables"][0]] * 2}, [], "there are two tables 'item'"),
        ({"tables": [{**TABLES["tables"][0], "num_embeddings": 1.5}]}, [], "num_embeddings' must be an integer"),
        ({"tables": [{**TABLES["tables"][0], "features": []}]}, [], "has no features"),
        ({"tables": [{**TABLES["tables"][0], "optimizer": {"kind": "lion"}}]}, [], "kind' must be one of"),
        ({"tables": [{**TABLES["tables"][0], "dtype": "int4"}]}, [], "dtype' must be one of"),
        ({"compute_kernels": ["gpu"]}, [], "compute_kernels[0]' must be one of fused"),
        ({"samples_per_rank": "8"}, [], "key 'samples_per_rank' must be an integer"),
        ({"tables": [{**TABLES["tables"][0], "ids_per_sample": -1}]}, [], "must be above 0"),
        ({"compute_kernels": []}, [], "at least one choice"),
        ({}, ["--machines", "h800x8"], "unknown machine 'h800x8': known are cpu-2"),
        ({}, ["--machines", "missing.json"], "cannot read missing.json"),
        ({}, ["--ranks", "8.."], "--ranks must be a number or FIRST..LAST"),
        ({}, ["--ranks", "16..8"], "--ranks must be a number or FIRST..LAST"),
        ({}, ["--ranks", "1" + 20 * "0"], "which is no cluster"),
        ({}, ["--html", "missing/page.html"], "there is no folder missing"),
        ({"tables": [{**TABLES["tables"][0], "ids_per_sample": 1e308}]}, [], "less than 2^63 a rank"),
        ({"tables": [{**TABLES["tables"][0], "num_embeddings": 10**30}]}, [], "which no memory holds"),
        ({}, ["--ranks", "12"], "12 ranks are no whole number of nodes h100x8"),
        ({}, ["--copies", "3"], "8 ranks on nodes of 8 cannot hold 3 copies: groups must be whole nodes or"),
        ({}, ["--copies", "0"], "must be at least 1, got 0"),
        ({"compute_kernels": ["fused_uvm"]}, ["--copies", "2"], "copies are planned for rows in device memory alone"),
        ({}, ["--samples-per-day", "0"], "--samples-per-day must be a number above 0"),
        ({}, ["--prices", "missing.json"], "cannot read missing.json"),
        ({}, ["--prices", "PRICES"], "'h800x8' is none of --machines, which are h100x8"),
        ({"dense_tflop": 3.0, "dense_mfu": 0.3}, [], "dense_ms and dense_tflop both"),
        ({"dense_ms": 0.0, "dense_tflop": 3.0}, [], "goes with a dense_mfu in (0, 1]"),
        ({"dense_ms": -1.0}, [], "must be at least 0"),
        ({"dense_gib": 1e308}, [], "dense_gib must be at least 0 and at most"),
        ({"activation_gib": 1e308}, [], "activation_gib must be at least 0 and below"),
        ({"dense_ms": 0.0, "dense_tflop": 3.0, "dense_mfu": 1e-308}, [], "goes with a dense_mfu in (0, 1]"),
        ({"cached_part": 1.5}, [], "cached_part must lie in (0, 1]"),
        ({"tables": [{**TABLES["tables"][0], "bags_per_sample": 2.0}]}, [], "has no effect, as it is not pooled"),
        (
            {"tables": [{**TABLES["tables"][0], "name": name, "features": ["f"]} for name in "ab"]},
            [],
            "looked up twice",
        ),
        ({}, ["--ranks", "\u00b2"], "--ranks must be a number or FIRST..LAST"),
        ({}, ["--machines", "cpu-16"], "which cpu-16 has none of"),
        ({}, ["--machines", "h100x8,h100-8"], "names 'h100-8' twice"),
        ({}, ["--machines", "h800x8, h100x8", "--prices", "PRICES"], "unknown machine 'h800x8'"),
    ],
)
def test_wrong_file_or_option_is_named_in_one_line(
    tables: Path, capsys: pytest.CaptureFixture[str], change: dict[str, Any], arguments: list[str], message: str
) -> None:
    tables.write_text(json.dumps(TABLES | change))
    prices = tables.with_name("prices.json")
    prices.write_text(json.dumps({"h800x8": 60.0}))
    arguments = [str(prices) if argument == "PRICES" else argument for argument in arguments]
    assert main(["plan", str(tables), "--machines", "h100x8", "--ranks", "8", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and message in error


@pytest.mark.parametrize("price", ["Infinity", "NaN", "0", "true", '"60"'])
def test_wrong_or_missing_price_is_named(price: str, tmp_path: Path) -> None:
    path = tmp_path / "prices.json"
    path.write_text(f'{{"h100x8": {price}}}')
    with pytest.raises(ValueError, match=r"the price of 'h100x8' must be a number above 0"):
        read_prices(path, ["h100x8"])
    with pytest.raises(ValueError, match="has no price of 'h200x8'"):
        read_prices(path, ["h200x8", "h100x8"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"tables": 1, "tables": 2}', "the key 'tables' is there twice"),
        ("[" * 100_000, "nested too deeply"),
        ("", "is not JSON"),
        ("[]", "must hold a JSON object"),
    ],
)
def test_a_file_that_is_no_object_is_named(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "tables.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=message) as error:
        read_demand(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_a_byte_order_mark_is_no_fault(tables: Path) -> None:
    plain = read_demand(tables)
    tables.write_text("\ufeff" + tables.read_text(), encoding="utf-8")
    assert read_demand(tables) == plain


def test_rows_wider_than_the_kernels_of_a_gpu_are_cut_or_whole_on_every_rank(tables: Path) -> None:
    """FBGEMM's kernels look up zeros beyond 1,024 columns."""
    wide = {"name": "wide", "num_embeddings": 1000, "embedding_dim": 2048}
    nodes = read_nodes(["h100x8"])
    for optimizer, kinds in (("adagrad", {"column_wise", "replicated"}), ("rowwise_adagrad", {"replicated"})):
        tables.write_text(json.dumps({"tables": [wide | {"optimizer": {"kind": optimizer}}]}))
        (found,) = clusters(read_demand(tables), nodes, [8], samples=1.0, prices={})
        assert found.plan is not None
        considered = {candidate.sharding_type for candidate in found.plan.tables["wide"].candidates}
        assert considered == kinds
        assert all(len(shard.columns) <= 1024 or kinds == {"replicated"} for shard in found.plan.shards("wide"))
    tables.write_text(json.dumps({"tables": [wide]}))
    one, two = clusters(read_demand(tables), nodes, [1, 2], samples=1.0, prices={})
    assert one.plan is None and two.plan is not None
    assert "table 'wide' cannot be placed on 1 cuda ranks" in one.problem
    assert "table_wise, row_wise: FBGEMM's kernels" in one.problem and "replicated: " in one.problem


def test_wrong_machine_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "own.json"
    rates: Any = OWN["rates"]
    changes: list[dict[str, Any]] = [{"rates": {"device": 1}}, {"rates": 5}, {"rates": rates | {"device": -1.0}}]
    changes += [{"gpus": 0}, {"gpus": 4.5}, {"tpus": 1}, {"hbm_gib": "80"}, {"hbm_gib": -3}, {"host_gib": None}]
    changes += [{"calibration": "two\nlines"}, {"bf16_tflops": 1e-308}]
    changes += [{"rates": rates | {"device": 1e-308}}, {"rates": rates | {"id_ns": 1e308}}]
    for change in changes:
        path.write_text(json.dumps(OWN | change))
        with pytest.raises(ValueError, match=r"own\.json: a machine has gpus"):
            read_nodes([str(path)])


def test_copies_that_do_not_fit_name_what_lacks_and_no_fix_for_one_copy(tables: Path) -> None:
    tables.write_text(json.dumps({"tables": [{"name": "item", "num_embeddings": 10**9, "embedding_dim": 128}]}))
    nodes, copies = read_nodes(["h100x8"]), [Copies(number=2)]
    (found,) = clusters(read_demand(tables), nodes, [8], samples=1e6, prices={}, copies=copies)
    assert found.plan is None and found.problem.startswith("each of 2 copies: the tables do not fit on 4 cuda ranks")
    assert "of device memory" in found.problem and "fixes" not in found.problem


@pytest.mark.parametrize("ranks", [1, 3, 5])
def test_a_part_of_a_node_is_told_to_take_whole_ones_that_hold_the_tables(tables: Path, ranks: int) -> None:
    demand, node = read_demand(tables), {"h100x8": NODES["h100-8"]}
    (small,) = clusters(demand, node, [ranks], samples=1e6, prices={})
    told = re.search(r"use more ranks \(at least (\d+)\)", small.problem)
    assert small.plan is None and told is not None
    (found,) = clusters(demand, node, [int(told[1])], samples=1e6, prices={})
    assert found.plan is not None and int(told[1]) == 16


def test_a_memory_of_a_machine_file_that_nobody_has_is_named(tables: Path) -> None:
    own = tables.with_name("own.json")
    own.write_text(json.dumps(OWN | {"hbm_gib": 1e300}))
    with pytest.raises(ValueError, match=r"memory must be a number of GiB above 0 and at most 2\^33"):
        clusters(read_demand(tables), read_nodes([str(own)]), [8], samples=1e6, prices={})
