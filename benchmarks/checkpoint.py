"""How long does the training stand still for a checkpoint, and how fast is it written and read?

Run: python -m benchmarks.checkpoint [--gib 1] [--alone] [--lookups 1.0] [--folder DIR] [--repeats 3] [--json FILE]

One process, tables of `--gib` in all on the GPU if there is one; beside torch.save, PyTorch's distributed checkpoint
(DCP), and a plain copy of the same bytes, all with fsync, in the same run (`--alone`: without the first two).  Before
each reading the files leave the page cache (posix_fadvise).  Medians; the stall of an asynchronous save is the time
until `save` returns.  A delta follows a full checkpoint after `--lookups` times as many lookups as there are rows, of
ids that are Zipf-distributed with exponent 1.05; it is read with the full one that it needs.  A folded checkpoint is a
full one after as many lookups.  The plain copy off the device goes into page-locked memory.
"""

import argparse
import datetime
import json
import os
import platform
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import HashStore
from torch.distributed._shard.sharded_tensor import init_from_local_shards
from torch.distributed._shard.sharded_tensor.shard import Shard
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.state_dict_loader import load as load_dcp
from torch.distributed.checkpoint.state_dict_saver import save as save_dcp

from trainer.checkpoint.catalogue import Catalogue
from trainer.checkpoint.checkpointer import Checkpointer
from trainer.checkpoint.pieces import local_pieces, not_finite
from trainer.checkpoint.progress import Progress
from trainer.checkpoint.store import open_store
from trainer.config import CheckpointConfig
from trainer.parallel.mesh import Mesh
from trainer.run.run_dir import RunDir

TABLES, DIM = 4, 128
ZIPF = 1.05
LINK_BYTES = 2**30
"""Page-locked memory that a plain copy of the state goes into, again and again."""


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
    """The same bytes and nothing else; as a checkpoint into a new file, before the one before it goes."""
    new = file.with_name("new")
    with new.open("wb") as stream:
        for start in range(0, len(content), 2**22):
            stream.write(content[start : start + 2**22])
        stream.flush()
        os.fsync(stream.fileno())
    new.replace(file)


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


def copy_off(tensors: dict[str, Tensor], into: Tensor) -> None:
    """Every byte off the device, at the link's speed; on a CPU a copy in memory."""
    for tensor in tensors.values():
        for part in torch.split(tensor.view(-1).view(torch.uint8), into.numel()):
            into[: part.numel()].copy_(part, non_blocking=True)


class Lookups:
    """Which rows so many lookups of Zipf-distributed ids touch, in each table."""

    def __init__(self, rows: int, lookups: float, device: torch.device) -> None:
        # An id of rank r is drawn with a probability of about r^-ZIPF: the integral of that, inverted.
        uniform = torch.rand(int(rows * lookups), dtype=torch.float64, device=device)
        top = (rows + 1.0) ** (1 - ZIPF) - 1
        ranks = ((1 + uniform * top) ** (1 / (1 - ZIPF))).long() - 1
        self._marks = torch.zeros(rows, dtype=torch.bool, device=device)
        self._marks.index_fill_(0, ranks.clamp_(0, rows - 1), True)
        self.fraction = self._marks.double().mean().item()

    def rows(self, table: str, first_row: int) -> Tensor:
        """As `trainer.checkpoint.pieces.Touched`."""
        return self._marks.nonzero().view(-1)

    def clear(self) -> None:
        """As `trainer.checkpoint.pieces.Touched`; the next lookups touch the same."""


class Saves:
    """Ours, synchronous or not."""

    def __init__(
        self,
        folder: Path,
        tensors: dict[str, Tensor],
        mesh: Mesh,
        *,
        asynchronous: bool,
        touched: Lookups | None = None,
        deltas: int = 0,
    ) -> None:
        self._run = RunDir(folder)
        folder.mkdir()
        self._catalogue = Catalogue(open_store(str(self._run.checkpoints)))
        config = CheckpointConfig(keep=1, asynchronous=asynchronous, deltas=deltas)
        state = {name: init_from_local_shards([_shard(tensor)], *tensor.shape) for name, tensor in tensors.items()}
        self._checkpointer = Checkpointer(
            self._run, self._catalogue, mesh, lambda: dict(state), config, touched=touched
        )
        self._step = 0

    def save(self) -> None:
        self._step += 1
        self._checkpointer.save(Progress(step=self._step))

    def wait(self) -> None:
        self._checkpointer.wait()

    def num_bytes(self) -> int:
        """Bytes of the newest checkpoint."""
        return self._catalogue.choose(None).manifest.num_bytes

    def close(self) -> None:
        self._checkpointer.close()

    def load(self) -> None:
        self._checkpointer.restore(self._catalogue.newest())


def _shard(tensor: Tensor) -> Shard:
    return Shard.from_tensor_and_offsets(tensor, [0, 0], 0)


