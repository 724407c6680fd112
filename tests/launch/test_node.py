"""What runs on a node: torchrun's arguments, and the first node's name."""

import pytest

from launch.node import PORT_BASE, PORT_COUNT, first_node, job_port, torchrun_arguments

COMMAND = ["-m", "trainer", "train", "demo"]


def _arguments(nodes: int, environment: dict[str, str], node_rank: int = 0) -> list[str]:
    return torchrun_arguments(
        COMMAND,
        nodes=nodes,
        procs_per_node=4,
        node_rank=node_rank,
        job_id="17",
        first_node_variable="FIRST",
        environment=environment,
    )


def test_one_node_takes_a_free_port_of_its_own() -> None:
    arguments = _arguments(1, {})
    assert arguments[:6] == ["-m", "trainer.agent", "--nnodes", "1", "--nproc-per-node", "4"]
    assert arguments[arguments.index("--rdzv-endpoint") + 1] == "localhost:0"
    assert arguments[-4:] == COMMAND


def test_all_nodes_of_a_job_meet_at_one_port_of_the_first() -> None:
    for rank in range(3):
        arguments = _arguments(3, {"FIRST": "localhost"}, node_rank=rank)
        assert arguments[arguments.index("--node-rank") + 1] == str(rank)
        assert arguments[arguments.index("--master-addr") + 1] == "localhost"
        assert arguments[arguments.index("--master-port") + 1] == str(job_port("17"))
    assert job_port("17") != job_port("18")
    assert PORT_BASE <= job_port("17") < PORT_BASE + PORT_COUNT


def test_the_first_entry_of_a_list_is_the_first_node() -> None:
    assert first_node({"FIRST": "localhost,n2.invalid"}, "FIRST", node_rank=1) == "localhost"


def test_the_first_node_may_not_know_its_own_name() -> None:
    assert first_node({}, "FIRST", node_rank=0) == "localhost"


def test_another_node_must_know_the_first() -> None:
    with pytest.raises(ValueError, match="environment variable FIRST is not set on node 1"):
        first_node({}, "FIRST", node_rank=1)


def test_a_name_that_does_not_resolve_is_said_at_once() -> None:
    with pytest.raises(
        ValueError, match=r"the first node's name 'n1\.invalid' does not resolve on node 1 .*/etc/hosts"
    ):
        first_node({"FIRST": "n1.invalid"}, "FIRST", node_rank=1)
