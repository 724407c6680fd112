"""What a job runs on each of its nodes: find the first node, then become torchrun.

    python -m launch.node --nodes 2 --procs-per-node 8 --node-rank 0 --job-id 17 \
        --first-node-variable SLURM_JOB_NODELIST_HET_GROUP_0 -- -m trainer train RECIPE --run-dir DIR

Schedulers tell a node who the first one is through an environment variable, each through its own.  Reading it here
keeps shells and their quoting out of the job, and a name that does not resolve is one clear line at once; torchrun
would wait for it until its timeout.  This process imports no torch: it replaces itself with torchrun.
"""

import argparse
import os
import re
import socket
import sys
import zlib
from collections.abc import Mapping, Sequence

PORT_BASE, PORT_COUNT = 29500, 500
"""Jobs meet at ports in [PORT_BASE, PORT_BASE + PORT_COUNT), one a job: jobs that share a node rarely collide."""


def torchrun_arguments(
    command: Sequence[str],
    *,
    nodes: int,
    procs_per_node: int,
    node_rank: int,
    job_id: str,
    first_node_variable: str,
    environment: Mapping[str, str],
) -> list[str]:
    """Arguments for the Python interpreter that start torchrun on this node and `command` under it.

    Raises:
        ValueError: the first node is not known or its name does not resolve.
    """
    if nodes == 1:
        # Port 0: the agent picks a free one.  The loopback address serves machines that cannot resolve their own name.
        rendezvous = ["--rdzv-backend", "c10d", "--rdzv-id", job_id, "--rdzv-endpoint", "localhost:0"]
        rendezvous += ["--local-addr", "localhost"]
    else:
        # Fixed node ranks: rank 0 is on the first node, whose name was just resolved.  With torchrun's other rendezvous
        # rank 0 may be anywhere, and calls itself what only its own machine may understand.
        host = first_node(environment, first_node_variable, node_rank=node_rank)
        rendezvous = ["--node-rank", str(node_rank), "--master-addr", host, "--master-port", str(job_port(job_id))]
    size = ["--nnodes", str(nodes), "--nproc-per-node", str(procs_per_node)]
    return ["-m", "trainer.agent", *size, *rendezvous, *command]


def job_port(job_id: str) -> int:
    """The port that every node of the job computes alike."""
    return PORT_BASE + zlib.crc32(job_id.encode()) % PORT_COUNT


def first_node(environment: Mapping[str, str], variable: str, *, node_rank: int) -> str:
    """Host name of the first node, resolved once to be sure.

    Raises:
        ValueError: the variable is not set on a node other than the first, or the name does not resolve.
    """
    value = environment.get(variable, "")
    if not value and node_rank == 0:
        value = "localhost"
    if not value:
        raise ValueError(
            f"environment variable {variable} is not set on node {node_rank}: it names the job's first node"
        )
    # Slurm and Volcano give lists; the first entry is the first node.
    host = re.split(r"[,\s]", value)[0]
    try:
        socket.getaddrinfo(host, None)
    except OSError as error:
        raise ValueError(
            f"the first node's name {host!r} does not resolve on node {node_rank} ({socket.gethostname()}): {error}; "
            "make it known to DNS or /etc/hosts"
        ) from None
    return host


def main(arguments: Sequence[str]) -> None:
    """Parse the node's arguments and replace this process with torchrun's agent."""
    parser = argparse.ArgumentParser(prog="python -m launch.node", description="Start a job's processes on this node.")
    parser.add_argument("--nodes", type=int, required=True, help="nodes of the job")
    parser.add_argument("--procs-per-node", type=int, required=True, help="processes a node")
    parser.add_argument("--node-rank", type=int, required=True, help="this node's number, from 0")
    parser.add_argument("--job-id", required=True, help="the job's name at the scheduler, the same on every node")
    parser.add_argument("--first-node-variable", required=True, help="environment variable that names the first node")
    parser.add_argument("command", nargs="+", help="after --: what every process runs, as Python's arguments")
    given = parser.parse_args(arguments)
    try:
        torchrun = torchrun_arguments(
            given.command,
            nodes=given.nodes,
            procs_per_node=given.procs_per_node,
            node_rank=given.node_rank,
            job_id=given.job_id,
            first_node_variable=given.first_node_variable,
            environment=os.environ,
        )
    except ValueError as error:
        sys.exit(f"error: {error}")
    os.execv(sys.executable, [sys.executable, *torchrun])


if __name__ == "__main__":
    main(sys.argv[1:])
