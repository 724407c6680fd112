"""What the ranks of the watchdog's tests run."""

import logging
import threading
from pathlib import Path

import torch
import torch.distributed as dist

from trainer.config import WatchConfig
from trainer.health.watchdog import FIRST, Watchdog
from trainer.parallel.mesh import Mesh


def hang(folder: str, where: str) -> None:
    """Take some steps, after which one rank of several waits for what never comes, and the others for it."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    logging.basicConfig(filename=Path(folder, f"rank-{rank}.log"), force=True)
    mesh = Mesh(rank=rank, world_size=ranks, local_world_size=ranks, device=torch.device("cpu"))
    watchdog = Watchdog(dist.distributed_c10d._get_default_store(), mesh, WatchConfig(least_s=2.0, first_s=60.0))
    for step in range(1, FIRST + 2):
        dist.barrier()
        for phase in ("data", "evaluation"):
            with watchdog.phase(phase):
                pass
        watchdog.stepped(step)
    if rank == 1:
        if where == "step":
            never_comes()
        with watchdog.phase(where):
            never_comes()
    dist.barrier()


def never_comes() -> None:
    """The place to be named."""
    threading.Event().wait()
