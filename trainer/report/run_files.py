"""What the files of a run directory say, read while the run may still be writing them."""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from embeddings.plan import Plan
from embeddings.planning.plan_file import parse_plan
from trainer.command_line import WrongUse
from trainer.run.json_lines import whole_lines
from trainer.run.run_dir import NUMBERS, VOCABULARIES, RunDir

Record = dict[str, Any]
"""One line of a file of JSON lines."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RunFiles:
    """A run as its directory tells it."""

    name: str
    """What the page calls it; no two runs of a page share one."""
    config: dict[str, Any]
    """The resolved configuration, and the digests of its vocabularies."""
    metrics: list[Record]
    """A record a logged step; none of a run that ended before its first."""
    evaluations: dict[str, list[Record]]
    """By the data that was scored: "" is the run's own evaluation split."""
    progressive: list[Record]
    """A record a part of the data that was scored before it was trained on."""
    plan: Plan | None
    """The sharding plan in force."""
    environment: dict[str, Any]
    """What its newest start ran on, as `environment.json` says; empty if that is missing."""
    notes: list[str]
    """What is missing from the directory, or was passed over in it; a sentence each."""

    @property
    def last(self) -> Record:
        """The newest logged step; empty if there is none."""
        return self.metrics[-1] if self.metrics else {}


def read_runs(paths: list[Path]) -> list[RunFiles]:
    """The runs in the order given, named by their folders, or by their whole paths where two folders share a name.

    Raises:
        WrongUse: a directory is named twice or is no run's, or none of them holds a logged step yet.
        ValueError: a file is damaged in a way that no crash leaves behind.
    """
    resolved = [path.resolve() for path in paths]
    for path, place in zip(paths, resolved, strict=True):
        if resolved.count(place) > 1:
            raise WrongUse(f"{path} is named twice: name each run once")
    names = [path.name for path in resolved]
    unique = len(set(names)) == len(names)
    runs = [_read(path, place.name if unique else str(place)) for path, place in zip(paths, resolved, strict=True)]
    if not any(run.metrics for run in runs):
        which = str(paths[0]) if len(paths) == 1 else "each of these runs"
        raise WrongUse(f"{which} holds no logged step yet: wait for the first line of metrics.jsonl")
    return runs


def _read(path: Path, name: str) -> RunFiles:
    run, notes = RunDir(path), list[str]()
    config = run.config_of_run()
    metrics = _records(run.metrics_file, notes)
    if not metrics:
        notes.append("holds no logged step yet")
    broken = next((each["step"] for each in metrics if not math.isfinite(each.get("loss") or 0.0)), None)
    if broken is not None:
        notes.append(f"its loss is not finite at step {broken:,}")
    others = {unquote(file.stem.removeprefix("eval_")): file for file in sorted(path.glob("eval_*.jsonl"))}
    evaluations = {data: _records(file, notes) for data, file in {"": run.eval_file, **others}.items()}
    step, max_steps = metrics[-1]["step"] if metrics else 0, config.get("max_steps")
    if max_steps is not None and step < max_steps:
        notes.append(f"stands at step {step:,} of {max_steps:,}")
    if not evaluations[""]:
        notes.append("has not been evaluated yet")
    # Quantiles of numbers would fill the page.
    meanings = {key: text for key, text in run.saved_vocabularies().items() if key != NUMBERS}
    return RunFiles(
        name=name,
        config={**config, VOCABULARIES: meanings},
        metrics=metrics,
        evaluations={data: records for data, records in evaluations.items() if records},
        progressive=_records(run.progressive_file, notes),
        plan=_plan(run.plan_file, notes),
        environment=run.saved_environment(),
        notes=notes,
    )


def _records(file: Path, notes: list[str]) -> list[Record]:
    lines, torn = whole_lines(file)
    if torn:
        notes.append(f"{file.name} ends in the middle of a line, which is left out")
    return [json.loads(line) for line in lines]


def _plan(file: Path, notes: list[str]) -> Plan | None:
    if not file.is_file():
        notes.append(f"holds no {file.name}")
        return None
    try:
        return parse_plan(file)
    except ValueError as error:
        # The curves of an old run are worth showing whatever has become of the format of plans.
        notes.append(f"its plan is not shown: {error}")
        return None
