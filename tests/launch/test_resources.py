"""Named machine types."""

import pytest

from launch.resources import MACHINES, Machine, machine_named


def test_names_are_their_own_keys() -> None:
    assert all(name == machine.name for name, machine in MACHINES.items())


def test_unsaid_memory_is_left_to_the_scheduler() -> None:
    assert Machine(name="unnamed", cpus=2, memory_mib=0, gpus=0).resource().memMB == -1


@pytest.mark.parametrize(
    ("name", "procs", "message"),
    [
        ("h100", 1, "unknown machine 'h100': known are .*h100-8"),
        ("h100-8", 9, "--procs-per-node 9 on machine h100-8, which has 8 GPUs: ask for at most 8"),
        ("cpu-2", 3, "--procs-per-node 3 on machine cpu-2, which has 2 cores"),
    ],
)
def test_impossible_machines_are_refused(name: str, procs: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        machine_named(name, procs_per_node=procs)
