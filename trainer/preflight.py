"""Checks before the first step: the code that runs is this checkout's, and the machine computes what it should."""

import importlib.metadata
import importlib.util
import logging
import socket
import time
from collections.abc import Collection, Sequence
from pathlib import Path

import torch
import torch.distributed as dist

from attention_kernels.selfcheck import check_attention
from trainer.mesh import Mesh
from trainer.models.config import LayerConfig

logger = logging.getLogger(__name__)

PACKAGES = ("attention_kernels", "embeddings", "launch", "pipelines", "trainer")
"""The project's top-level packages; their names are plain words, so another distribution might claim one."""

FP8_CAPABILITY = (8, 9)
"""The least compute capability whose tensor cores take FP8."""

FIRST_COLLECTIVE_MIB = {"cuda": 256, "cpu": 4}
"""What the ranks add up before the first step."""

VERSIONED = ("torch", "torchrec", "fbgemm-gpu", "fbgemm-gpu-cpu", "triton")


def check_packages() -> None:
    """Make sure that each of our packages is imported from this checkout.

    Raises:
        ImportError: another installed package of the same name comes first on the path.
    """
    root = Path(__file__).resolve().parents[1]
    for name in PACKAGES:
        spec = importlib.util.find_spec(name)
        found = Path(spec.origin).resolve().parent if spec and spec.origin else None
        if found != root / name:
            raise ImportError(
                f"package {name!r} is imported from {found}, not from {root / name}: "
                "remove the other package or run from the checkout's folder"
            )


def check_machines(mesh: Mesh, layers: Collection[LayerConfig], dtype: torch.dtype) -> None:
    """What can only be tried with all ranks there: their collectives, and the kernels on each.  Called by every rank.

    Raises:
        KernelMismatchError: the kernels differ from their reference.
    """
    check_ranks(mesh)
    check_kernels(mesh.device, layers, dtype)


def check_kernels(device: torch.device, layers: Collection[LayerConfig], dtype: torch.dtype) -> None:
    """On a GPU, compare the attention kernels with their reference, for the heads and the type of these layers: a
    compiler or driver may miscompile them.

    Raises:
        KernelMismatchError: they differ; the message names the versions.
    """
    if device.type == "cuda":
        for key_size, value_size in sorted({(layer.qk_dim, layer.value_dim) for layer in layers}):
            check_attention(device, dtype, key_size, value_size)
            logger.info(
                "attention kernels agree with their reference: %s, heads of %d, %d", dtype, key_size, value_size
            )


def check_ranks(mesh: Mesh) -> None:
    """Time a product on every rank and the first collectives, and name the ranks that are slow.  Called by every rank.

    On a CPU other processes' work would be mistaken for slowness, so only the collectives are tried there.
    """
    product_ms = _product_ms(mesh.device) if mesh.device.type == "cuda" else 0.0
    mine = (socket.gethostname(), product_ms)
    ranks: list[tuple[str, float]] = [mine] * mesh.world_size
    dist.all_gather_object(ranks, mine)  # every rank
    num_bytes = FIRST_COLLECTIVE_MIB[mesh.device.type] * 2**20
    x = torch.zeros(num_bytes // 4, device=mesh.device)
    dist.all_reduce(x)  # every rank; the first one sets up connections
    started = time.perf_counter()
    dist.all_reduce(x)
    total = x.sum().item()  # waits for the device
    rate = num_bytes / (time.perf_counter() - started) / 1e9
    assert total == 0, "a sum of zeros"
    if mesh.is_first:
        logger.info("all-reduce of %d MiB over %d ranks: %.2f GB/s", num_bytes // 2**20, mesh.world_size, rate)
        for words in slow_ranks(ranks):
            logger.warning("%s", words)


def slow_ranks(ranks: Sequence[tuple[str, float]], factor: float = 1.3) -> list[str]:
    """Ranks, each with its host and the time of a product in ms, that take `factor` times the median or more."""
    median = sorted(ms for _, ms in ranks)[len(ranks) // 2]
    return [
        f"rank {rank} on {host} takes {ms:.2f} ms for a product, the median rank {median:.2f}: all wait for it"
        for rank, (host, ms) in enumerate(ranks)
        if median > 0 and ms >= factor * median
    ]


def _product_ms(device: torch.device) -> float:
    """A square product in bfloat16, the best of a few."""
    a = torch.ones(4096, 4096, dtype=torch.bfloat16, device=device)
    times = []
    for _ in range(5):
        torch.cuda.synchronize(device)
        started = time.perf_counter()
        torch.mm(a, a)
        torch.cuda.synchronize(device)
        times.append((time.perf_counter() - started) * 1e3)
    return min(times)


def check_fp8(device: torch.device) -> None:
    """For models with `layer.fp8`: a GPU must have FP8 tensor cores; a CPU emulates them.

    Raises:
        ValueError: it has none.
    """
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < FP8_CAPABILITY:
        raise ValueError(
            f"layer.fp8=true needs a GPU of compute capability {FP8_CAPABILITY[0]}.{FP8_CAPABILITY[1]} or above, which "
            f"has FP8 tensor cores; {device_name(device)} has none: set fp8=false"
        )


def installed_versions() -> dict[str, str]:
    """Versions of the packages that decide the numbers."""
    versions = {}
    for name in VERSIONED:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def device_name(device: torch.device) -> str:
    """What the device calls itself."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
