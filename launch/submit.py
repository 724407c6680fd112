"""From a checked request to a job at a scheduler."""

import json
import logging
import os
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import MISSING, dataclass, fields
from typing import Any

from torchx.runner import Runner
from torchx.specs import CfgVal
from torchx.specs.api import AppDryRunInfo

from launch import component, records
from launch.request import Request
from launch.schedulers.known import SCHEDULERS
from launch.schedulers.protocol import Scheduler
from launch.workspace import ROOT, check_workspace

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
        return self.runner.dryrun(component.train(request), request.scheduler, cfg=options)

    def submit(self, request: Request, options: dict[str, CfgVal]) -> records.JobRecord:
        """Send the job, with a copy of the code where it does not run in this checkout."""
        name = f"{time.strftime('%Y%m%d-%H%M%S')}-{uuid.uuid4().hex[:4]}"
        job_dir = self.scheduler.job_dir(request, name)
        workspace = None
        if request.scheduler != "local_cwd":
            logger.info("copying the code with the job: %.1f MiB", check_workspace(ROOT))
            workspace = f"file://{ROOT}"
        if job_dir is not None:
            job_dir.parent.mkdir(parents=True, exist_ok=True)
            options = options | {"job_dir": str(job_dir)}
        started = time.time()
        info = self.runner.dryrun(component.train(request), request.scheduler, cfg=options, workspace=workspace)
        handle: str = self.runner.schedule(info)
        if job_dir is not None:
            job_dir.mkdir(exist_ok=True)
        record = records.JobRecord(
            handle=handle,
            recipe=request.recipe,
            run_dir=str(request.absolute_run_dir),
            job_dir=str(job_dir or ""),
            pid=os.getpid(),
            time=started,
        )
        records.save(record)
        return record


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
        ValueError: a field has no effect with this scheduler, an option or a mount is malformed, the machine is unknown
            or too small, or the plan cannot be for this job.
    """
    for entry in fields(request):
        default = entry.default if entry.default_factory is MISSING else entry.default_factory()
        if entry.name in scheduler.without_effect and getattr(request, entry.name) != default:
            option = "--" + {"mounts": "mount"}.get(entry.name, entry.name).replace("_", "-")
            raise ValueError(f"{option} has no effect with scheduler {request.scheduler}: leave it out")
    _check_plan(request, in_container=scheduler.needs_image)
    component.train(request)
    return scheduler.check(request)


def _check_plan(request: Request, *, in_container: bool) -> None:
    """The workers check the plan against the tables, which takes torch."""
    # In a container it is another file.
    if request.plan is None or in_container:
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
