"""Checkpoints: everything that a run needs to go on, on this or another number of ranks, as if it had never stopped.

A checkpoint is a folder of PyTorch's distributed checkpoint format (DCP), whose entries have names that do not depend
on the sharding plan, and `progress.json` with the plain numbers:

    tables/...             embedding tables              (sharded; DCP reshards them)
    tables_optimizer/...   their fused optimizer's state (likewise)
    dense/...              dense parameters              (replicated; stored once)
    dense_optimizer/...    Adam's state                  (likewise)
    progress.json          step, samples, data position, seed (random numbers are a function of seed, step and rank)

It is written under a temporary name and gets its name and the file COMPLETE last.
"""

import json
import logging
import os
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed._shard.sharded_tensor.api import ShardedTensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from pipelines.position import DataPosition, position_from_dict
from trainer.mesh import Mesh
from trainer.run_dir import COMPLETE, RunDir, write_json

logger = logging.getLogger(__name__)

Tensors = dict[str, Any]
"""Flat state: a name independent of the plan -> tensor or ShardedTensor, sharing memory with the live model."""


@dataclass(kw_only=True, slots=True)
class Progress:
    """How far a run has come; plain values only."""

    step: int = 0
    """Optimizer steps taken."""
    samples: int = 0
    """Training samples consumed, all ranks."""
    position: DataPosition | None = None
    """Where the data goes on; None at the start."""

    def advance(self, samples: int, position: DataPosition) -> None:
        """One step further."""
        self.step += 1
        self.samples += samples
        self.position = position


def save_checkpoint(run: RunDir, tensors: Tensors, progress: Progress, mesh: Mesh, *, keep: int) -> None:
    """Write the checkpoint of `progress.step`, then delete all but the newest `keep`.  Called by every rank.

    Raises:
        FloatingPointError: a tensor holds a number that is not finite; nothing is written or deleted.
    """
    _check_finite(run, tensors, progress.step)
    final = run.checkpoint(progress.step)
    partial = final.with_name(f".{final.name}.partial")
    if mesh.is_first:
        # A former process may have died here: before the rename, or between it and COMPLETE.
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    dist.barrier()  # no rank writes before the folder is there
    try:
        save(tensors, checkpoint_id=partial)
    except CheckpointException as error:
        raise OSError(f"the checkpoint of step {progress.step} cannot be written: {_reason(error)}") from None
    if mesh.is_first:
        write_json(
            partial / "progress.json", asdict(progress) | {"world_size": mesh.world_size, "torch": torch.__version__}
        )
        if final.exists():
            shutil.rmtree(final)
        os.replace(partial, final)
        (final / COMPLETE).touch()
        _flush(final)
        for step in run.complete_steps()[:-keep]:
            # Without COMPLETE first, so that a half-deleted folder is never taken for a checkpoint.
            (run.checkpoint(step) / COMPLETE).unlink()
            shutil.rmtree(run.checkpoint(step))
    dist.barrier()  # no rank goes on before the checkpoint is complete
    logger.info("checkpoint of step %d is complete: %s", progress.step, final)


def read_progress(folder: Path) -> Progress:
    """The plain numbers of a complete checkpoint.

    Raises:
        ValueError: they cannot be read.
    """
    try:
        values = json.loads((folder / "progress.json").read_text())
        return Progress(step=values["step"], samples=values["samples"], position=position_from_dict(values["position"]))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(_damaged(folder, error)) from None


def load_tensors(folder: Path, tensors: Tensors) -> None:
    """Fill `tensors` in place from a checkpoint that any number of ranks wrote.  Called by every rank.

    Raises:
        ValueError: the checkpoint lacks a tensor of the model, holds one that the model lacks, or one of another shape,
            or it cannot be read.
    """
    try:
        metadata = FileSystemReader(folder).read_metadata().state_dict_metadata
    except (OSError, ValueError, EOFError, UnpicklingError) as error:
        raise ValueError(_damaged(folder, error)) from None
    stored = {name: tuple(entry.size) for name, entry in metadata.items() if isinstance(entry, TensorStorageMetadata)}
    # A rank has no name for a table of which it holds no shard, so the names of all ranks are compared.
    shapes_per_rank: list[dict[str, tuple[int, ...]]] = [{} for _ in range(dist.get_world_size())]
    dist.all_gather_object(shapes_per_rank, {name: _shape(value) for name, value in tensors.items()})
    needed = {name: shape for shapes in shapes_per_rank for name, shape in shapes.items()}
    missing, unknown = sorted(set(needed) - set(stored)), sorted(set(stored) - set(needed))
    if missing or unknown:
        problem = (
            f"lacks {missing[0]!r}, which the model has" if missing else f"holds {unknown[0]!r}, which the model lacks"
        )
        raise ValueError(f"checkpoint {folder} {problem}: it is of another model (code or configuration)")
    for name, shape in needed.items():
        if stored[name] != shape:
            raise ValueError(f"checkpoint {folder} holds {name!r} of shape {stored[name]}, the model's is {shape}")
    try:
        load(tensors, checkpoint_id=folder)
    except CheckpointException as error:
        raise ValueError(_damaged(folder, _reason(error))) from None


def _reason(error: CheckpointException) -> str:
    """What went wrong on the first rank on which something did; DCP shows every rank's traceback."""
    first, _ = next(iter(error.failures.values()))
    return f"{type(first).__name__}: {' '.join(str(first).split()) or 'no more is known'}"


def _damaged(folder: Path, reason: object) -> str:
    return f"checkpoint {folder} cannot be read ({reason}): remove that folder to go on from the one before it"


def _check_finite(run: RunDir, tensors: Tensors, step: int) -> None:
    names = [name for name, value in tensors.items() if not all(map(_is_finite, _local(value)))]
    names_per_rank: list[list[str]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(names_per_rank, names)  # every rank
    broken = [name for names in names_per_rank for name in names]
    if broken:
        steps = run.complete_steps()
        newest = f"the newest checkpoint is of step {steps[-1]}" if steps else "there is no checkpoint yet"
        raise FloatingPointError(
            f"{broken[0]} is not finite after step {step}, which is not saved; {newest}: "
            "start again in another --run-dir with lower learning rates or a longer schedule.warmup_steps"
        )


def _local(value: torch.Tensor | ShardedTensor) -> list[torch.Tensor]:
    """What this rank holds of it."""
    return [shard.tensor for shard in value.local_shards()] if isinstance(value, ShardedTensor) else [value]


def _is_finite(x: torch.Tensor) -> bool:
    """By the sum, which takes no memory; in float64 that of finite float32 numbers is finite."""
    return not x.is_floating_point() or bool(x.sum(dtype=torch.float64).isfinite())


def _shape(value: torch.Tensor | ShardedTensor) -> tuple[int, ...]:
    return tuple(value.size())


def _flush(folder: Path) -> None:
    """Make the folder's entries survive a crash of the machine."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
