"""Jobs on this machine: run to the end in the foreground, and what a later process can still learn about them.

TorchX's local scheduler keeps its jobs in the memory of the process that started them, and they end with it.
"""

import json
import os
import re
import signal
import time
from pathlib import Path
from typing import Any

from torchx.runner import Runner
from torchx.schedulers.local_scheduler import CWDImageProvider, LocalScheduler, SignalException
from torchx.specs import AppState, is_terminal
from torchx.specs.api import AppDryRunInfo

from launch.components import ROLE
from launch.records import JobRecord

_FAULT = re.compile(r"^Traceback |^\S+ \S+ (ERROR|CRITICAL) |^error: ", flags=re.MULTILINE)


GRACE_S = 45.0
"""How long an interrupted job may take to save its state: a little longer than torchrun waits for its processes."""


class PatientLocal(LocalScheduler):
    """TorchX's local scheduler, which kills torchrun 10 s after an interrupt and so leaves its processes behind."""

    def _cancel_existing(self, app_id: str) -> None:
        replicas = [replica for role in self._apps[app_id].role_replicas.values() for replica in role]
        for replica in replicas:
            replica.terminate()
        deadline = time.monotonic() + GRACE_S
        while any(replica.is_alive() for replica in replicas) and time.monotonic() < deadline:
            time.sleep(0.1)
        super()._cancel_existing(app_id)


def create_scheduler(session_name: str, **_: Any) -> PatientLocal:
    """TorchX's factory."""
    return PatientLocal(session_name, CWDImageProvider)


def show_on_terminal(info: AppDryRunInfo) -> None:
    """Let the nodes' output go to this terminal unread, so that the progress bar stays a progress bar."""
    for replica in info.request.role_params[ROLE]:
        replica.stdout = replica.stderr = replica.combined = None


def wait(runner: Runner, handle: str) -> AppState:
    """Wait for the job's end; an interrupt or a SIGTERM ends the job first, and counts as cancelled."""
    try:
        status = runner.wait(handle, wait_interval=0.5)
    except (KeyboardInterrupt, SignalException):
        runner.cancel(handle)
        return AppState.CANCELLED
    assert status is not None, "the job was started by this runner"
    return status.state


def failing_log(run_dir: Path, *, since: float) -> Path | None:
    """Log of the rank that reported a fault first since `since` (Unix seconds); None if none got as far as a log."""
    faulty = [
        (log.stat().st_mtime, log)
        for log in (run_dir / "logs").glob("rank-*.log")
        if log.stat().st_mtime >= since and _FAULT.search(log.read_text(errors="replace"))
    ]
    return min(faulty)[1] if faulty else None


def state(record: JobRecord) -> AppState:
    """State of a local job that another process started."""
    # TorchX writes this file, whatever the outcome, when the job has ended and its outputs are closed.
    final = Path(record.job_dir, "SUCCESS")
    if final.is_file():
        ended: AppState = AppState[json.loads(final.read_text())["final_state"]]
        # TorchX notes the state of a cancelled job before it cancels it.
        return ended if is_terminal(ended) else AppState.CANCELLED
    return AppState.RUNNING if _is_submitting(record.pid) else AppState.FAILED


def cancel(record: JobRecord) -> None:
    """End a local job through the process that waits for it."""
    if not is_terminal(state(record)):
        os.kill(record.pid, signal.SIGTERM)


def _is_submitting(pid: int) -> bool:
    """Whether the process exists and is a launcher; the number may have gone to another process since."""
    command = Path("/proc", str(pid), "cmdline")
    return command.is_file() and b"launch" in command.read_bytes()
