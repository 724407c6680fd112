"""A job with `--from-step` goes back to that checkpoint once, even if its launcher repeats the command.

torchrun (`--max-restarts`) and Slurm (`--requeue`) repeat `--from-step N` with the rest of the command: all that the
run has saved since would be set aside each time, and it would never come to its end.
"""

import logging
import os

from trainer.run.run_dir import RunDir, read_object
from trainer.run.writing import write_json

logger = logging.getLogger(__name__)

JOBS = (("TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT"), ("SLURM_JOB_ID", "SLURM_RESTART_COUNT"))
"""Variables by which launchers tell a process which job it belongs to, and how often that has been started again."""


def note_going_back(run: RunDir, step: int | None) -> None:
    """Take note that this job has gone back to `step`; of None, nothing."""
    if step is not None:
        jobs = {job: os.environ[job] for job, _ in JOBS if job in os.environ}
        write_json(run.back_file, {"step": step, "jobs": jobs})


def has_gone_back(run: RunDir, step: int) -> bool:
    """Whether this job, which was started again, had gone back to `step` before.

    Raises:
        WrongUse: the note of it is damaged.
    """
    if not run.back_file.is_file():
        return False
    noted = read_object(run.back_file, "remove it, and the job goes back once more")
    again = [job for job, restarts in JOBS if os.environ.get(restarts, "0") != "0"]
    found = noted["step"] == step and any(noted["jobs"].get(job, "") == os.environ.get(job) for job in again)
    if found:
        logger.info(
            "this job went back to step %d before it was started again; it resumes from the newest checkpoint", step
        )
    return found
