"""Run a function, or a module, on several real gloo processes and collect what each of them returns.

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
import runpy
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
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
LEFT_S = 2
"""Seconds in which the other ranks may say what one has failed of."""
MODULE_S = 240
"""Seconds after which a rank of a module is ended."""


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
            status = _fork_from_nursery(_start_ranks, folder, world_size, function, args)
            failure = Path(folder, "failure")
            if failure.exists():
                raise pickle.loads(failure.read_bytes())
            assert status == 0, f"the process that starts the ranks ended with status {status}"
        return [torch.load(Path(folder, f"result-{rank}.pt"), weights_only=False) for rank in range(world_size)]


def run_module(module: str, world_size: int, arguments: Sequence[str], **environment: str) -> tuple[int, str]:
    """`python -m MODULE` on `world_size` gloo processes of this machine, to its end: the worst status, all output.

    As torchrun starts it, but for the seconds in which torchrun and every rank import torch, and for torchrun's looking
    after them: for tests of what a job computes, not of how it ends.
    """
    with TemporaryDirectory() as folder:
        status = _fork_from_nursery(_start_modules, folder, module, world_size, list(arguments), environment)
        return status, Path(folder, "output").read_text(encoding="utf-8", errors="replace")


def _fork_from_nursery(start: Callable[..., int], *args: Any) -> int:
    """Call `start(*args)` in a process that is forked from the nursery; returns the status with which it ends."""
    nursery = _nursery()
    nursery.send((dict(os.environ), Path.cwd(), pickle.dumps((start, args))))
    status: int = nursery.recv()
    return status


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
            environment, here, call = calls.recv()
        except EOFError:
            return
        pid = os.fork()
        if not pid:
            calls.close()
            os.environ.clear()
            os.environ.update(environment)
            os.chdir(here)
            start, args = pickle.loads(call)
            os._exit(start(*args))
        _, status = os.waitpid(pid, 0)
        calls.send(os.waitstatus_to_exitcode(status))


def _start_ranks(folder: str, world_size: int, function: Callable[..., Any], args: tuple[Any, ...]) -> int:
    """Fork the ranks of a call, and wait for them; leaves the failure of one in `folder`."""
    try:
        mp.start_processes(_run, (world_size, folder, function, args), nprocs=world_size, start_method="fork")
    except (mp.ProcessRaisedException, mp.ProcessExitedException) as error:
        Path(folder, "failure").write_bytes(pickle.dumps(error))
        return 1
    return 0


def _start_modules(folder: str, module: str, world_size: int, arguments: list[str], environment: dict[str, str]) -> int:
    """Fork the ranks of a module, and wait for them; leaves what they write in `folder`."""
    os.chdir(ROOT)
    meeting = socket.create_server(("localhost", 0))
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(meeting.getsockname()[1])}
    # As with torchrun, the store is of the process that started the ranks.
    os.environ |= {"TORCHELASTIC_USE_AGENT_STORE": "True", **environment}
    with Path(folder, "output").open("wb") as output:
        ranks = []
        for rank in range(world_size):
            ranks.append(os.fork())
            if not ranks[-1]:
                meeting.close()
                os.dup2(output.fileno(), 1)
                os.dup2(output.fileno(), 2)
                place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "LOCAL_WORLD_SIZE": world_size}
                os.environ |= {name: str(value) for name, value in place.items()}
                torch.set_num_threads(1)
                signal.alarm(MODULE_S)
                sys.argv[1:] = arguments
                # To the end of the interpreter, as a process of its own goes.
                runpy.run_module(module, run_name="__main__", alter_sys=True)
                sys.exit()
        store = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False, master_listen_fd=meeting.detach())
        worst = _wait_for_all(ranks)
        del store
    return worst


def _wait_for_all(ranks: list[int]) -> int:
    """The worst status of the processes; some seconds after the first that fails, those that wait for it are ended."""
    left, worst = set(ranks), 0
    signal.signal(signal.SIGALRM, lambda *_: [os.kill(pid, signal.SIGKILL) for pid in left])
    while left:
        pid, status = os.wait()
        left.remove(pid)
        worst = max(worst, abs(os.waitstatus_to_exitcode(status)))
        if status:
            signal.alarm(LEFT_S)
    return worst


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
