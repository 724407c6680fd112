"""What a job runs on each of its nodes: find the first node, then start this node's processes and wait for them.

    python -m launch.node --nodes 2 --procs-per-node 8 --node-rank SLURM_NODEID \
        --first-node-variable TORCHX_RANK0_HOST -- -m trainer train RECIPE --run-dir DIR

Schedulers tell a node its number and the first one's name through environment variables, each through its own.  Reading
them here keeps shells and their quoting out of the job, and a name that does not resolve is one clear line at once.
"""

import argparse
import os
import random
import re
import socket
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from launch import signals
from launch.environment import check_environment
from launch.processes import Place, run_processes
from trainer.exit_status import FAILED, STOPPED, WRONG_USE
from trainer.health.limits import raise_limits
from trainer.health.output import outlive_output

DEFAULT_PORT = 29500
"""The port at which the job's processes meet, unless MASTER_PORT says otherwise: free in a container, which has its
own."""

LOWEST_PORT = 10000
GIVEN_PORTS = Path("/proc/sys/net/ipv4/ip_local_port_range")
"""The ports that the system gives to whoever asks for any."""

NODE_STATUS = {0: 0, STOPPED: STOPPED, WRONG_USE: 4, FAILED: 5}
"""The trainer's exit status -> the node's.  srun answers with the highest of all nodes, and a node that fails has the
others stopped, so a failure must be above a stop."""


def job_status(node_status: int) -> int:
    """The trainer's exit status, of the highest of all nodes'."""
    return next((ours for ours, of_node in NODE_STATUS.items() if of_node == node_status), FAILED)


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
    # Volcano gives a list; the first entry is the first node.
    host = re.split(r"[,\s]", value)[0]
    try:
        socket.getaddrinfo(host, None)
    except OSError as error:
        raise ValueError(
            f"the first node's name {host!r} does not resolve on node {node_rank} ({socket.gethostname()}): {error}; "
            "make it known to DNS or /etc/hosts"
        ) from None
    return host


def free_port() -> int:
    """A port that nothing on this machine uses at the moment.

    The first process listens there seconds later, when its imports are done.  So it is none of those that the system
    gives to connections meanwhile, where there are others, and at random: other jobs may look for one at this moment.

    Raises:
        OSError: a hundred are in use.
    """
    given_from = int(GIVEN_PORTS.read_text().split()[0])
    ports = range(LOWEST_PORT, given_from if given_from > LOWEST_PORT + 1000 else 2**16)
    for port in random.sample(ports, k=100):
        if not _refusal(port):
            return port
    raise OSError(f"no free port on {socket.gethostname()}: a hundred between {ports[0]} and {ports[-1]} are in use")


def check_port(port: int) -> None:
    """Make sure that the first process will be able to listen at `port`.

    Raises:
        ValueError: something else does.
    """
    why = _refusal(port)
    if why:
        raise ValueError(
            f"port {port} on {socket.gethostname()}, where the job's processes should meet, cannot be used ({why}): "
            "set MASTER_PORT to another one"
        )


def listen(port: int) -> socket.socket:
    """Listen at a port of all this machine's addresses, as the first process will.

    Raises:
        OSError: something else does.
    """
    # Connections of an earlier start that are not quite gone do not count.
    both = socket.has_dualstack_ipv6()
    return socket.create_server(("", port), family=socket.AF_INET6 if both else socket.AF_INET, dualstack_ipv6=both)


def _refusal(port: int) -> str:
    """Why nothing can listen at `port`; empty if something can."""
    try:
        listen(port).close()
    except OSError as error:
        return error.strerror or str(error)
    return ""


def place_of(
    *, nodes: int, procs_per_node: int, node_rank: str, first_node_variable: str, environment: Mapping[str, str]
) -> Place:
    """This node's place in the job.

    Args:
        nodes: machines of the job.
        procs_per_node: processes a machine.
        node_rank: this node's number, or the environment variable that holds it.
        first_node_variable: environment variable that names the first node.
        environment: this process's.

    Raises:
        ValueError: number, first node or port are not known, or cannot be used.
    """
    number = node_rank if node_rank.isdigit() else environment.get(node_rank, "")
    if not number.isdigit() or int(number) >= nodes:
        raise ValueError(
            f"this node's number should be in environment variable {node_rank}, below {nodes}; it is {number!r}"
        )
    if nodes == 1:
        # The loopback address serves machines that cannot resolve their own name.
        host, port = "127.0.0.1", free_port()
    else:
        host = first_node(environment, first_node_variable, node_rank=int(number))
        port = int(environment.get("MASTER_PORT", DEFAULT_PORT))
        if int(number) == 0:
            check_port(port)
    return Place(nodes=nodes, procs_per_node=procs_per_node, node_rank=int(number), first_host=host, port=port)


def main(arguments: Sequence[str]) -> int:
    """Parse the node's arguments and run its processes; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m launch.node", description="Start a job's processes on this node.")
    parser.add_argument("--nodes", type=int, required=True, help="nodes of the job")
    parser.add_argument("--procs-per-node", type=int, required=True, help="processes a node")
    parser.add_argument(
        "--node-rank", required=True, help="this node's number, from 0, or the environment variable that holds it"
    )
    parser.add_argument("--first-node-variable", required=True, help="environment variable that names the first node")
    parser.add_argument("command", nargs="+", help="after --: what every process runs, as Python's arguments")
    given = parser.parse_args(arguments)
    outlive_output()
    signals.hold()
    try:
        raise_limits(ranks=given.nodes * given.procs_per_node, processes=given.procs_per_node)
        check_environment()
        place = place_of(
            nodes=given.nodes,
            procs_per_node=given.procs_per_node,
            node_rank=given.node_rank,
            first_node_variable=given.first_node_variable,
            environment=os.environ,
        )
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return NODE_STATUS[FAILED]
    return NODE_STATUS.get(run_processes([sys.executable, *given.command], place), NODE_STATUS[FAILED])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
