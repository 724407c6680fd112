"""What `python -m trainer doctor` finds on this machine: versions, devices, kernels, room; and what to type next."""

import importlib.metadata
import os
import platform
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch

from attention_kernels.selfcheck import check_attention
from trainer.command_line import Finding

ROOT = Path(__file__).resolve().parents[2]
MIN_SHARED_MIB = 256


def look_at_machine() -> Iterator[Finding]:
    """One finding at a time, what is quick first."""
    yield Finding(ok=True, text=f"Python {platform.python_version()} on {platform.platform()}, {os.cpu_count()} cores")
    on_gpu = torch.cuda.is_available()
    yield from _versions("cuda" if on_gpu else "cpu")
    yield from _driver(on_gpu)
    for index in range(torch.cuda.device_count()):
        yield from _gpu(torch.device("cuda", index))
    yield from _room()
    yield Finding(ok=True, text=_what_to_type())


def pinned_versions(platform_set: str) -> dict[str, str]:
    """The tested versions of a platform's set, by distribution."""
    lines = (ROOT / "requirements" / f"{platform_set}.txt").read_text().splitlines()
    return dict(line.split("==") for line in lines if re.fullmatch(r"[\w.-]+==[\w.+-]+", line))


def _versions(platform_set: str) -> Iterator[Finding]:
    pinned = pinned_versions(platform_set)
    wrong = []
    for name, tested in pinned.items():
        try:
            installed = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            installed = "missing"
        # A wheel may name its CUDA version after a plus.
        if installed.split("+")[0] != tested:
            wrong.append(f"{name} {installed} (tested: {tested})")
    if wrong:
        yield Finding(ok=False, text=f"versions besides the tested {platform_set} set: {', '.join(wrong)}: `make env`")
    else:
        listed = ", ".join(f"{name} {version}" for name, version in pinned.items())
        yield Finding(ok=True, text=f"the tested {platform_set} set: {listed}")


def _driver(on_gpu: bool) -> Iterator[Finding]:
    program = shutil.which("nvidia-smi")
    if program is None:
        yield Finding(ok=True, text="no NVIDIA driver: training runs on the CPU, with gloo")
        return
    command = [program, "--query-gpu=driver_version,name", "--format=csv,noheader"]
    asked = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    lines = asked.stdout.splitlines()
    if asked.returncode != 0 or not lines:
        yield Finding(ok=False, text=f"nvidia-smi fails: {' '.join(asked.stderr.split())}")
    elif not on_gpu:
        yield Finding(ok=False, text=f"{len(lines)} GPUs that torch cannot use: install the cuda set, `make env`")
    else:
        yield Finding(ok=True, text=f"driver {lines[0].split(',')[0]}, {len(lines)} GPUs")


def _gpu(device: torch.device) -> Iterator[Finding]:
    free, total = (amount / 2**30 for amount in torch.cuda.mem_get_info(device))
    text = f"{device}: {torch.cuda.get_device_name(device)}, {free:.0f} of {total:.0f} GiB free"
    try:
        check_attention(device, torch.bfloat16, 64, 64)
    except (RuntimeError, ValueError) as error:
        yield Finding(ok=False, text=f"{text}; the attention kernels differ from their reference: {error}")
    else:
        yield Finding(ok=free > total / 2, text=f"{text}; the attention kernels agree with their reference")


def _room() -> Iterator[Finding]:
    for path, least_mib in ((Path("/dev/shm"), MIN_SHARED_MIB), (Path(tempfile.gettempdir()), MIN_SHARED_MIB)):
        if path.is_dir():
            free = shutil.disk_usage(path).free // 2**20
            yield Finding(ok=free >= least_mib, text=f"{path}: {free} MiB free, a run needs {least_mib}")


def _what_to_type() -> str:
    gpus = torch.cuda.device_count()
    procs = gpus or min(2, os.cpu_count() or 1)
    size = f"--nodes 1 --procs-per-node {procs}"
    return f"next: python -m launch submit kuairand_sample --scheduler local_cwd {size}"
