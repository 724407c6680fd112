"""The processes of a job: who am I, which device is mine, how do I reach the others.

This is the only place with rank arithmetic.  A process started plainly is a job of one; torchrun's variables
(RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR, MASTER_PORT) make it one of many.
"""

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import HashStore, Store
from torch.distributed.rendezvous import rendezvous

from trainer.command_line import WrongUse
from trainer.exit_status import WRONG_USE
from trainer.health.limits import raise_limits
from trainer.parallel.interface import choose_interface

logger = logging.getLogger(__name__)

COLLECTIVE_TIMEOUT = timedelta(minutes=10)

_OTHERS = {
    "srun": ("SLURM_STEP_NUM_TASKS", "SLURM_PROCID"),
    "mpirun": ("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK"),
    "mpiexec": ("PMI_SIZE", "PMI_RANK"),
}
"""A launcher that does not set torchrun's variables -> its own for the number of processes and for this one's."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Mesh:
    """The place of this process in the job; tables are sharded over all its ranks, batches split over groups of
    them."""

    rank: int
    """Index of this process in the job, from 0."""
    world_size: int
    """Number of processes in the job."""
    local_world_size: int
    """Number of processes of the job on this machine."""
    device: torch.device
    """The device of this process."""
    rack: str = ""
    """The switch that this machine is behind, as the scheduler calls it; empty where it does not say."""
    sharing: int = 1
    """Neighbouring ranks that train on the same samples (`trainer.parallel.context_parallel`)."""

    @property
    def data_rank(self) -> int:
        """Which part of a global batch this process trains on."""
        return self.rank // self.sharing

    @property
    def data_ranks(self) -> int:
        """Parts of a global batch."""
        return self.world_size // self.sharing

    @property
    def nodes(self) -> int:
        """Nodes of the job."""
        return self.world_size // self.local_world_size

    @property
    def is_first_of_node(self) -> bool:
        """Whether this process does what a machine does once."""
        return self.rank % self.local_world_size == 0

    @property
    def ranks_of_node(self) -> range:
        """The processes of this machine."""
        first = self.rank - self.rank % self.local_world_size
        return range(first, first + self.local_world_size)

    @property
    def ranks_across_nodes(self) -> range:
        """The processes that are on their machines what this one is on its."""
        return range(self.rank % self.local_world_size, self.world_size, self.local_world_size)

    @property
    def is_first(self) -> bool:
        """Whether this process writes what the job writes once."""
        return self.rank == 0

    @property
    def backend(self) -> str:
        """The collective library: NCCL between GPUs, gloo between CPU processes."""
        return "nccl" if self.device.type == "cuda" else "gloo"


def _environment(name: str, default: int) -> int:
    text = os.environ.get(name, str(default))
    if not text.isdigit():
        raise ValueError(
            f"environment variable {name} must be a whole number, got {text!r}: start the job with torchrun"
        )
    return int(text)


def _check_launcher() -> None:
    """Make sure that a launcher which numbers its processes in variables of its own has started one, not many that
    would each train the whole run."""
    # A person's shell in such a step (srun --pty) is alone with its terminal.
    if "RANK" in os.environ or os.isatty(0):
        return
    for launcher, (count, number) in _OTHERS.items():
        if _environment(count, 1) > 1:
            if _environment(number, 0) > 0:
                sys.exit(WRONG_USE)
            raise WrongUse(
                f"{launcher} has started {os.environ[count]} processes that do not know of one another: start one "
                "torchrun a node with it, or use `python -m launch submit`; where each is a run of its own, set RANK=0"
            )


def _rack() -> str:
    """From Slurm's address of the node, SPINE.LEAF.NODE; without a topology that is the node's name alone."""
    return os.environ.get("SLURM_TOPOLOGY_ADDR", "").rpartition(".")[0]


def discover_mesh(sharing: int = 1) -> Mesh:
    """Read this process's place from torchrun's variables; without them, the job is this one process.

    Raises:
        WrongUse: another launcher has started many processes without those variables.
        ValueError: a variable is not a number, this machine has fewer GPUs than processes of the job, or the processes
            are no multiple of those that share samples.
    """
    _check_launcher()
    local_rank = _environment("LOCAL_RANK", 0)
    local_world_size = _environment("LOCAL_WORLD_SIZE", 1)
    device = torch.device("cpu")
    if torch.cuda.is_available():
        if torch.cuda.device_count() < local_world_size:
            raise ValueError(
                f"{local_world_size} processes on a machine with {torch.cuda.device_count()} GPUs: "
                f"each process needs its own, so start at most {torch.cuda.device_count()} a machine"
            )
        device = torch.device("cuda", local_rank)
    world_size = _environment("WORLD_SIZE", 1)
    if world_size % sharing:
        raise ValueError(
            f"context_parallel={sharing} ranks share their samples, but the job has {world_size}: start a multiple of "
            f"{sharing}, or set context_parallel=1"
        )
    return Mesh(
        rank=_environment("RANK", 0),
        world_size=world_size,
        local_world_size=local_world_size,
        device=device,
        rack=_rack(),
        sharing=sharing,
    )


def _meet() -> Store:
    """The store of a job of several processes, at MASTER_ADDR and MASTER_PORT."""
    try:
        store: Store = next(rendezvous("env://", timeout=COLLECTIVE_TIMEOUT))[0]
    except dist.DistError as error:
        where = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        raise ConnectionError(
            f"the job's processes cannot meet at {where} ({' '.join(str(error).split())[:200]}): choose another "
            "MASTER_PORT, or see whether the first node can be reached"
        ) from None
    return store


@contextmanager
def joined(mesh: Mesh) -> Iterator[Store]:
    """Join the job's process group for the duration of the block; yields the store that its processes share.

    Raises:
        OSError: the system allows too few open files or threads.
        ConnectionError: another process cannot be reached, or ended while this one waited for it.
    """
    raise_limits(ranks=mesh.world_size, processes=1)
    if mesh.device.type == "cuda":
        torch.cuda.set_device(mesh.device)
    # A job of one needs no rendezvous: its store lives in this process.
    store = HashStore() if mesh.world_size == 1 else _meet()
    if mesh.nodes > 1:
        choose_interface(os.environ["MASTER_ADDR"], _environment("MASTER_PORT", 0))
    try:
        dist.init_process_group(
            mesh.backend, store=store, rank=mesh.rank, world_size=mesh.world_size, timeout=COLLECTIVE_TIMEOUT
        )
    except RuntimeError as error:
        raise ConnectionError(
            f"rank {mesh.rank} cannot reach the others by {mesh.backend} ({' '.join(str(error).split())[-200:]}): see "
            f"whether {mesh.backend.upper()}_SOCKET_IFNAME names an interface of the network that joins all nodes"
        ) from None
    logger.info("rank %d of %d on %s, collectives by %s", mesh.rank, mesh.world_size, mesh.device, mesh.backend)
    ended_well = False
    try:
        yield store
        ended_well = True
    except RuntimeError as error:
        # gloo's errors have no class of their own.
        if isinstance(error, dist.DistError) or "gloo/transport" in str(error):
            reason = str(error).splitlines()[0]
            raise ConnectionError(f"another rank ended, or cannot be reached any longer: {reason}") from error
        raise
    finally:
        # After an error other ranks may wait in a collective, which closing the group would wait for in turn.
        if ended_well or mesh.world_size == 1:
            dist.destroy_process_group()
