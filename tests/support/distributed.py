"""Run a function on several real gloo processes and collect what each of them returns.

The function and its arguments are pickled, so the function lives at module level.  A failing rank fails the call
with that rank's traceback; the other ranks are stopped.

Importing torch and TorchRec takes seconds, so one process a test session does it, the nursery, from which all ranks are
forked.  It computes nothing and has no threads, which ranks would not inherit.  Where there is a GPU each rank imports
for itself: the imports start CUDA, which does not survive a fork.
"""

import atexit
import functools
import importlib
import multiprocessing
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

ROOT = Path(__file__).resolve().parents[2]
TIMEOUT = timedelta(seconds=120)


def run_ranks(world_size: int, function: Callable[..., Any], *args: Any) -> list[Any]:
    """Call `function(*args)` on `world_size` gloo processes; returns the results in rank order.

    Each process uses one thread, so that results do not depend on how busy the machine is; it has this process's
    environment and folder.

    Raises:
        ProcessRaisedException: a rank raised; its traceback is in the message.
        ProcessExitedException: a rank ended without a result.
    """
    with TemporaryDirectory() as folder:
        if torch.cuda.is_available():
            mp.start_processes(_run, (world_size, folder, function, args), nprocs=world_size, start_method="spawn")
        else:
            _fork_from_nursery(folder, pickle.dumps((world_size, folder, function, args)))
        return [torch.load(Path(folder, f"result-{rank}.pt"), weights_only=False) for rank in range(world_size)]


def _fork_from_nursery(folder: str, call: bytes) -> None:
    """Raises what `run_ranks` does."""
    nursery = _nursery()
    nursery.send((dict(os.environ), Path.cwd(), folder, call))
    status = nursery.recv()
    failure = Path(folder, "failure")
    if failure.exists():
        raise pickle.loads(failure.read_bytes())
    assert status == 0, f"the process that starts the ranks ended with status {status}"


@functools.cache
def _nursery() -> Connection:
    """The connection to the nursery, which ends with this process."""
    ours, theirs = multiprocessing.Pipe()
    command = f"from tests.support.distributed import serve; serve({theirs.fileno()})"
    process = subprocess.Popen([sys.executable, "-c", command], cwd=ROOT, pass_fds=[theirs.fileno()])
    theirs.close()
    atexit.register(process.wait)
    atexit.register(ours.close)
    return ours


def serve(descriptor: int) -> None:
    """The nursery: forks a process for each call that comes through the connection, until that is closed."""
    importlib.import_module("trainer.jobs.train")
    calls = Connection(descriptor)
    while True:
        try:
            environment, here, folder, call = calls.recv()
        except EOFError:
            return
        pid = os.fork()
        if not pid:
            calls.close()
            os.environ.clear()
            os.environ.update(environment)
            os.chdir(here)
            os._exit(_start(folder, call))
        _, status = os.waitpid(pid, 0)
        calls.send(os.waitstatus_to_exitcode(status))


def _start(folder: str, call: bytes) -> int:
    """Fork the ranks of a call, and wait for them; leaves the failure of one in `folder`."""
    try:
        world_size, *rest = pickle.loads(call)
        mp.start_processes(_run, (world_size, *rest), nprocs=world_size, start_method="fork")
    except (mp.ProcessRaisedException, mp.ProcessExitedException) as error:
        Path(folder, "failure").write_bytes(pickle.dumps(error))
        return 1
    return 0


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
