"""What has been submitted: one line a job in runs/jobs.jsonl of the checkout that did it, and the same in the job's own
folder, where every checkout finds it.

So `status`, `logs` and `cancel` know a job's run directory and where its scheduler's output lies.
"""

import json
import logging
import os
from dataclasses import asdict, dataclass
from pathlib import Path

from launch.workspace import ROOT
from trainer.run.writing import append_line, replace_text

logger = logging.getLogger(__name__)

FILE = ROOT / "runs" / "jobs.jsonl"

IN_JOB_DIR = "job.json"


@dataclass(frozen=True, kw_only=True, slots=True)
class JobRecord:
    """One submitted job."""

    handle: str
    """TorchX's app handle, SCHEDULER://SESSION/ID."""
    recipe: str
    """The recipe it trains."""
    run_dir: str
    """Absolute run directory, as the workers see it."""
    job_dir: str
    """Absolute folder of the scheduler's output and, where code is copied, of the code."""
    pid: int
    """The process that submitted it; a local job lives as long as that process."""
    time: float
    """Unix seconds of the submission."""
    began: int | None = None
    """When that process was started (`trainer.health.process_table.Status`); None where the system does not say."""


def save(record: JobRecord) -> None:
    """Note the job in its own folder, where it has one here, and in this checkout, where those may be written."""
    # The job is on its way, and nothing may keep its handle from being said.
    try:
        if record.job_dir:
            Path(record.job_dir).mkdir(parents=True, exist_ok=True)
            save_in(Path(record.job_dir), record)
    except OSError as error:
        logger.warning("other checkouts do not know the job: %s", error)
    try:
        FILE.parent.mkdir(parents=True, exist_ok=True)
        append_line(FILE, json.dumps(asdict(record)))
    except OSError as error:
        logger.warning("%s cannot be written (%s): this checkout does not know the job", FILE, error.strerror)


def folder_of(run_dir: Path, name: str) -> Path:
    """The folder of a job of that name: its code, where that is copied, and its output."""
    return run_dir / "jobs" / name


def save_in(job_dir: Path, record: JobRecord) -> None:
    """Put the record in the job's folder; of a job with a successor, the successor's."""
    replace_text(job_dir / IN_JOB_DIR, json.dumps(asdict(record)) + "\n")


def of_run(run_dir: Path) -> list[JobRecord]:
    """Every job whose folder lies in a run directory, oldest first; of a copy of another one, not the other's jobs."""
    found = [find_in(folder) for folder in folder_of(run_dir, "").glob("*")]
    ours = [record for record in found if record is not None and not _of_another(record, run_dir)]
    return sorted(ours, key=lambda record: record.time)


def _of_another(record: JobRecord, run_dir: Path) -> bool:
    # One whose directory is gone was moved with it.
    return os.path.exists(record.run_dir) and not os.path.samefile(record.run_dir, run_dir)


def load() -> list[JobRecord]:
    """Every job recorded in this checkout, oldest first; a line that is none is left out, with a warning."""
    if not FILE.is_file():
        return []
    found = []
    for number, line in enumerate(FILE.read_text(errors="replace").splitlines(), start=1):
        record = _record(line)
        if record is not None:
            found.append(record)
        elif line:
            logger.warning("%s, line %d is damaged and left out", FILE, number)
    return found


def find(handle: str) -> JobRecord | None:
    """The record of a handle; the newest, since a new cluster counts its jobs from 1 again.

    A job that went on as another one is that other one, and is found by its handle too.
    """
    known = load()[::-1]
    found = next((record for record in known if record.handle == handle), None)
    if found is not None:
        return find_in(Path(found.job_dir)) or found
    current = (find_in(Path(record.job_dir)) for record in known)
    return next((record for record in current if record is not None and record.handle == handle), None)


def find_in(job_dir: Path) -> JobRecord | None:
    """The record in a job's folder; None where it is no folder of ours, or may not be read."""
    try:
        return _record((job_dir / IN_JOB_DIR).read_text())
    except OSError:
        return None


def _record(line: str) -> JobRecord | None:
    try:
        return JobRecord(**json.loads(line))
    except (ValueError, TypeError):
        return None
