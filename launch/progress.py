"""How far a job's run has come, from the files of its run directory alone."""

import json
import time
from pathlib import Path
from typing import Any

from launch import attempts
from launch.records import JobRecord
from trainer.checkpoint.catalogue import open_catalogue, step_folder
from trainer.checkpoint.manifest import COMPLETE
from trainer.command_line import WrongUse
from trainer.run.run_dir import RunDir

MARGIN_S = 15.0
"""Added to the lead: a signal's way to every process, and their end."""
UNKNOWN_SAVE_S = 60.0
"""Taken for the time of a save before the run has made one."""


def progress_lines(record: JobRecord) -> list[str]:
    """Recipe, run, step, loss, age of the last checkpoint, starts: what is known of each."""
    run = RunDir(Path(record.run_dir))
    lines = [f"recipe: {record.recipe}", f"run: {run.path}"]
    if not run.path.is_dir():
        # The run directory lies in containers, or on another machine.
        return lines
    last = _last_metrics(run.metrics_file)
    if last:
        lines.append(f"step: {last.get('step')}, loss {last.get('loss')}, {_age(last.get('time'))} ago")
    step, complete = _newest(run)
    if step:
        # A checkpoint on an object store has no file here that would tell its age.
        age = f", {_age(complete.stat().st_mtime)} ago" if complete.is_file() else ""
        lines.append(f"last checkpoint: step {step}{age}")
    else:
        lines.append("last checkpoint: none")
    starts = attempts.read(run.path, Path(record.job_dir).name) if record.job_dir else []
    if starts:
        failed = attempts.failures_without_progress(starts)
        lines.append(f"starts that ended: {len(starts)}, the last one: {starts[-1].reason or starts[-1].ended}")
        lines.append(f"failures in a row without a new checkpoint: {failed}")
    return lines


def newest_checkpoint(run: RunDir) -> int:
    """The step of the newest complete checkpoint; 0 where there is none."""
    return _newest(run)[0]


def newest_complete(run: RunDir) -> Path | None:
    """The file that makes the newest checkpoint complete; None without one, or where it lies in an object store."""
    _, file = _newest(run)
    return file if file.is_file() else None


def _newest(run: RunDir) -> tuple[int, Path]:
    """(step of the newest complete checkpoint, 0 where there is none; where the file that makes it complete lies)."""
    store = (run.saved_config() or {}).get("checkpoint", {}).get("store")
    try:
        catalogue = open_catalogue(run, store)
    except WrongUse:
        # The store is another run's, so this one has nothing there.
        return 0, Path(store, COMPLETE)
    step = max(catalogue.steps(), default=0)
    return step, Path(catalogue.store.address, step_folder(step), COMPLETE)


def stopping_time_s(run: RunDir) -> float:
    """How long before an end the run must know of it: for its save, and its way to the next step it may stop at."""
    try:
        saving = float(json.loads(run.saving_file.read_text())["seconds"])
    except (OSError, ValueError, KeyError, TypeError):
        saving = UNKNOWN_SAVE_S
    return MARGIN_S + 2 * saving + 2 * _seconds_between_stops(run)


def _seconds_between_stops(run: RunDir) -> float:
    try:
        steps = json.loads(run.config_file.read_text())["log_every"]
        return float(steps * _last_metrics(run.metrics_file)["step_ms"] / 1000)
    except (OSError, ValueError, KeyError, TypeError):
        return 0.0


def _last_metrics(path: Path) -> dict[str, Any]:
    """The last whole line, read from the file's end: a long run's file is large."""
    if not path.is_file():
        return {}
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - 65536))
        lines = file.read().split(b"\n")[:-1]
    for line in reversed(lines):
        try:
            values = json.loads(line)
        except ValueError:
            continue
        return values if isinstance(values, dict) else {}
    return {}


def _age(moment: float | None) -> str:
    if moment is None:
        return "unknown"
    seconds = max(0, int(time.time() - moment))
    if seconds < 120:
        return f"{seconds} s"
    return f"{seconds // 60} min" if seconds < 7200 else f"{seconds // 3600} h"
