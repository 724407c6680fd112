"""What jobs ask for: whole machines of the hardware table or of a file."""

import json
from pathlib import Path

import pytest

from embeddings.hardware import NODES
from launch.resources import requested

OWN = {
    "cpus": 24,
    "gpus": 4,
    "hbm_gib": 79.6,
    "host_gib": 500,
    "rates": {"device": 3000, "within_node": 400, "across_nodes": 40, "host_link": 50},
}


@pytest.mark.parametrize("name", NODES)
def test_a_job_asks_for_the_whole_machine(name: str) -> None:
    node = NODES[name]
    resource = requested(name, procs_per_node=1)
    assert (resource.cpu, resource.gpu, resource.memMB) == (node.cpus, node.gpus, node.host_gib * 1024)


def test_without_a_machine_memory_is_left_to_the_scheduler() -> None:
    assert requested(None, procs_per_node=2).memMB == -1


def test_a_file_describes_a_machine(tmp_path: Path) -> None:
    path = tmp_path / "own.json"
    path.write_text(json.dumps(OWN))
    resource = requested(str(path), procs_per_node=4)
    assert (resource.cpu, resource.gpu, resource.memMB) == (24, 4, 512_000)
    path.write_text(json.dumps({key: value for key, value in OWN.items() if key != "cpus"}))
    with pytest.raises(ValueError, match="how many cores it has, which a job asks for: add its cpus"):
        requested(str(path), procs_per_node=4)


@pytest.mark.parametrize(
    ("name", "procs", "message"),
    [
        ("h100", 1, "unknown machine 'h100': known are .*h100-8"),
        ("h100-8", 9, "--procs-per-node 9 on machine h100-8, which has 8 GPUs: ask for at most 8"),
        ("cpu-2", 3, "--procs-per-node 3 on machine cpu-2, which has 2 cores"),
        ("missing.json", 3, "cannot read missing.json"),
    ],
)
def test_impossible_machines_are_refused(name: str, procs: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        requested(name, procs_per_node=procs)
