"""Preparations and trainings of benchmarks: each in a process of its own, several side by side, and done once."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch


@dataclass(frozen=True, kw_only=True, slots=True)
class Training:
    """One run of a recipe."""

    recipe: str
    run: Path
    """Its run directory; what it says goes to a file beside it."""
    settings: tuple[str, ...]
    """KEY=VALUE, over the recipe's."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Trained:
    """What a run left."""

    evaluations: tuple[dict[str, Any], ...]
    """The lines of its eval.jsonl, in the order of steps."""
    seconds: float
    """From the start of its process to its end."""


def seeded(seed: int) -> tuple[str, ...]:
    """Settings of a run of this seed: initial values, dropout and the order of samples."""
    return (f"seed={seed}", f"data.seed={seed}")


def hardware() -> str:
    """What it runs on."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else f"{os.cpu_count()}-core CPU machine"


def prepare(out: Path, arguments: Sequence[str]) -> None:
    """Prepare a data set, unless it lies there."""
    if not out.is_dir():
        run_module("pipelines.prepare", [*arguments, "--out", str(out)], _log(out))


def train_all(trainings: Iterable[Training], jobs: int) -> list[Trained]:
    """Train them, at most `jobs` at a time.

    Raises:
        SystemExit: a training failed; the message names its log.
    """
    with ThreadPoolExecutor(jobs) as pool:
        return list(pool.map(train, trainings))


def train(training: Training) -> Trained:
    """Train and evaluate, unless that is done."""
    run, finished = training.run, training.run / "finished.json"
    if not finished.is_file():
        start = time.perf_counter()
        command = ["train", training.recipe, "--run-dir", str(run), "--set", *training.settings]
        run_module("trainer", command, _log(run))
        finished.write_text(json.dumps({"seconds": round(time.perf_counter() - start, 1)}))
    lines = (run / "eval.jsonl").read_text().splitlines()
    return Trained(evaluations=tuple(map(json.loads, lines)), seconds=json.loads(finished.read_text())["seconds"])


def run_module(module: str, arguments: Sequence[str], log_file: Path) -> None:
    """Run a module of the project; what it says goes to a file."""
    log_file.parent.mkdir(parents=True, exist_ok=True)
    with log_file.open("w") as log:
        command = [sys.executable, "-m", module, *arguments]
        if subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, check=False).returncode:
            raise SystemExit(f"{' '.join(command)} failed: see {log_file}")


def _log(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.log")
