"""How fast do Parquet files become batches, in how much memory, and how far are the usual ways behind?

Run: python -m benchmarks.loader [--length 4096] [--samples 4000] [--readers ...] [--json FILE]

Generated histories of one length are written in the prepared format to a temporary folder and read back, each reader
in a process of its own and after a few batches: events a second of wall and of processor time, and the process's
peak memory above that of importing everything.  The readers:

    ours N      pipelines.reading.loader with a reader process of N threads (0: all in the caller's thread, one core)
    row loop    one row at a time out of pyarrow, lists joined in Python
    torch       torch DataLoader over rows decoded to Python, N worker processes, the same batches
    datasets    Hugging Face datasets with numpy format, the same batches (needs that package)

"""

import argparse
import json
import multiprocessing
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from benchmarks.measured_on import measured_on
from pipelines.config import DataConfig, SyntheticConfig
from pipelines.prepare.options import SampleOptions
from pipelines.prepare.samples.write import SplitWriter, write_dataset_file
from pipelines.reading.loader import build_loader
from pipelines.storage.source import Split
from pipelines.synthetic import SyntheticSource

BATCH = 32
WARM_UP = 4
LISTS = [f"{part}_{name}" for part in ("history", "candidate") for name in ("item_id", "action", "timestamp")]
READERS = ("ours 0", "ours 1", "ours 2", "row loop", "torch 0", "torch 2", "datasets")


def main() -> None:
    parser = argparse.ArgumentParser(description="Events a second from Parquet to batches.")
    parser.add_argument("--length", type=int, default=4096, help="events of every history")
    parser.add_argument("--samples", type=int, default=4000, help="samples in the files")
    parser.add_argument("--readers", nargs="+", choices=READERS, default=READERS)
    parser.add_argument("--json", type=Path, default=Path("benchmarks/results/loader.json"))
    parser.add_argument("--measure", nargs=2, metavar=("READER", "FOLDER"), help="used by the command itself")
    arguments = parser.parse_args()
    if arguments.measure:
        reader, folder = arguments.measure
        print(json.dumps(measure(reader, folder, arguments.length)))
        return
    rows = []
    with TemporaryDirectory() as folder:
        size = write_data(Path(folder), arguments.length, arguments.samples)
        print(f"{arguments.samples} samples of {arguments.length} events, {size / 2**20:.0f} MiB of Parquet")
        print("reader         events/s  events/cpu s   cpu s  wall s    MiB")
        for reader in arguments.readers:
            command = [sys.executable, "-m", "benchmarks.loader", "--length", str(arguments.length)]
            done = subprocess.run(
                [*command, "--measure", reader, folder], check=True, stdout=subprocess.PIPE, text=True
            )
            row = json.loads(done.stdout.splitlines()[-1])
            rows.append(row)
            figures = f"{row['events_per_s']:12,.0f} {row['events_per_cpu_s']:13,.0f} {row['cpu_s']:7.2f}"
            print(f"{reader:10s} {figures} {row['wall_s']:7.2f} {row['peak_mib']:6.0f}", flush=True)
    result = {"hardware": measured_on(), "length": arguments.length, "samples": arguments.samples, "batch": BATCH}
    arguments.json.parent.mkdir(parents=True, exist_ok=True)
    arguments.json.write_text(json.dumps({**result, "rows": rows}, indent=1) + "\n")


def write_data(folder: Path, length: int, samples: int) -> int:
    """Write a generated data set; returns the bytes of its training files."""
    config = SyntheticConfig(num_users=samples, lengths="constant", max_len=length, min_len=min(16, length), lag=length)
    options = SampleOptions()
    sizes = {}
    splits: tuple[Split, Split] = ("train", "eval")
    for split in splits:
        source = SyntheticSource(config, split)
        with SplitWriter(folder / split, options.row_group_events, options.file_events) as writer:
            for unit in range(len(source.unit_rows) if split == "train" else 1):
                unit_samples = source.read(unit)
                columns = {name: pa.array(values) for name, values in unit_samples.scalars.items()}
                for part, lists in (("history", unit_samples.history), ("candidate", unit_samples.candidate)):
                    for name, column in lists.items():
                        offsets = column.offsets.astype(np.int32)
                        columns[f"{part}_{name}"] = pa.ListArray.from_arrays(offsets, pa.array(column.values))
                columns["history_length"] = pa.array(unit_samples.history["item_id"].lens().astype(np.int32))
                columns["num_candidates"] = pa.array(unit_samples.candidate["item_id"].lens().astype(np.int32))
                writer.add(pa.table(columns))
        sizes[str(split)] = writer.sizes()
    write_dataset_file(folder, replace(source.info, splits=sizes), options)
    return sum(path.stat().st_size for path in (folder / "train").iterdir())


