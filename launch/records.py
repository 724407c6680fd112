"""What this checkout has submitted: one line a job in runs/jobs.jsonl, so that `status`, `logs` and `cancel` know a
job's run directory and where its scheduler's output lies, from any folder and in any later process.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from launch.workspace import ROOT

FILE = ROOT / "runs" / "jobs.jsonl"


@dataclass(frozen=True, kw_only=True, slots=True)
class JobRecord:
    """One submitted job."""

    handle: str
    """TorchX's app handle, SCHEDULER://SESSION/ID."""
    recipe: str
    """The recipe it trains."""
    run_dir: str
    """Absolute run directory."""
    job_dir: str
    """Absolute folder of the scheduler's output and, where code is copied, of the code."""
    pid: int
    """The process that submitted it; a local job lives as long as that process."""
    time: float
    """Unix seconds of the submission."""


def save(record: JobRecord) -> None:
    """Append the record."""
    FILE.parent.mkdir(parents=True, exist_ok=True)
    with FILE.open("a") as file:
        file.write(json.dumps(asdict(record)) + "\n")


def load() -> list[JobRecord]:
    """Every recorded job, oldest first."""
    if not FILE.is_file():
        return []
    return [JobRecord(**json.loads(line)) for line in FILE.read_text().splitlines()]


def find(handle: str) -> JobRecord | None:
    """The record of a handle; the newest, since a new cluster counts its jobs from 1 again."""
    return next((record for record in reversed(load()) if record.handle == handle), None)


def job_dir_of(scheduler: str, app_id: str) -> Path | None:
    """The job's folder, if this checkout submitted it."""
    matches = [r for r in load() if r.handle.startswith(f"{scheduler}://") and r.handle.rsplit("/", 1)[1] == app_id]
    return Path(matches[-1].job_dir) if matches else None
