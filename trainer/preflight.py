"""Checks before the first step: the code that runs is this checkout's, and the machine computes what it should."""

import importlib.metadata
import importlib.util
import logging
from collections.abc import Collection
from pathlib import Path

import torch

from attention_kernels.selfcheck import check_attention
from trainer.models.config import LayerConfig

logger = logging.getLogger(__name__)

PACKAGES = ("attention_kernels", "embeddings", "launch", "pipelines", "trainer")
"""The project's top-level packages; their names are plain words, so another distribution might claim one."""

FP8_CAPABILITY = (8, 9)
"""The least compute capability whose tensor cores take FP8."""

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
