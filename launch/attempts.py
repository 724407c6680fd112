"""When a job first started and how each start ended, one line each in the run directory; is another one worth it?

A time limit, a preemption and a node's failure cost nothing.  Nor does a failure after which there is a newer complete
checkpoint than before it: the run gets on.  Failures without progress, one after the other, are what the budget counts.
"""

import json
from dataclasses import asdict, dataclass
from datetime import datetime
from itertools import takewhile
from pathlib import Path
from typing import Literal

from trainer.run.writing import append_line, replace_text, written

FILE = "attempts.jsonl"
STARTED = "started"
"""A file in the job's folder."""

Ending = Literal["done", "stopped", "failed", "taken", "unfit"]
"""Done; stopped in good order; failed; the scheduler took a node or all of them away; or a node was not fit."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Attempt:
    """The end of one start of the job's processes."""

    submission: str
    """Name of the job's folder: a new submission has a new budget."""
    ended: Ending
    """How the start ended."""
    reason: str
    """Why, in one line."""
    step: int
    """Step of the newest complete checkpoint afterwards; 0 if there is none."""
    progress: bool
    """Whether that is newer than before."""
    time: str
    """When, in the words of the logs."""


def note_first_start(job_dir: Path) -> None:
    """Write into the job's folder when it first started."""
    file = job_dir / STARTED
    if not file.exists():
        replace_text(file, _now())


def _now() -> str:
    """In the words of the logs, whose lines are compared with it where clock and time zone may be others."""
    return datetime.now().isoformat(" ", "milliseconds")


def note(run_dir: Path, submission: str, *, ended: Ending, reason: str, before: int, after: int) -> None:
    """Append how a start ended; `before` and `after` are the newest complete checkpoints' steps."""
    attempt = Attempt(
        submission=submission,
        ended=ended,
        reason=reason,
        step=after,
        progress=after > before,
        time=_now(),
    )
    run_dir.mkdir(parents=True, exist_ok=True)
    with written(run_dir / FILE):
        append_line(run_dir / FILE, json.dumps(asdict(attempt)))


def read(run_dir: Path, submission: str | None = None) -> list[Attempt]:
    """The attempts noted in a run directory, all or one submission's; a torn line is none."""
    path = run_dir / FILE
    found = []
    for line in path.read_text(errors="replace").splitlines() if path.is_file() else ():
        try:
            attempt = Attempt(**json.loads(line))
        except (ValueError, TypeError):
            continue
        if submission in (None, attempt.submission):
            found.append(attempt)
    return found


def stops_without_progress(attempts: list[Attempt]) -> int:
    """How many starts in a row have stopped before a new checkpoint: their time is too short for one."""
    return _in_a_row(attempts, "stopped")


def unfit_without_progress(attempts: list[Attempt]) -> int:
    """How many starts in a row have found nodes that are not fit, without a new checkpoint before."""
    return _in_a_row(attempts, "unfit")


def _in_a_row(attempts: list[Attempt], ended: Ending) -> int:
    """How many of the last attempts, one after another, ended so and brought no new checkpoint."""
    return len(list(takewhile(lambda each: each.ended == ended and not each.progress, reversed(attempts))))


def failures_without_progress(attempts: list[Attempt]) -> int:
    """How many failures in a row have brought no new checkpoint; what is no failure neither counts nor ends the row."""
    count = 0
    for attempt in attempts:
        if attempt.progress:
            count = 0
        elif attempt.ended == "failed":
            count += 1
    return count
