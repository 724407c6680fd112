"""A run that counts: it keeps the trainer's side of the bargain with the launcher, without torch and within a second.

    python -m tests.launch.counting_job RUN_DIR STEPS [SAVE_EVERY] [RANK_THAT_FAILS STEP_AT_WHICH [ALWAYS]]

Every step takes a tenth of a second and adds a line to RUN_DIR/metrics.jsonl; a checkpoint is a folder with COMPLETE; a
stop is obeyed at the next step if all ranks agree, saved, and answered with exit status 3.
"""

import json
import os
import signal
import sys
import time
from datetime import datetime
from pathlib import Path

from launch.progress import newest_checkpoint
from trainer.checkpoint.catalogue import step_folder
from trainer.checkpoint.manifest import COMPLETE
from trainer.exit_status import STOPPED
from trainer.health.stop_signal import STOP
from trainer.run.run_dir import RunDir
from trainer.run.writing import replace_text


def main(run: RunDir, steps: int, every: int, failing: tuple[int, int], *, always: bool) -> int:
    """Count from the newest checkpoint to `steps`; returns the exit status."""
    STOP.listen()
    STOP.heeded = True
    rank = int(os.environ["RANK"])
    log = run.log_file(rank)
    log.parent.mkdir(parents=True, exist_ok=True)
    first_time = not log.exists() or always
    # Ranks begin together, as they do where they meet in a store.
    if not _agreed(run, rank, "start", 60):
        return 1
    step = newest_checkpoint(run)
    _write(log, f"INFO counting: from step {step} on")
    while step < steps:
        # Interrupted by the signal that asks to stop, so that it is obeyed at once.
        signal.sigtimedwait([], 0.1)
        step += 1
        if (rank, step) == failing and first_time:
            _write(log, "ERROR counting: out of luck")
            return 1
        stops = STOP.requested
        # A collective would find out soon.
        if stops and not _agreed(run, rank, "stop", 2):
            return 1
        if rank == 0:
            with run.metrics_file.open("a") as file:
                file.write(json.dumps({"step": step, "loss": 1 / step, "step_ms": 100.0, "time": time.time()}) + "\n")
            if stops or step % every == 0 or step == steps:
                folder = run.checkpoints / step_folder(step)
                folder.mkdir(parents=True, exist_ok=True)
                (folder / COMPLETE).touch()
                replace_text(run.saving_file, json.dumps({"step": step, "seconds": 0.1}))
                replace_text(run.config_file, json.dumps({"name": "counting", "log_every": 1}))
        if stops:
            _write(log, f"INFO counting: stopped after step {step}")
            return STOPPED
    _write(log, "INFO counting: done")
    STOP.ignore()
    return 0


def _agreed(run: RunDir, rank: int, word: str, patience_s: float) -> bool:
    """Whether every rank says the word within that time."""
    attempt = os.environ["MASTER_PORT"]
    (run.path / f"{word}-{attempt}-{rank}").touch()
    deadline = time.monotonic() + patience_s
    while len(list(run.path.glob(f"{word}-{attempt}-*"))) < int(os.environ["WORLD_SIZE"]):
        if time.monotonic() > deadline:
            return False
        signal.sigtimedwait([], 0.05)
    return True


def _write(log: Path, words: str) -> None:
    # With milliseconds, as the trainer's logs: starts may follow one another within a second.
    now = datetime.now()
    with log.open("a") as file:
        file.write(f"{now:%Y-%m-%d %H:%M:%S},{now.microsecond // 1000:03d} {words}\n")


if __name__ == "__main__":
    folder, num_steps, *rest = sys.argv[1:]
    save_every = int(rest[0]) if rest else 10**9
    fails = (int(rest[1]), int(rest[2])) if len(rest) > 2 else (-1, -1)
    sys.exit(main(RunDir(Path(folder)), int(num_steps), save_every, fails, always=len(rest) > 3))
