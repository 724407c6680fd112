"""Jobs on this machine, in the foreground: they live as long as the process that submitted them, on its terminal."""

import json
import logging
import os
import shlex
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from torchx.schedulers.api import AppDryRunInfo, DescribeAppResponse, ListAppResponse, Scheduler
from torchx.schedulers.ids import make_unique
from torchx.specs import AppDef, AppState, CfgVal, is_terminal, macros

from launch import attempts, records, signals
from launch.node import free_port, job_status
from launch.records import JobRecord
from launch.request import Request
from launch.schedulers.protocol import JobStatus, ListedJob, options_from
from launch.workspace import ROOT
from trainer.command_line import Finding
from trainer.exit_status import FAILED, STOPPED
from trainer.health.process_table import status_of
from trainer.run.writing import write_json

logger = logging.getLogger(__name__)

_ENDED = "ended.json"
_FIRST_NODE = "TORCHX_RANK0_HOST"

MAX_PROCESSES_A_CORE = 4
"""Enough to try out jobs of several machines; with more, processes wait for each other, and memory runs out."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LocalRequest:
    """Processes to start, one a node."""

    app_id: str
    """The job's name."""
    job_dir: str
    """The folder in which the job's end is noted."""
    commands: tuple[tuple[str, ...], ...]
    """The command of each node."""
    environment: dict[str, str]
    """Variables that all processes get besides this process's environment."""

    def __str__(self) -> str:
        return "\n".join(shlex.join(command) for command in self.commands)


