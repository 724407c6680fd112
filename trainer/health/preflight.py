"""Checks before the first step: the code that runs is this checkout's, and the machine computes what it should."""

import importlib.metadata
import importlib.util
import json
import logging
import time
from collections.abc import Collection, Iterator
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import Store

from attention_kernels.selfcheck import check_attention
from trainer.health.fitness import OURS, Facts, UnfitNodes, facts_here, node_name, problems
from trainer.health.slow_ranks import check_ranks
from trainer.models.layer_config import LayerConfig
from trainer.parallel.mesh import Mesh

logger = logging.getLogger(__name__)

FP8_CAPABILITY = (8, 9)
"""The least compute capability whose tensor cores take FP8."""

ANSWER_S = 60
"""How long nodes may take to say whether they are fit."""

_NODES = "preflight"
"""Prefix of the nodes' answers in the store."""

VERSIONED = ("torch", "torchrec", "fbgemm-gpu", "fbgemm-gpu-cpu", "triton")


def check_packages() -> None:
    """Make sure that each of our packages is imported from this checkout: their names are plain words, so another
    distribution might claim one.

    Raises:
        ImportError: another installed package of the same name comes first on the path.
    """
    root = Path(__file__).resolve().parents[2]
    for name in OURS:
        spec = importlib.util.find_spec(name)
        found = Path(spec.origin).resolve().parent if spec and spec.origin else None
        if found != root / name:
            raise ImportError(
                f"package {name!r} is imported from {found}, not from {root / name}: "
                "remove the other package or run from the checkout's folder"
            )


def check_machines(
    mesh: Mesh, store: Store, run_dir: Path, layers: Collection[LayerConfig], dtype: torch.dtype
) -> None:
    """What can only be tried with all ranks there: whether nodes are alike, who is slow, and the kernels on each.
    Called by every rank.

    Raises:
        UnfitNodes: a node cannot take part.
        KernelMismatchError: the kernels differ from their reference.
    """
    check_nodes(mesh, store, run_dir)
    check_ranks(mesh)
    check_kernels(mesh.device, layers, dtype)


def check_nodes(mesh: Mesh, store: Store, run_dir: Path) -> None:
    """Compare every node of a job with the first, whatever has started it; a launcher may have done so before.
    Called by every rank, each of which has opened the data.

    Through the store that they met at: collectives of other code than the first node's would wait for one another.

    Raises:
        UnfitNodes: nodes cannot take part, or do not answer; names each and says why.
    """
    if mesh.nodes == 1:
        return
    # Among the logs: what a killed start leaves behind there is nothing of the run's.
    token = f"logs/preflight-{time.time_ns()}"
    if mesh.is_first:
        (run_dir / token).write_text(token)
        store.set(f"{_NODES}/first", json.dumps(asdict(facts_here(token))))
    if mesh.is_first_of_node:
        first = Facts(**json.loads(store.get(f"{_NODES}/first")))
        here = facts_here(first.token)
        found = list(problems(first, here, run_dir=run_dir, data=(), procs_per_node=mesh.local_world_size))
        store.set(f"{_NODES}/{mesh.rank}", json.dumps({"node": node_name(), "problems": found}))
    if mesh.is_first:
        store.set(f"{_NODES}/unfit", json.dumps(list(_unfit_nodes(mesh, store))))
        (run_dir / token).unlink()
    unfit = json.loads(store.get(f"{_NODES}/unfit"))
    if unfit:
        raise UnfitNodes("; ".join(unfit))


def _unfit_nodes(mesh: Mesh, store: Store) -> Iterator[str]:
    """What the nodes answer that are not fit, and which do not answer."""
    deadline = time.monotonic() + ANSWER_S
    for rank in range(0, mesh.world_size, mesh.local_world_size):
        key = f"{_NODES}/{rank}"
        try:
            store.wait([key], timedelta(seconds=max(1.0, deadline - time.monotonic())))
        except dist.DistError:
            yield f"the node of rank {rank} has not answered in {ANSWER_S} s: it may run other code than the first one"
            continue
        answer = json.loads(store.get(key))
        if answer["problems"]:
            yield f"node {answer['node']}: {'; '.join(answer['problems'])}"


def check_kernels(device: torch.device, layers: Collection[LayerConfig], dtype: torch.dtype) -> None:
    """On a GPU, compare the attention kernels with their reference, for the heads and the type of the layers that have
    them: a compiler or driver may miscompile them.

    Raises:
        KernelMismatchError: they differ; the message names the versions.
    """
    if device.type == "cuda":
        # Other layers are plain PyTorch.
        having = [layer for layer in layers if layer.is_hstu]
        kinds = {(layer.qk_dim, layer.value_dim, layer.relative_bias is not None) for layer in having}
        for key_size, value_size, biased in sorted(kinds):
            check_attention(device, dtype, key_size, value_size, biased=biased)
            logger.info(
                "attention kernels agree with their reference: %s, heads of %d, %d%s",
                *(dtype, key_size, value_size, ", with biases" if biased else ""),
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
