"""Start real training jobs (gloo, by torchrun where that matters) and read back what they wrote."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from math import prod
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.support.distributed import run_module
from tests.support.small_data import small_dataset

ROOT = Path(__file__).resolve().parents[2]
TIMEOUT_S = 240

# A model and batches small enough for many runs; no dropout, whose random numbers follow the number of ranks.
SMALL = (
    "data.global_batch_size=12",
    "data.num_epochs=1",
    # A decay ends with the run, so that a run that goes on further would have had other rates.
    "schedule.kind=constant",
    "data.eval_batch_size=1024",
    "data.max_history_len=24",
    "model.max_len=160",
    "model.dim=16",
    "embedding_dim=8",
    "model.layer.qk_dim=8",
    "model.layer.value_dim=8",
    "model.layer.dropout=0.0",
    "log_every=1",
    "precision=float32",
)


def run_trainer(*arguments: str, ranks: int = 1, module: str = "trainer", **environment: str) -> tuple[int, str]:
    """`python -m trainer` on `ranks` processes, to its end: its exit status and all that it wrote."""
    if not torch.cuda.is_available():
        return run_module(module, ranks, arguments, **environment)
    process = _start(module, ranks, arguments, environment)
    output, _ = process.communicate(timeout=TIMEOUT_S)
    return process.returncode, output


def start_training(
    run_dir: Path,
    ranks: int,
    *overrides: str,
    plan: Path | None = None,
    recipe: str = "kuairand_sample",
    options: tuple[str, ...] = (),
    module: str = "trainer",
    environment: Mapping[str, str] = MappingProxyType({}),
) -> subprocess.Popen[str]:
    """Start a recipe, made small, on `ranks` processes; the caller waits for it or calls `kill_job`.

    `module` is run in place of the trainer's command line, `environment` is added to this process's.  Where there are
    GPUs each rank has one, so that these tests are NCCL's on a machine of several.
    """
    return _start(module, ranks, _arguments(run_dir, overrides, plan, recipe, options), environment)


def _start(module: str, ranks: int, arguments: Sequence[str], environment: Mapping[str, str]) -> subprocess.Popen[str]:
    if torch.cuda.is_available() and ranks > torch.cuda.device_count():
        pytest.skip(f"{ranks} ranks need as many GPUs, this machine has {torch.cuda.device_count()}")
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"] if ranks > 1 else []
    return subprocess.Popen(
        [sys.executable, *launcher, "-m", module, *arguments],
        cwd=ROOT,
        # One thread a process: sums then do not depend on how busy the machine is.
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def _arguments(
    run_dir: Path, overrides: Sequence[str], plan: Path | None, recipe: str, options: Sequence[str]
) -> list[str]:
    arguments = ["train", recipe, "--run-dir", str(run_dir), *(["--plan", str(plan)] if plan else []), *options]
    return [*arguments, "--set", f"data.path={small_dataset()}", *SMALL, *overrides]


def kill_job(process: subprocess.Popen[str]) -> None:
    """SIGKILL the launcher and every process below it; torchrun gives its workers sessions of their own."""
    family = [process.pid]
    for pid in family:
        family += [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    for pid in family:
        os.kill(pid, signal.SIGKILL)
    process.communicate()


def run_training(
    run_dir: Path,
    ranks: int,
    *overrides: str,
    plan: Path | None = None,
    recipe: str = "kuairand_sample",
    options: tuple[str, ...] = (),
    module: str = "trainer",
    **environment: str,
) -> tuple[int, str]:
    """As `start_training`, to the job's end: its exit status and all that it wrote."""
    arguments = _arguments(run_dir, overrides, plan, recipe, options)
    return run_trainer(*arguments, ranks=ranks, module=module, **environment)


def train(run_dir: Path, ranks: int, *overrides: str, **more: Any) -> list[dict[str, Any]]:
    """As `run_training`, of a job that ends well: the lines of metrics.jsonl."""
    status, output = run_training(run_dir, ranks, *overrides, **more)
    assert status == 0, output[-6000:]
    return read_lines(run_dir / "metrics.jsonl")


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSON lines file, without a line that is still being written."""
    text = path.read_text() if path.exists() else ""
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]


def losses(lines: list[dict[str, Any]]) -> dict[int, float]:
    """Loss by step."""
    return {line["step"]: line["loss"] for line in lines}


def read_checkpoint(folder: Path) -> dict[str, Tensor]:
    """Every tensor of a checkpoint, whole, by the format's description alone."""
    manifest = json.loads((folder / "manifest.json").read_text())
    before = {} if manifest["base"] is None else read_checkpoint(folder.with_name(f"step-{manifest['base']:08d}"))
    content = {name: (folder / name).read_bytes() for name in manifest["files"]}
    tensors = {}
    for name, stored in manifest["tensors"].items():
        dtype = getattr(torch, stored["dtype"])
        tensors[name] = before.get(name, torch.empty(stored["shape"], dtype=dtype))
        for piece in stored["pieces"]:
            if "rows" in piece:
                _read_rows(tensors[name], piece, content[piece["file"]])
                continue
            values = torch.frombuffer(
                bytearray(content[piece["file"]]), dtype=dtype, offset=piece["start"], count=prod(piece["sizes"])
            )
            box = tuple(slice(o, o + n) for o, n in zip(piece["offsets"], piece["sizes"], strict=True))
            tensors[name][box] = values.view(piece["sizes"])
    return tensors


def _read_rows(tensor: Tensor, piece: dict[str, Any], content: bytes) -> None:
    """The rows that a piece holds by their numbers."""
    count, columns = piece["rows"]["count"], piece["sizes"][1:]
    if not count:
        return
    rows = torch.frombuffer(bytearray(content), dtype=torch.int64, offset=piece["rows"]["start"], count=count)
    values = torch.frombuffer(
        bytearray(content), dtype=tensor.dtype, offset=piece["start"], count=count * prod(columns)
    )
    for row, value in zip(rows.tolist(), values.view(count, *columns), strict=True):
        assert piece["offsets"][0] <= row < piece["offsets"][0] + piece["sizes"][0]
        tensor[(row, *(slice(o, o + n) for o, n in zip(piece["offsets"][1:], columns, strict=True)))] = value
