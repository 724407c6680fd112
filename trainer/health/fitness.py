"""Is every node of an allocation fit for the job?  Asked before the processes start, when nothing can be lost yet.

    python -m trainer.health.fitness --facts TOKEN
    python -m trainer.health.fitness --as FACTS --run-dir DIR --procs-per-node P [--meet HOST:PORT] [--data PATH ...]
                                [--complete FILE]

The first node says what it is (`facts_here`, as JSON); every node compares itself with that and prints one line of
JSON, its name and what is wrong with it.  It imports no torch, so it takes a second and works where the environment
is broken.
"""

import argparse
import hashlib
import json
import os
import platform
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from trainer.run.late_files import shown

ROOT = Path(__file__).resolve().parents[2]
"""The copy of the code that this process runs."""

OURS = ("attention_kernels", "embeddings", "launch", "pipelines", "trainer")
"""The project's top-level packages."""

CPU_PACKAGE = "fbgemm-gpu-cpu"
"""One of the version set that trains on CPUs, whatever the nodes have."""

PACKAGES = ("torch", "torchrec", "fbgemm-gpu", CPU_PACKAGE, "triton", "numpy", "pyarrow")
"""The packages whose versions must be the same on every node."""

NVIDIA_DRIVER = Path("/proc/driver/nvidia/version")
MIN_FREE_MIB = {"run directory": 1024, "/dev/shm": 256, "temporary folder": 256}
REACH_S = 10.0
"""How long the first node's port may take to answer."""
MAX_BEHIND_S, MAX_AHEAD_S = 10.0, 120.0
"""How far a node's clock may be from the first one's, which told its time a little earlier."""

XIDS = {
    48: "a memory error that could not be corrected",
    62: "its micro-controller halted",
    64: "broken memory rows that could not be replaced",
    74: "an NVLink error",
    79: "it has fallen off the bus",
    95: "a memory error that could not be contained",
    119: "its system processor does not answer",
    120: "its system processor failed",
    140: "a memory error that nothing recovered",
    143: "it could not be initialised",
}
"""Errors that NVIDIA's driver reports to the kernel's log and after which a GPU needs a reset, a restart of the node or
a replacement (NVIDIA's "Xid Errors"); all others are faults of programs, or mended by the driver."""

XID_AGE_S = 3600.0
"""Older ones are left alone: a reset that mended them leaves no trace there."""

_NO_GPU = "No devices were found"
"""What nvidia-smi says where a job has not asked for GPUs."""

_XID = re.compile(r"\[ *(\d+\.\d+)\] NVRM: Xid \(PCI:([0-9a-fA-F:.]+)\): (\d+)")


@dataclass(frozen=True, kw_only=True, slots=True)
class Facts:
    """What must be the same on every node."""

    code: str
    """Digest of the source files that run."""
    python: str
    """The interpreter's version."""
    packages: dict[str, str]
    """Versions of PACKAGES on this node."""
    driver: str
    """NVIDIA's driver; empty without one."""
    token: str
    """Name of a file in the run directory, which the first node has just made, and its content."""
    time: float
    """Unix seconds."""


class UnfitNodes(OSError):
    """Nodes of a job cannot take part; the message names them and says why."""


def node_name() -> str:
    """The machine's name at the scheduler, or else its own."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def facts_here(token: str) -> Facts:
    """This node's facts, with a token of its own or the one that it was asked for."""
    packages = {}
    for name in PACKAGES:
        try:
            packages[name] = version(name)
        except PackageNotFoundError:
            continue
    return Facts(
        code=code_digest(ROOT),
        python=platform.python_version(),
        packages=packages,
        driver=NVIDIA_DRIVER.read_text().splitlines()[0] if NVIDIA_DRIVER.exists() else "",
        token=token,
        time=time.time(),
    )