def measure(reader: str, folder: str, length: int) -> dict[str, Any]:
    """Read everything once with one reader, after a first batch that warms caches."""
    torch.set_num_threads(1)
    pa.set_cpu_count(1)
    name, _, workers = reader.partition(" ")
    batches: Callable[[], Iterator[int]] = {
        "ours": lambda: ours(folder, length, int(workers)),
        "row": lambda: row_loop(folder),
        "torch": lambda: torch_loader(folder, int(workers)),
        "datasets": lambda: hugging_face(folder),
    }[name]
    if name == "datasets":
        import_module("datasets")
    before = peak_mib()
    iterator = batches()
    # datasets converts the files in its first step, which is part of the way from Parquet to a batch.
    for _ in range(0 if name == "datasets" else WARM_UP):
        next(iterator)
    events, start, cpu = 0, time.perf_counter(), cpu_seconds()
    used = 0.0
    for number in iterator:
        events += number
        # At every batch, for a reader process takes its account with it when it ends.
        used = cpu_seconds() - cpu
    wall = time.perf_counter() - start
    return {
        "reader": reader,
        "events": events,
        "events_per_s": events / wall,
        "events_per_cpu_s": events / used,
        "wall_s": wall,
        "cpu_s": used,
        "peak_mib": peak_mib() - before,
    }


def ours(folder: str, length: int, threads: int) -> Iterator[int]:
    """This project's loader, in shuffled order."""
    config = DataConfig(
        path=folder, global_batch_size=BATCH, max_history_len=length, window_samples=256, reader_threads=threads
    )
    for batch in build_loader(config, split="train", rank=0, world_size=1):
        yield batch.inputs.timestamp.numel()


def row_loop(folder: str) -> Iterator[int]:
    """Rows one by one, joined in Python."""
    columns: dict[str, list[int]] = {name: [] for name in LISTS}
    waiting = 0
    for path in sorted(Path(folder, "train").glob("*.parquet")):
        for record_batch in pq.ParquetFile(path).iter_batches(BATCH, columns=LISTS):
            for row in record_batch.to_pylist():
                for name in LISTS:
                    columns[name].extend(row[name])
                waiting += 1
            tensors = {name: torch.tensor(values) for name, values in columns.items()}
            columns = {name: [] for name in LISTS}
            yield tensors["history_item_id"].numel() + tensors["candidate_item_id"].numel()


class Rows(torch.utils.data.IterableDataset[dict[str, torch.Tensor]]):
    """Each row's lists as tensors; files are dealt out to workers by row group."""

    def __init__(self, folder: str) -> None:
        self._paths = sorted(Path(folder, "train").glob("*.parquet"))

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        worker = torch.utils.data.get_worker_info()
        number, count = (0, 1) if worker is None else (worker.id, worker.num_workers)
        for path in self._paths:
            file = pq.ParquetFile(path)
            for group in range(number, file.num_row_groups, count):
                for row in file.read_row_group(group, columns=LISTS).to_pylist():
                    yield {name: torch.tensor(values) for name, values in row.items()}


def join_rows(rows: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Rows packed one after another."""
    return {name: torch.cat([row[name] for row in rows]) for name in LISTS}


def torch_loader(folder: str, workers: int) -> Iterator[int]:
    """torch's DataLoader over rows."""
    loader = torch.utils.data.DataLoader(Rows(folder), batch_size=BATCH, num_workers=workers, collate_fn=join_rows)
    for batch in loader:
        yield batch["history_item_id"].numel() + batch["candidate_item_id"].numel()


def hugging_face(folder: str) -> Iterator[int]:
    """Hugging Face datasets, from its cache file, with numpy rows."""
    # Optional: only this reader needs the package.
    datasets = import_module("datasets")
    datasets.disable_progress_bars()
    files = [str(path) for path in sorted(Path(folder, "train").glob("*.parquet"))]
    data = datasets.load_dataset("parquet", data_files=files, columns=LISTS, split="train", cache_dir=folder + "/cache")
    data = data.with_format("numpy")
    for rows in data.iter(BATCH):
        packed = {name: torch.from_numpy(np.concatenate(list(rows[name]))) for name in LISTS}
        yield packed["history_item_id"].numel() + packed["candidate_item_id"].numel()


def cpu_seconds() -> float:
    """Processor time of this process, of its former children, and of the processes that read for it."""
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    ticks = 0
    for process in multiprocessing.active_children():
        fields = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])
    return sum(usage.ru_utime + usage.ru_stime for usage in usages) + ticks / os.sysconf("SC_CLK_TCK")


def peak_mib() -> float:
    """Largest resident memory of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


if __name__ == "__main__":
    main()
