"""Preparations and trainings of benchmarks: each in a process of its own, several side by side, and done once."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.measured_on import device
from trainer.run.run_dir import RunDir


@dataclass(frozen=True, kw_only=True, slots=True)
class Asked:
    """What of a table is to be measured, and how."""

    source: Path
    """Folder with the publishers' files."""
    work: Path
    """Folder for prepared data and runs."""
    rows: tuple[str, ...]
    """By name."""
    seeds: int
    """Trainings of each row."""
    jobs: int
    """Trainings side by side."""
    first_seed: int = 0
    """Seed of the first training; the others count on from it."""
    limit_s: float | None = None
    """Seconds after which no run begins or goes on."""
    settings: tuple[str, ...] = ()
    """Over all rows'."""
    orders: tuple[str, ...] = ()
    """Orders of events of one second, where a table knows several; all if empty."""
    logs: tuple[str, ...] = ()
    """By folder, where a table has several; all if empty."""
    last_pass: bool = False
    """Choose no pass: the recipe's last one counts."""

    @property
    def of_seeds(self) -> range:
        """The trainings' seeds."""
        return range(self.first_seed, self.first_seed + self.seeds)


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
    seconds: float | None
    """From the start of its process to its end; None of a run that was cut off."""
    hardware: str
    """What it ran on."""
    commit: str
    """Commit of the code that it ran, with a + where files differed from it."""


def folder_of(row: str) -> str:
    """What the folders of a table's row are called."""
    return "".join(letter if letter.isalnum() else "_" for letter in row)


def seeded(seed: int) -> tuple[str, ...]:
    """Settings of a run of this seed: initial values, dropout and the order of samples."""
    return (f"seed={seed}", f"data.seed={seed}")


def with_known_seeds(found: dict[str, Any], known: Mapping[str, Any] | None, values: Sequence[str]) -> dict[str, Any]:
    """What was found of a row, with what is known of its seeds that were not trained again.

    `values` names what holds a value a seed.  Nothing is taken from a row of other settings.
    """
    if known is None or not found["seeds"] or _but_seeds(known["settings"]) != _but_seeds(found["settings"]):
        return found
    places = [(known, place) for place, seed in enumerate(known["seeds"]) if seed not in found["seeds"]]
    places += [(found, place) for place in range(len(found["seeds"]))]
    places.sort(key=lambda each: each[0]["seeds"][each[1]])
    joined = {name: _pick([(row[name], place) for row, place in places]) for name in ("seeds", *values)}
    of_all = [known, found] if any(row is known for row, _ in places) else [found]
    about = {name: sorted({each for row in of_all for each in row[name]}) for name in ("commit", "hardware")}
    return {**found, **joined, **about}


def _pick(places: Sequence[tuple[Any, int]]) -> Any:
    """The values at these places of lists, or of lists by name."""
    first = places[0][0]
    if isinstance(first, dict):
        return {name: _pick([(values[name], place) for values, place in places]) for name in first}
    return [values[place] for values, place in places]


def _but_seeds(settings: Sequence[str]) -> list[str]:
    return [each for each in settings if not each.startswith(("seed=", "data.seed="))]


def prepare(out: Path, arguments: Sequence[str]) -> None:
    """Prepare a data set, unless it lies there."""
    if not out.is_dir():
        run_module("pipelines.prepare", [*arguments, "--out", str(out)], _log(out))


def commit() -> str:
    """The code's, with a + where files differ from it."""
    command = ["git", "describe", "--always", "--dirty=+", "--abbrev=10"]
    found = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    return found or os.environ.get("COMMIT", "unknown")


def train_all(trainings: Iterable[Training], jobs: int, limit_s: float | None = None) -> list[Trained]:
    """Train them, at most `jobs` at a time, until all are done or so many seconds are over.

    Each computes on its share of the CPU's cores: PyTorch's threads, else one a core in each process, wait for each
    other busily.

    Raises:
        SystemExit: a training failed; the message names its log.  The others are done by then.
    """
    end = None if limit_s is None else time.monotonic() + limit_s
    with ThreadPoolExecutor(jobs) as pool:
        begun = [pool.submit(train, training, end, jobs) for training in trainings]
    return [each.result() for each in begun]


def train(training: Training, end: float | None = None, jobs: int = 1) -> Trained:
    """Train and evaluate, unless that is done, as one of so many; cut off where `time.monotonic` reaches `end`."""
    run, finished = training.run, training.run / "finished.json"
    about: dict[str, Any] = {"seconds": None, "hardware": device(), "commit": commit()}
    if finished.is_file():
        about = json.loads(finished.read_text())
    elif end is None or end > time.monotonic():
        start = time.perf_counter()
        command = ["train", training.recipe, "--run-dir", str(run), "--set", *training.settings]
        if run_module("trainer", command, _log(run), end, jobs):
            about["seconds"] = round(time.perf_counter() - start, 1)
            finished.write_text(json.dumps(about))
    return Trained(evaluations=_lines(run / "eval.jsonl"), **about)


def _lines(file: Path) -> tuple[dict[str, Any], ...]:
    return tuple(map(json.loads, file.read_text().splitlines() if file.is_file() else []))


def score_all(trainings: Sequence[Training], data: Path, jobs: int) -> list[Trained]:
    """What finished trainings reach on other data, in their last state; of one that is not finished nothing."""
    with ThreadPoolExecutor(jobs) as pool:
        return list(pool.map(lambda training: _score(training, data, jobs), trainings))


def _score(training: Training, data: Path, jobs: int) -> Trained:
    run, file = training.run, RunDir(training.run).eval_file_of(str(data))
    if not (run / "finished.json").is_file():
        return Trained(evaluations=(), seconds=None, hardware=device(), commit=commit())
    if not file.is_file():
        run_module("trainer", ["evaluate", str(run), "--set", f"data.path={data}"], _log(run / data.name), jobs=jobs)
    return replace(train(training), evaluations=_lines(file))


def run_module(module: str, arguments: Sequence[str], log_file: Path, end: float | None = None, jobs: int = 1) -> bool:
    """Run a module of the project as one of so many processes; what it says goes to a file.  Returns whether it ended
    before `time.monotonic` reached `end`; after that it is stopped."""
    log_file.parent.mkdir(parents=True, exist_ok=True)
    threads = max(1, len(os.sched_getaffinity(0)) // jobs)
    with log_file.open("w") as log:
        command = [sys.executable, "-m", module, *arguments]
        limit = None if end is None else end - time.monotonic()
        try:
            found = subprocess.run(
                command,
                stdout=log,
                stderr=subprocess.STDOUT,
                check=False,
                timeout=limit,
                env={"OMP_NUM_THREADS": str(threads), **os.environ},
            )
        except subprocess.TimeoutExpired:
            return False
    if found.returncode:
        raise SystemExit(f"{' '.join(command)} failed: see {log_file}")
    return True


def _log(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.log")