def code_digest(root: Path) -> str:
    """Digest of the names and contents of all source files of our packages below `root`."""
    digest = hashlib.sha256()
    for package in OURS:
        for path in sorted((root / package).rglob("*.py")):
            digest.update(str(path.relative_to(root)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


def problems(first: Facts, here: Facts, *, run_dir: Path, data: Sequence[str], procs_per_node: int) -> Iterator[str]:
    """What keeps this node from taking part, each in a few words that say what to do."""
    if here.code != first.code:
        yield f"its code in {ROOT} is not the first node's: the job's folder must be the same on every node"
    if here.python != first.python:
        yield f"its Python is {here.python}, the first node's {first.python}: use one --python that all nodes share"
    for name in sorted(first.packages.keys() | here.packages.keys()):
        mine, theirs = here.packages.get(name, "missing"), first.packages.get(name, "missing")
        if mine != theirs:
            yield f"its {name} is {mine}, the first node's {theirs}: use one environment that all nodes share"
    if here.driver != first.driver:
        yield f"its NVIDIA driver is {here.driver or 'missing'}, the first node's {first.driver or 'missing'}"
    token = run_dir / first.token
    if not token.is_file() or token.read_text() != first.token:
        yield f"it does not see what the first node has written in {run_dir}: put it on a file system that all share"
    for path in data:
        if not os.access(path, os.R_OK | os.X_OK):
            yield f"it cannot read the data in {path}"
    behind = first.time - here.time
    if behind > MAX_BEHIND_S or -behind > MAX_AHEAD_S:
        yield f"its clock is {abs(behind):.0f} s {'behind' if behind > 0 else 'ahead of'} the first node's: set it"
    yield from _short_of_space(run_dir)
    if first.driver and CPU_PACKAGE not in first.packages:
        yield from _unwritable_cache()
        yield from _gpu_problems(procs_per_node)


def unseen(complete: Path) -> Iterator[str]:
    """What keeps this node from going on from the checkpoint that the first one sees, which that file of it makes
    complete."""
    if not shown(lambda: _listed(complete)):
        yield f"it does not see the newest checkpoint, {complete.parent}: put it on a file system that all share"


def _listed(complete: Path) -> bool:
    # As a run looks: names that are asked for, and those in a list, come from two caches.
    folder = complete.parent
    try:
        return folder.name in os.listdir(folder.parent) and complete.exists()
    except OSError:
        return False


def out_of_reach(place: str) -> Iterator[str]:
    """What keeps this node from meeting the others at HOST:PORT, where the first one listens for the moment."""
    host, _, port = place.rpartition(":")
    try:
        socket.create_connection((host, int(port)), timeout=REACH_S).close()
    except OSError as error:
        yield (
            f"it cannot reach the first node at {host}, port {port} ({error.strerror or error}), where processes meet: "
            "let nodes reach one another's ports, by that name"
        )


def _short_of_space(run_dir: Path) -> Iterator[str]:
    places = {"run directory": run_dir, "/dev/shm": Path("/dev/shm")}
    try:
        places["temporary folder"] = Path(tempfile.gettempdir())
    except FileNotFoundError:
        yield "it has no temporary folder that can be written: set TMPDIR to one"
    for name, path in places.items():
        free_mib = shutil.disk_usage(path).free // 2**20 if path.is_dir() else 0
        if path.is_dir() and free_mib < MIN_FREE_MIB[name]:
            yield f"its {name} {path} has {free_mib} MiB free, a run needs {MIN_FREE_MIB[name]}: make room there"


def _unwritable_cache() -> Iterator[str]:
    # As Triton finds it: a home that the node does not have, or may not write, is the usual fault.
    home = Path(os.environ.get("TRITON_HOME") or os.path.expanduser("~"))
    cache = Path(os.environ.get("TRITON_CACHE_DIR") or home / ".triton" / "cache").absolute()
    # `Path.exists` raises where a folder on the way may not be entered.
    there = next(folder for folder in (cache, *cache.parents) if os.path.exists(folder))
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        yield f"it cannot write compiled kernels to {cache}: set TRITON_CACHE_DIR to a folder that it can write"
    elif os.statvfs(there).f_flag & os.ST_NOEXEC:
        yield (
            f"it may not run what lies in {cache}, which is mounted noexec: set TRITON_CACHE_DIR to a folder where "
            "compiled kernels can be run"
        )


def _gpu_problems(procs_per_node: int) -> Iterator[str]:
    fields = "index,ecc.errors.uncorrected.volatile.total"
    try:
        asked = subprocess.run(
            ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader,nounits"],
            capture_output=True,
            text=True,
            timeout=30,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        yield f"nvidia-smi does not answer ({type(error).__name__}): its driver hangs or is missing"
        return
    if asked.returncode != 0 and _NO_GPU not in asked.stdout:
        yield f"nvidia-smi fails: {' '.join(asked.stdout.split()) or ' '.join(asked.stderr.split())}"
        return
    yield from gpu_faults(asked.stdout.replace(_NO_GPU, ""), procs_per_node)
    yield from _reported_faults()


def _reported_faults() -> Iterator[str]:
    """From the kernel's log, where this user may read it."""
    try:
        log = subprocess.run(["dmesg"], capture_output=True, text=True, errors="replace", timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return
    yield from xid_faults(log.stdout, float(Path("/proc/uptime").read_text().split()[0]))


def xid_faults(kernel_log: str, uptime_s: float) -> Iterator[str]:
    """From lines of dmesg: what GPUs have reported within the last hour and not got over, each kind once a GPU."""
    told = {
        (gpu, int(number)): XIDS[int(number)]
        for stamp, gpu, number in _XID.findall(kernel_log)
        if int(number) in XIDS and uptime_s - float(stamp) <= XID_AGE_S
    }
    for (gpu, number), what in told.items():
        yield f"its GPU at {gpu} has reported Xid {number} ({what}): reset it, or restart the node"


def gpu_faults(listing: str, procs_per_node: int) -> Iterator[str]:
    """From nvidia-smi's lines of "index, uncorrected errors": too few GPUs, or memory that is broken."""
    rows = [line.split(",") for line in listing.splitlines() if line.strip()]
    if len(rows) < procs_per_node:
        yield (
            f"it has {len(rows)} working GPUs for this job, which starts {procs_per_node} processes there: ask for as "
            "many GPUs (launch's --machine does)"
        )
    for index, errors in rows:
        if errors.strip().isdigit() and int(errors) > 0:
            yield f"its GPU {index.strip()} has {errors.strip()} uncorrected memory errors: reset or replace it"


def main(arguments: Sequence[str]) -> int:
    """Print this node's facts, or compare it with the first and print its name and problems, as JSON.  Returns 1 if
    there are any."""
    parser = argparse.ArgumentParser(
        prog="python -m trainer.health.fitness", description="Check that this node is fit."
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--facts", metavar="TOKEN", help="print this node's facts, with that token")
    what.add_argument("--as", dest="first", metavar="FACTS", help="compare with the first node's facts, as JSON")
    parser.add_argument("--run-dir", type=Path, help="the run directory")
    parser.add_argument("--procs-per-node", type=int, help="processes a node")
    parser.add_argument("--meet", metavar="HOST:PORT", help="where the first node listens while it asks")
    parser.add_argument("--complete", type=Path, help="the file that makes the newest checkpoint complete")
    parser.add_argument("--data", action="append", default=[], help="a folder that every node reads")
    given = parser.parse_args(arguments)
    if given.facts is not None:
        print(as_argument(facts_here(given.facts)))
        return 0
    first = Facts(**json.loads(given.first))
    found = list(
        problems(
            first,
            facts_here(first.token),
            run_dir=given.run_dir,
            data=given.data,
            procs_per_node=given.procs_per_node,
        )
    )
    found += out_of_reach(given.meet) if given.meet else []
    found += unseen(given.complete) if given.complete else []
    print(json.dumps({"node": node_name(), "problems": found}), flush=True)
    return int(bool(found))


def as_argument(facts: Facts) -> str:
    """Facts as `--as` takes them."""
    return json.dumps(asdict(facts))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
