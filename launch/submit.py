"""From a checked request to a job at a scheduler."""

import fcntl
import json
import logging
import os
import shutil
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torchx.runner import Runner
from torchx.specs import AppDef, CfgVal, is_terminal
from torchx.specs.api import AppDryRunInfo

from launch import component, records, signals
from launch.request import Request, check_effect
from launch.schedulers.known import SCHEDULERS
from launch.schedulers.protocol import Foreground, Scheduler
from launch.workspace import ROOT, check_workspace, share_with_older
from trainer.command_line import WrongUse, parse_window
from trainer.health.process_table import status_of
from trainer.run.run_dir import RunDir
from trainer.run.writing import written

logger = logging.getLogger(__name__)

SESSION = "longview"


@dataclass(frozen=True, slots=True)
class Connection:
    """A scheduler and TorchX's runner that sends to it."""

    scheduler: Scheduler
    """The scheduler."""
    runner: Runner
    """TorchX's, which knows no other."""

    def dry_run(self, request: Request, options: dict[str, CfgVal]) -> AppDryRunInfo[Any]:
        """The scheduler's request for the job, built but not sent; nothing is written or copied.

        Raises:
            ValueError: the job cannot be described.
        """
        return self.runner.dryrun(component.job(request), request.scheduler, cfg=options)

    def dry_run_of_sweep(
        self, requests: Sequence[Request], base: Request, options: dict[str, CfgVal]
    ) -> AppDryRunInfo[Any]:
        """As `dry_run`, of many runs; for a scheduler without job arrays, the first of them."""
        if not self.scheduler.has_arrays:
            return self.dry_run(requests[0], options)
        options = options | {"job_dir": str(records.folder_of(base.absolute_run_dir, "DRY-RUN"))}
        return self.runner.dryrun(component.sweep(requests, base.job_name), base.scheduler, cfg=options)

    def submit(self, request: Request, options: dict[str, CfgVal]) -> records.JobRecord:
        """Send the job, with a copy of the code where it does not run in this checkout."""
        (record,) = self._send([request], component.job(request), request, options)
        return record

    def sweep(self, requests: Sequence[Request], base: Request, options: dict[str, CfgVal]) -> list[records.JobRecord]:
        """Send many runs at once, with one copy of the code in the directory of all, `base`'s."""
        return self._send(requests, component.sweep(requests, base.job_name), base, options)

    def _send(
        self, requests: Sequence[Request], app: AppDef, base: Request, options: dict[str, CfgVal]
    ) -> list[records.JobRecord]:
        name = f"{time.strftime('%Y%m%d-%H%M%S')}-{uuid.uuid4().hex[:4]}"
        code_dir = None if self.scheduler.needs_image else records.folder_of(base.absolute_run_dir, name)
        if code_dir is not None:
            RunDir(base.absolute_run_dir).make()
        workspace = None
        if not isinstance(self.scheduler, Foreground):
            logger.info("copying the code with the job: %.1f MiB", check_workspace(ROOT))
            workspace = f"file://{ROOT}"
        if code_dir is not None:
            code_dir.parent.mkdir(parents=True, exist_ok=True)
            options = options | {"job_dir": str(code_dir)}
        try:
            built = self.runner.dryrun(app, base.scheduler, cfg=options, workspace=workspace)
            if code_dir is not None and workspace is not None:
                share_with_older(code_dir)
        except BaseException:
            # Ctrl-C too leaves no half of a copy.
            if code_dir is not None:
                shutil.rmtree(code_dir, ignore_errors=True)
            raise
        # A job that was sent is noted, whatever comes between the two; images are pushed first, for minutes.
        with nullcontext() if code_dir is None else signals.held():
            started, this_process = time.time(), status_of(os.getpid())
            handle: str = self.runner.schedule(built)
            sent = []
            for number, request in enumerate(requests):
                record = records.JobRecord(
                    handle=handle if len(requests) == 1 else f"{handle}_{number}",
                    recipe=request.recipe,
                    run_dir=str(request.absolute_run_dir),
                    job_dir="" if code_dir is None else str(records.folder_of(request.absolute_run_dir, name)),
                    pid=os.getpid(),
                    time=started,
                    began=None if this_process is None else this_process.began,
                )
                records.save(record)
                sent.append(record)
            return sent


