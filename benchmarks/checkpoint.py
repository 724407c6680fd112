"""How long does the training stand still for a checkpoint, and how fast is it written and read?

Run: python -m benchmarks.checkpoint [--gib 1] [--folder DIR] [--repeats 3] [--json FILE]

One process, tables of `--gib` in all on the GPU if there is one; beside torch.save, PyTorch's distributed checkpoint
(DCP), and a plain copy of the same bytes, all with fsync, in the same run.  Before each reading the files leave the
page cache (posix_fadvise).  Medians; the stall of an asynchronous save is the time until `save` returns.
"""

import argparse
import datetime
import json
import os
import platform
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import HashStore
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.state_dict_loader import load as load_dcp
from torch.distributed.checkpoint.state_dict_saver import save as save_dcp

from trainer.checkpoint.catalogue import Catalogue
from trainer.checkpoint.checkpointer import Checkpointer
from trainer.checkpoint.pieces import local_pieces, not_finite
from trainer.checkpoint.progress import Progress
from trainer.checkpoint.store import open_store
from trainer.config import CheckpointConfig
from trainer.mesh import Mesh
from trainer.run_dir import RunDir

TABLES = 4


def timed(action: Callable[[], object], device: torch.device) -> float:
    """Seconds until it is done, on the device too."""
    start = time.perf_counter()
    action()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def forget(folder: Path) -> None:
    """Take the files out of the page cache."""
    for file in folder.rglob("*"):
        if file.is_file():
            descriptor = os.open(file, os.O_RDONLY)
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)


def write_plain(file: Path, content: memoryview) -> None:
    """The same bytes and nothing else."""
    with file.open("wb") as stream:
        for start in range(0, len(content), 2**22):
            stream.write(content[start : start + 2**22])
        stream.flush()
        os.fsync(stream.fileno())


def read_plain(file: Path, into: memoryview) -> None:
    """The same bytes into memory that is there."""
    with file.open("rb", buffering=0) as stream:
        done = 0
        while count := stream.readinto(into[done : done + 2**24]):
            done += count


def save_torch(tensors: dict[str, Tensor], file: Path) -> None:
    """torch.save, and fsync as all others."""
    with file.open("wb") as stream:
        torch.save(tensors, stream)
        stream.flush()
        os.fsync(stream.fileno())


class Saves:
    """Ours, synchronous or not."""

    def __init__(self, folder: Path, tensors: dict[str, Tensor], mesh: Mesh, *, asynchronous: bool) -> None:
        self._run = RunDir(folder)
        folder.mkdir()
        self._catalogue = Catalogue(open_store(str(self._run.checkpoints)))
        config = CheckpointConfig(keep=1, asynchronous=asynchronous)
        self._checkpointer = Checkpointer(self._run, self._catalogue, mesh, lambda: dict(tensors), config)
        self._step = 0

    def save(self) -> None:
        self._step += 1
        self._checkpointer.save(Progress(step=self._step))

    def wait(self) -> None:
        self._checkpointer.wait()

    def load(self) -> None:
        self._checkpointer.restore(self._catalogue.newest())


def measure(folder: Path, tensors: dict[str, Tensor], mesh: Mesh, repeats: int) -> dict[str, float]:
    """Seconds by what was done."""
    content = memoryview(bytearray(sum(tensor.nbytes for tensor in tensors.values())))
    (folder / "dcp").mkdir()
    synchronous = Saves(folder / "synchronous", tensors, mesh, asynchronous=False)
    beside = Saves(folder / "beside", tensors, mesh, asynchronous=True)
    # Takes its memory and starts its process, once a run.
    beside.save()
    beside.wait()
    saves = {
        "write plain": lambda: write_plain(folder / "plain", content),
        "write torch.save": lambda: save_torch(tensors, folder / "torch"),
        "write DCP": lambda: save_dcp(dict(tensors), storage_writer=FileSystemWriter(folder / "dcp")),
        "write ours": synchronous.save,
        "stall ours": beside.save,
        "rest ours": beside.wait,
        "finite check": lambda: not_finite(local_pieces(dict(tensors))),
    }
    loads = {
        "read plain": lambda: read_plain(folder / "plain", content),
        "read torch.load": lambda: torch.load(folder / "torch", map_location=mesh.device),
        "read DCP": lambda: load_dcp(dict(tensors), storage_reader=FileSystemReader(folder / "dcp")),
        "read ours": synchronous.load,
    }
    seconds: dict[str, list[float]] = {name: [] for name in (*saves, *loads)}
    for _ in range(repeats):
        for name, action in saves.items():
            seconds[name].append(timed(action, mesh.device))
        for name, action in loads.items():
            forget(folder)
            seconds[name].append(timed(action, mesh.device))
    return {name: median(values) for name, values in seconds.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description="Checkpoints beside torch.save, DCP and a plain copy.")
    parser.add_argument("--gib", type=float, default=1.0)
    parser.add_argument("--folder", type=Path, default=None, help="on the disk to measure; default: the temporary one")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path, default=Path("benchmarks/results/checkpoint.json"))
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dist.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    mesh = Mesh(rank=0, world_size=1, local_world_size=1, device=device)
    rows = int(arguments.gib * 2**30) // (TABLES * 128 * 4)
    tensors = {f"tables/{number}": torch.rand(rows, 128, device=device) for number in range(TABLES)}
    folder = Path(tempfile.mkdtemp(dir=arguments.folder))
    try:
        seconds = measure(folder, tensors, mesh, arguments.repeats)
    finally:
        shutil.rmtree(folder)
    for name, value in seconds.items():
        print(f"{name:<20}{value:8.3f} s{arguments.gib / value:9.2f} GiB/s")
    hardware = {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine(),
        "cores": os.cpu_count(),
        "torch": torch.__version__,
        "date": datetime.date.today().isoformat(),
    }
    arguments.json.write_text(json.dumps({"hardware": hardware, "gib": arguments.gib, "s": seconds}, indent=2) + "\n")


if __name__ == "__main__":
    main()
