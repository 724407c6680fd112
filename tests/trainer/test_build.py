"""Where a run's tables go is decided for what all its nodes have."""

import os
from dataclasses import replace

import pytest
import torch.distributed as dist

from embeddings.plan import Plan
from pipelines.reading.loader import dataset_info
from tests.support.distributed import run_ranks
from tests.support.small_data import small_dataset
from tests.support.training import SMALL
from trainer.build import agreed_machine, agreed_plan, machine_of, make_plan
from trainer.parallel.mesh import Mesh, discover_mesh
from trainer.recipes import load_recipe
from trainer.resolve import resolve
from trainer.typed_values import apply_overrides


def _on_a_node(*, procs_per_node: int, address: str) -> Mesh:
    """The place of a process that a launcher and Slurm have told its place."""
    os.environ |= {
        "RANK": str(dist.get_rank()),
        "WORLD_SIZE": str(dist.get_world_size()),
        "LOCAL_RANK": "0",
        "LOCAL_WORLD_SIZE": str(procs_per_node),
        "SLURM_TOPOLOGY_ADDR": address,
    }
    return discover_mesh()


def _planned() -> tuple[list[Plan], str]:
    """Plans of two nodes, in two racks and where nothing is known of racks; then what is said of unlike nodes."""
    config = apply_overrides(load_recipe("kuairand_sample"), [f"data.path={small_dataset()}", *SMALL])
    resolved, node = resolve(config, dataset_info(config.data)), dist.get_rank()
    plans = []
    for address in (f"spine.rack{node}.n{node}", f"n{node}"):
        mesh = _on_a_node(procs_per_node=1, address=address)
        # The second node has less memory than the first.
        plan = make_plan(resolved, replace(machine_of(mesh), ddr_gib=8.0 - node))
        plans.append(agreed_plan(plan, resolved, mesh))
    unlike = _on_a_node(procs_per_node=1 + node, address="")
    try:
        agreed_machine(machine_of(unlike), unlike)
    except ValueError as error:
        return plans, str(error)
    return plans, "agreed"


def test_nodes_racks_and_the_smallest_memory_reach_the_plan_of_every_rank() -> None:
    (first, said), second = run_ranks(2, _planned)
    assert [plan.machine.describe() for plan in first] == [
        "2 cpu ranks (2 x 1, 2 racks), 7 GiB each",
        "2 cpu ranks (2 x 1), 7 GiB each",
    ]
    assert second == (first, said)
    assert "runs 2 processes, node" in said
    assert said.endswith("runs 1: start as many on every node")


@pytest.mark.parametrize(("address", "rack"), [("spine.leaf.n1", "spine.leaf"), ("n1", ""), ("", "")])
def test_a_rack_is_what_slurm_says_of_a_nodes_switches(
    monkeypatch: pytest.MonkeyPatch, address: str, rack: str
) -> None:
    monkeypatch.setenv("SLURM_TOPOLOGY_ADDR", address)
    assert discover_mesh().rack == rack