def measure(
    folder: Path, tensors: dict[str, Tensor], mesh: Mesh, *, lookups: float, repeats: int, alone: bool
) -> tuple[dict[str, float], dict[str, float]]:
    """(seconds by what was done, what deltas held)."""
    content = memoryview(bytearray(sum(tensor.nbytes for tensor in tensors.values())))
    (folder / "dcp").mkdir()
    link = torch.zeros(LINK_BYTES, dtype=torch.uint8, pin_memory=mesh.device.type == "cuda")
    saves: dict[str, Callable[[], object]] = {
        "write plain": lambda: write_plain(folder / "plain", content),
        "copy off the device": lambda: copy_off(tensors, link),
        "finite check": lambda: not_finite(local_pieces(dict(tensors))),
    }
    loads: dict[str, Callable[[], object]] = {"read plain": lambda: read_plain(folder / "plain", content)}
    if not alone:
        saves["write torch.save"] = lambda: save_torch(tensors, folder / "torch")
        saves["write DCP"] = lambda: save_dcp(dict(tensors), storage_writer=FileSystemWriter(folder / "dcp"))
        loads["read torch.load"] = lambda: torch.load(folder / "torch", map_location=mesh.device)
        loads["read DCP"] = lambda: load_dcp(dict(tensors), storage_reader=FileSystemReader(folder / "dcp"))
    synchronous = Saves(folder / "synchronous", tensors, mesh, asynchronous=False)
    saves["write ours"], loads["read ours"] = synchronous.save, synchronous.load
    seconds = repeat(saves, loads, folder, mesh, repeats)
    for part in ("plain", "torch"):
        (folder / part).unlink(missing_ok=True)
    for part in ("dcp", "synchronous"):
        shutil.rmtree(folder / part)
    beside = Saves(folder / "beside", tensors, mesh, asynchronous=True)
    # Takes its memory and starts its process, once a run.
    beside.save()
    beside.wait()
    seconds |= repeat({"stall ours": beside.save, "rest ours": beside.wait}, {}, folder, mesh, repeats)
    full = beside.num_bytes()
    beside.close()
    shutil.rmtree(folder / "beside")
    touched = Lookups(next(iter(tensors.values())).shape[0], lookups, mesh.device)
    # Every one but the first is made of the one before it and the rows that were touched.
    folded = Saves(folder / "folded", tensors, mesh, asynchronous=True, touched=touched)
    folded.save()
    folded.wait()
    seconds |= repeat({"stall folded": folded.save, "rest folded": folded.wait}, {}, folder, mesh, repeats)
    folded.close()
    shutil.rmtree(folder / "folded")
    deltas = Saves(folder / "deltas", tensors, mesh, asynchronous=True, touched=touched, deltas=10**6)
    deltas.save()
    deltas.wait()
    seconds |= repeat({"stall delta": deltas.save, "rest delta": deltas.wait}, {}, folder, mesh, repeats)
    share = deltas.num_bytes() / full
    seconds |= repeat({}, {"read delta": deltas.load}, folder, mesh, repeats)
    deltas.close()
    return seconds, {"lookups_a_row": lookups, "rows_touched": touched.fraction, "share_of_full_bytes": share}


def repeat(
    saves: dict[str, Callable[[], object]],
    loads: dict[str, Callable[[], object]],
    folder: Path,
    mesh: Mesh,
    repeats: int,
) -> dict[str, float]:
    """Median seconds of each; every one is told as soon as it is known."""
    seconds: dict[str, list[float]] = {name: [] for name in (*saves, *loads)}

    def measure_one(name: str, action: Callable[[], object]) -> None:
        seconds[name].append(timed(action, mesh.device))
        print(f"{name:<20}{seconds[name][-1]:8.3f} s", flush=True)

    for _ in range(repeats):
        for name, action in saves.items():
            measure_one(name, action)
        for name, action in loads.items():
            forget(folder)
            measure_one(name, action)
    return {name: median(values) for name, values in seconds.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description="Checkpoints beside torch.save, DCP and a plain copy.")
    parser.add_argument("--gib", type=float, default=1.0)
    parser.add_argument("--alone", action="store_true", help="without torch.save and DCP")
    parser.add_argument("--lookups", type=float, default=1.0, help="before a delta, a row")
    parser.add_argument("--folder", type=Path, default=None, help="on the disk to measure; default: the temporary one")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path, default=Path("benchmarks/results/checkpoint.json"))
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dist.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    mesh = Mesh(rank=0, world_size=1, local_world_size=1, device=device)
    rows = int(arguments.gib * 2**30) // (TABLES * DIM * 4)
    tensors = {f"tables/{number}": torch.rand(rows, DIM, device=device) for number in range(TABLES)}
    folder = Path(tempfile.mkdtemp(dir=arguments.folder))
    storage = subprocess.run(["stat", "-f", "-c", "%T", str(folder)], capture_output=True, text=True, check=True)
    try:
        seconds, deltas = measure(
            folder,
            tensors,
            mesh,
            lookups=arguments.lookups,
            repeats=arguments.repeats,
            alone=arguments.alone,
        )
    finally:
        shutil.rmtree(folder)
    print(deltas)
    share = deltas["share_of_full_bytes"]
    shares = {"stall delta": share, "rest delta": share, "read delta": 1 + share}
    rates = {name: arguments.gib * shares.get(name, 1.0) / value for name, value in seconds.items()}
    for name, value in seconds.items():
        print(f"median {name:<20}{value:8.3f} s{rates[name]:9.2f} GiB/s")
    hardware = {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine(),
        "cores": os.cpu_count(),
        "torch": torch.__version__,
        "storage": storage.stdout.strip(),
        "date": datetime.date.today().isoformat(),
    }
    values = {"hardware": hardware, "gib": arguments.gib, "s": seconds, "gib_per_s": rates, "deltas": deltas}
    arguments.json.write_text(json.dumps(values, indent=2) + "\n")


if __name__ == "__main__":
    main()