@contextmanager
def connected(scheduler: str) -> Iterator[Connection]:
    """The scheduler of that name, for the duration of the block.

    Raises:
        ValueError: there is none.
    """
    if scheduler not in SCHEDULERS:
        raise ValueError(f"unknown scheduler {scheduler!r}: known are {', '.join(SCHEDULERS)}")
    ours = SCHEDULERS[scheduler](SESSION)
    with Runner(SESSION, {scheduler: lambda session_name, **_: ours}) as runner:
        yield Connection(ours, runner)


def check(scheduler: Scheduler, request: Request) -> dict[str, CfgVal]:
    """The request's options in TorchX's form, after checking the request as far as this machine can.

    Raises:
        ValueError: a field has no effect with this scheduler, an option, a mount or the window of steps to profile is
            malformed, the machine is unknown or too small, or the plan cannot be for this job.
    """
    check_effect(request, scheduler.without_effect)
    if request.profile is not None:
        parse_window(request.profile)
    _check_plan(request)
    component.job(request)
    return scheduler.check(request)


@contextmanager
def no_other_job(scheduler: Scheduler, requests: Sequence[Request], folder: Path) -> Iterator[None]:
    """A block that sends jobs of `requests`, whose code and output go below `folder`.  What else would send one there
    waits until it ends, and then sees the job.

    Raises:
        WrongUse: a job waits or runs in one of the run directories already, or the folder cannot be written.
    """
    with ExitStack() as stack:
        if not scheduler.needs_image:
            RunDir(folder).make()
            lock = records.folder_of(folder, "lock")
            with written(lock):
                lock.parent.mkdir(exist_ok=True)
                file = stack.enter_context(lock.open("a"))
            # Where the file system has no locks, the second job ends with a line when it starts.
            with suppress(OSError):
                fcntl.flock(file, fcntl.LOCK_EX)
        for request in requests:
            check_no_other(scheduler, request)
        yield


def check_no_other(scheduler: Scheduler, request: Request) -> None:
    """Make sure that no job waits or runs in the run directory already: the second would fail as soon as it runs.

    Raises:
        WrongUse: one does, and this one does not wait for its end.
    """
    ours = [job for job in records.of_run(request.absolute_run_dir) if job.handle.startswith(f"{request.scheduler}://")]
    if not ours or any(option.startswith("dependency=") for option in request.options):
        return
    # When the newest job was sent, the same was asked of those before it.
    app_id = ours[-1].handle.rpartition("/")[2]
    found = scheduler.status(app_id, ours[-1])
    if found is not None and not is_terminal(found.state):
        wait = (
            f", or wait for its end with --option dependency=afterany:{app_id.rpartition(':')[2]}"
            if scheduler.has_arrays
            else ""
        )
        raise WrongUse(
            f"job {ours[-1].handle} in --run-dir {request.absolute_run_dir} is {found.state.name}: cancel it{wait}"
        )


def _check_plan(request: Request) -> None:
    """The workers check the plan against the tables, which takes torch."""
    # In a container the path means another file, which is not checked here.
    if request.plan is None or request.image is not None:
        return
    try:
        ranks = json.loads(request.plan.read_text())["machine"]["world_size"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"--plan {request.plan} is not a plan ({error}): write it with `trainer plan --out`") from None
    size = request.nodes * request.procs_per_node
    if ranks != size:
        raise ValueError(
            f"--plan {request.plan} is for {ranks} processes, this job has {size}: plan again with --world-size {size}"
        )
