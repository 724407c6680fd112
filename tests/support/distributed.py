"""Run a function on several real gloo processes and collect what each of them returns.

The function and its arguments are pickled, so the function lives at module level.  A failing rank fails the call
with that rank's traceback; the other ranks are stopped.
"""

from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

TIMEOUT = timedelta(seconds=120)


def _run(rank: int, world_size: int, folder: str, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(str(Path(folder, "store")), world_size)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size, timeout=TIMEOUT)
    try:
        result = function(*args)
        torch.save(result, Path(folder, f"result-{rank}.pt"))
        dist.barrier()
    finally:
        dist.destroy_process_group()


def _fork_ranks(_: int, world_size: int, *rest: Any) -> None:
    """In a process without threads, which has imported the function's module: the ranks need not import it again."""
    mp.start_processes(_run, (world_size, *rest), nprocs=world_size, start_method="fork")


def run_ranks(world_size: int, function: Callable[..., Any], *args: Any) -> list[Any]:
    """Call `function(*args)` on `world_size` gloo processes; returns the results in rank order.

    Each process uses one thread, so that results do not depend on how busy the machine is.

    Raises:
        ProcessRaisedException: a rank failed; its traceback or exit code is in the message.
    """
    with TemporaryDirectory() as folder:
        mp.spawn(_fork_ranks, (world_size, folder, function, args))
        return [torch.load(Path(folder, f"result-{rank}.pt"), weights_only=False) for rank in range(world_size)]