class Local(Scheduler[dict[str, CfgVal]]):
    """This machine; a node of a job is a process here."""

    needs_image: ClassVar[bool] = False
    has_arrays: ClassVar[bool] = False
    without_effect: ClassVar[tuple[str, ...]] = ("image", "mounts", "machine", "max_retries")

    def __init__(self, session_name: str) -> None:
        super().__init__("local_cwd", session_name)
        self._nodes: dict[str, list[subprocess.Popen[bytes]]] = {}

    def check(self, request: Request) -> dict[str, CfgVal]:
        """There are no options; the processes must have an interpreter and some room."""

        def refuse(key: str, value: str) -> dict[str, CfgVal]:
            raise ValueError(f"--option {key}={value}: scheduler local_cwd has no options")

        if shutil.which(request.interpreter) is None:
            raise ValueError(f"--python {request.interpreter} is no program on this machine: name an interpreter")
        processes, cores = request.nodes * request.procs_per_node, len(os.sched_getaffinity(0))
        if processes > MAX_PROCESSES_A_CORE * cores:
            raise ValueError(
                f"{processes} processes on this machine, which has {cores} cores: "
                f"ask for at most {MAX_PROCESSES_A_CORE * cores}, nodes times processes a node"
            )
        folder = records.folder_of(request.absolute_run_dir, "DRY-RUN")
        return {**options_from(request, parse=refuse), "job_dir": str(folder)}

    def _submit_dryrun(self, app: AppDef, cfg: dict[str, CfgVal]) -> AppDryRunInfo[LocalRequest]:
        (role,) = app.roles
        app_id = make_unique(app.name)
        commands = []
        for node in range(role.num_replicas):
            values = macros.Values(img_root="", app_id=app_id, replica_id=str(node), rank0_env=_FIRST_NODE)
            replica = values.apply(role)
            commands.append((replica.entrypoint, *replica.args))
        environment = {
            _FIRST_NODE: "localhost",
            "MASTER_PORT": str(free_port()),
            # Another interpreter may not have this checkout installed.
            "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
        }
        request = LocalRequest(
            app_id=app_id, job_dir=str(cfg["job_dir"]), commands=tuple(commands), environment=environment
        )
        return AppDryRunInfo(request, str)

    def schedule(self, dryrun_info: AppDryRunInfo[LocalRequest]) -> str:
        """Start a process a node.

        Raises:
            OSError: the interpreter cannot be started.
        """
        request: LocalRequest = dryrun_info.request
        environment = {**os.environ, **request.environment}
        Path(request.job_dir).mkdir(parents=True)
        attempts.note_first_start(Path(request.job_dir))
        # In sessions of their own: Ctrl-C reaches them by way of this process only.
        self._nodes[request.app_id] = [
            subprocess.Popen(command, env=environment, start_new_session=True) for command in request.commands
        ]
        return request.app_id

    def wait(self, app_id: str, record: JobRecord) -> int:
        """Wait for the job's end; returns its exit status.  To be called with signals held.

        What asks this process to stop asks the job to; a second Ctrl-C ends it without saving.
        """
        nodes = self._nodes[app_id]
        stops = False
        while any(node.poll() is None for node in nodes):
            received = signals.next_signal(None)
            if received not in (None, signal.SIGCHLD):
                if not stops:
                    logger.info("the job saves its state and stops; Ctrl-C again ends it at once")
                stops = True
                for node in nodes:
                    node.send_signal(received)
            elif any(node.poll() not in (None, 0, STOPPED) for node in nodes):
                # A node that failed takes the others with it, which would wait for it.
                for node in nodes:
                    node.terminate()
        codes = [node.returncode for node in nodes]
        status = FAILED if min(codes) < 0 else job_status(max(codes))
        state = {0: AppState.SUCCEEDED, STOPPED: AppState.CANCELLED}.get(status, AppState.FAILED)
        try:
            write_json(Path(record.job_dir, _ENDED), {"state": state.name, "time": time.time()})
        except OSError as error:
            logger.warning("`status` takes this job for failed: %s", error)
        return status

    def record_of(self, app_id: str) -> JobRecord | None:
        """None: nothing leads from a process to the record of another checkout."""
        return None

    def status(self, app_id: str, record: JobRecord | None) -> JobStatus | None:
        """From what the submitting process left, or from whether it still runs."""
        if record is None:
            return None
        # It may not have ended, or a full disk may have torn what it left.
        with suppress(OSError, ValueError, KeyError, TypeError):
            return JobStatus(state=AppState[json.loads(Path(record.job_dir, _ENDED).read_text())["state"]])
        if _is_submitting(record):
            return JobStatus(state=AppState.RUNNING, nodes=f"this machine, process {record.pid}")
        return JobStatus(state=AppState.FAILED, reason="the process that submitted it is gone")

    def output(self, app_id: str, record: JobRecord | None, node: int) -> Iterator[str]:
        """Refuses: a local job's output went to a terminal."""
        raise ValueError("a local job's output went to the terminal of its submit command: --rank shows a rank's log")

    def cancel_job(self, app_id: str, record: JobRecord | None) -> None:
        """Through the process that waits for it."""
        found = self.status(app_id, record)
        if record is None or found is None:
            raise ValueError(f"no local job {app_id} was submitted from this checkout")
        if not is_terminal(found.state):
            os.kill(record.pid, signal.SIGTERM)

    def jobs(self) -> Sequence[ListedJob]:
        """The jobs submitted from this checkout."""
        found = []
        for record in records.load():
            if record.handle.startswith("local_cwd://"):
                app_id = record.handle.rpartition("/")[2]
                known = self.status(app_id, record)
                assert known is not None, "it has a record"
                found.append(ListedJob(app_id=app_id, state=known.state, record=record))
        return found

    def doctor(self) -> Iterator[Finding]:
        """Nothing to ask here; `python -m trainer doctor` looks at this machine."""
        yield Finding(ok=True, text=f"{os.cpu_count()} cores; `python -m trainer doctor` looks at this machine closely")

    def describe(self, app_id: str) -> DescribeAppResponse | None:
        """TorchX's: not used, for it knows only its own process's jobs."""
        return None

    def list(self) -> list[ListAppResponse]:
        """Asked by TorchX; our own listing is `jobs`."""
        return [ListAppResponse(app_id=job.app_id, state=job.state) for job in self.jobs()]

    def _cancel_existing(self, app_id: str) -> None:
        for node in self._nodes[app_id]:
            node.terminate()


def _is_submitting(record: JobRecord) -> bool:
    """Whether the process that sent a job still runs.  Its number may have gone to another one since: in a container
    that is started again, each launcher has the same."""
    status = status_of(record.pid)
    if status is None or status.began != record.began:
        return False
    command = Path("/proc", str(record.pid), "cmdline")
    return command.is_file() and b"launch" in command.read_bytes().split(b"\0")
