"""Benchmarks of tables on one GPU: parts chosen by name, and a file that has each result as soon as it is there."""

import argparse
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import HashStore

from embeddings.hardware import node_type
from embeddings.machine import Machine

DEVICE = torch.device("cuda")

Part = Callable[[Machine], Iterator[tuple[str, Any]]]
"""What it finds on this GPU, by name."""


def run_parts(description: str | None, parts: Mapping[str, Part], file: Path) -> None:
    """The command line: runs the parts that are asked for, prints and writes what they find as they find it.

    A part that is not asked for keeps its figures in the file.
    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--machine", help="a machine's file, for its rates")
    parser.add_argument("--json", type=Path, default=file)
    parser.add_argument("--parts", nargs="*", choices=list(parts), default=list(parts))
    arguments = parser.parse_args()
    torch.cuda.set_device(0)
    dist.init_process_group("nccl", store=HashStore(), rank=0, world_size=1)
    results = json.loads(arguments.json.read_text()) if arguments.json.exists() else {}
    results |= {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__}
    if arguments.machine is not None:
        results["rates"] = json.loads(Path(arguments.machine).read_text())["rates"]
    for part in arguments.parts:
        results[part] = {}
        for name, found in parts[part](one_rank(arguments.machine)):
            results[part][name] = found
            arguments.json.write_text(json.dumps(results, indent=1) + "\n")
        print(part, json.dumps(results[part], indent=1), flush=True)
    dist.destroy_process_group()


def one_rank(machine_file: str | None = None) -> Machine:
    """This GPU; with a machine's file, at its rates."""
    memory = torch.cuda.get_device_properties(0).total_memory / 2**30
    machine = Machine(world_size=1, local_world_size=1, compute_device="cuda", hbm_gib=memory, ddr_gib=100.0)
    if machine_file is None:
        return machine
    node = node_type(machine_file)
    return replace(machine, rates=node.rates, calibration=node.calibration)
