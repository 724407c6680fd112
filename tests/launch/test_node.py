"""What runs on a node: its number, the first node's name and the port where processes meet."""

import socket
from pathlib import Path

import pytest

from launch.node import DEFAULT_PORT, first_node, free_port, place_of
from launch.processes import Place


def _place(nodes: int, environment: dict[str, str], node_rank: str = "0") -> Place:
    return place_of(
        nodes=nodes, procs_per_node=4, node_rank=node_rank, first_node_variable="FIRST", environment=environment
    )


def test_one_node_takes_a_free_port_of_its_own() -> None:
    place = _place(1, {})
    assert (place.first_host, place.node_rank) == ("127.0.0.1", 0)
    with socket.socket() as sock:
        sock.bind(("", place.port))


def test_a_free_port_is_none_that_a_connection_may_take_meanwhile() -> None:
    first, last = map(int, Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split())
    if first < 20000:
        pytest.skip(f"this system gives ports from {first} on")
    ports = [free_port() for _ in range(20)]
    assert not set(ports) & set(range(first, last + 1))
    # Two jobs that look at the same moment find different ones.
    assert len(set(ports)) > 15


def test_all_nodes_of_a_job_meet_at_one_port_of_the_first() -> None:
    port = str(free_port())
    places = [_place(3, {"FIRST": "localhost", "MASTER_PORT": port}, node_rank=str(rank)) for rank in range(3)]
    assert {(place.first_host, place.port) for place in places} == {("localhost", int(port))}
    assert [place.rank(1) for place in places] == [1, 5, 9]
    assert _place(3, {"FIRST": "localhost"}, node_rank="1").port == DEFAULT_PORT


def test_a_number_may_come_from_the_environment() -> None:
    assert _place(3, {"FIRST": "localhost", "NUMBER": "2"}, node_rank="NUMBER").node_rank == 2
    for environment in ({}, {"NUMBER": "x"}, {"NUMBER": "3"}):
        with pytest.raises(ValueError, match="this node's number should be in environment variable NUMBER, below 3"):
            _place(3, {"FIRST": "localhost", **environment}, node_rank="NUMBER")


def test_a_port_that_something_else_uses_is_named() -> None:
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ValueError, match=f"port {port} on .* cannot be used .*set MASTER_PORT to another one"):
            _place(2, {"FIRST": "localhost", "MASTER_PORT": str(port)})
        # Only the first node listens.
        assert _place(2, {"FIRST": "localhost", "MASTER_PORT": str(port)}, node_rank="1").port == port


def test_the_first_entry_of_a_list_is_the_first_node() -> None:
    assert first_node({"FIRST": "localhost,n2.invalid"}, "FIRST", node_rank=1) == "localhost"


def test_the_first_node_may_not_know_its_own_name_but_another_must() -> None:
    assert first_node({}, "FIRST", node_rank=0) == "localhost"
    with pytest.raises(ValueError, match="environment variable FIRST is not set on node 1"):
        first_node({}, "FIRST", node_rank=1)


def test_a_name_that_does_not_resolve_is_said_at_once() -> None:
    with pytest.raises(
        ValueError, match=r"the first node's name 'n1\.invalid' does not resolve on node 1 .*/etc/hosts"
    ):
        first_node({"FIRST": "n1.invalid"}, "FIRST", node_rank=1)
