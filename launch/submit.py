"""From a checked request to a job at a scheduler: what each scheduler needs besides the component.

Supported are local_cwd (this machine, in the foreground), slurm, kubernetes (Volcano) and local_docker.
"""

import importlib.util
import json
import logging
import os
import sys
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from docker.errors import DockerException
from torchx.runner import Runner
from torchx.runner.config import apply as apply_config_file
from torchx.schedulers import get_scheduler_factories
from torchx.specs import AppDef, CfgVal
from torchx.specs.api import AppDryRunInfo, InvalidRunConfigException
from urllib3.exceptions import HTTPError

from launch import components, local, records, slurm
from launch.resources import Machine, machine_named
from launch.workspace import ROOT, check_workspace

logger = logging.getLogger(__name__)

SESSION = "longview"

SCHEDULERS = ("local_cwd", "slurm", "kubernetes", "local_docker")
IN_CONTAINERS = ("kubernetes", "local_docker")


@dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """A job as asked for on the command line; the recipe and its overrides are already checked."""

    recipe: str
    """Name of the recipe."""
    scheduler: str
    """One of SCHEDULERS."""
    nodes: int
    """Machines."""
    procs_per_node: int
    """Processes a machine."""
    run_dir: Path | None = None
    """Run directory; None: runs/RECIPE, except in containers, where it must be given."""
    overrides: tuple[str, ...] = ()
    """`key=value` overrides of the recipe."""
    plan: Path | None = None
    """A sharding plan's file, as the workers see it."""
    machine: str | None = None
    """A machine type's name; None: one core a process, no GPU, the scheduler's default memory."""
    python: str | None = None
    """The workers' interpreter; None: this one, or `python` in containers."""
    image: str | None = None
    """Container image; required in containers, has no meaning elsewhere."""
    mounts: tuple[str, ...] = ()
    """SRC:DST mounts of containers."""
    max_retries: int = 0
    """Starts after a failure; each resumes the run."""
    options: tuple[str, ...] = ()
    """`KEY=VALUE` options of the scheduler, over those of .torchxconfig."""

    def __post_init__(self) -> None:
        if self.scheduler not in SCHEDULERS:
            raise ValueError(f"unknown scheduler {self.scheduler!r}: known are {', '.join(SCHEDULERS)}")
        in_container = self.scheduler in IN_CONTAINERS
        if in_container and not (self.image and self.run_dir):
            raise ValueError(f"scheduler {self.scheduler} needs --image and --run-dir, a path inside the container")
        if not in_container and (self.image or self.mounts):
            raise ValueError(f"--image and --mount have no effect with scheduler {self.scheduler}: leave them out")
        if self.scheduler == "local_cwd" and (self.machine or self.max_retries):
            raise ValueError("--machine and --max-retries have no effect with scheduler local_cwd: leave them out")

    def absolute_run_dir(self) -> Path:
        """The run directory as every worker sees it."""
        return Path.cwd() / (self.run_dir or Path("runs", self.recipe))

    def app(self) -> AppDef:
        """The job's description.

        Raises:
            ValueError: the machine is unknown or too small, a mount is malformed, or the plan cannot be for this job.
        """
        return components.train(
            self.recipe,
            run_dir=self.absolute_run_dir(),
            nodes=self.nodes,
            procs_per_node=self.procs_per_node,
            machine=self._machine(),
            python=self.python or ("python" if self.scheduler in IN_CONTAINERS else sys.executable),
            overrides=self.overrides,
            plan=self._plan(),
            image=self.image or "",
            mounts=self.mounts,
            max_retries=self.max_retries,
        )

    def _plan(self) -> Path | None:
        """The plan's path as every worker sees it; the workers check the plan against the tables, which takes torch."""
        if self.plan is None:
            return None
        if self.scheduler not in IN_CONTAINERS:
            try:
                ranks = json.loads(self.plan.read_text())["machine"]["world_size"]
            except (OSError, ValueError, KeyError, TypeError) as error:
                raise ValueError(
                    f"--plan {self.plan} is not a plan ({error}): write it with `trainer plan --out`"
                ) from None
            size = self.nodes * self.procs_per_node
            if ranks != size:
                raise ValueError(
                    f"--plan {self.plan} is for {ranks} processes, this job has {size}: "
                    f"plan again with --world-size {size}"
                )
        return Path.cwd() / self.plan

    def _machine(self) -> Machine:
        if self.machine:
            return machine_named(self.machine, procs_per_node=self.procs_per_node)
        if self.scheduler != "local_cwd":
            logger.info("no --machine: asking for %d cores and no GPU a node", self.procs_per_node)
        return Machine(name="unnamed", cpus=self.procs_per_node, memory_mib=0, gpus=0)


@contextmanager
def runner(scheduler: str) -> Iterator[Runner]:
    """TorchX's runner with our local scheduler and Slurm in the place of its own, to be used with `scheduler`.

    Raises:
        ConnectionError: the scheduler's service does not answer or its client is not installed.
    """
    if scheduler == "kubernetes" and importlib.util.find_spec("kubernetes") is None:
        raise ConnectionError("scheduler kubernetes needs its client: pip install kubernetes==25.3.0")
    factories = {name: factory for name, factory in get_scheduler_factories().items() if name in SCHEDULERS}
    ours = {"local_cwd": local.create_scheduler, "slurm": slurm.create_scheduler}
    with Runner(SESSION, factories | ours) as torchx:
        try:
            yield torchx
        except DockerException as error:
            use = " (it adds the code to the job's image)" if scheduler == "kubernetes" else ""
            raise ConnectionError(f"Docker does not answer: {' '.join(str(error).split())}{use}") from None
        except _service_errors(scheduler) as error:
            raise ConnectionError(f"{scheduler} does not answer: {' '.join(str(error).split())}") from None


def _service_errors(scheduler: str) -> tuple[type[Exception], ...]:
    """What the scheduler's client raises when the service is not there or says no."""
    if scheduler != "kubernetes":
        return ()
    # An optional package: imported only where it is used.
    from kubernetes.client import ApiException
    from kubernetes.config import ConfigException

    return (ApiException, ConfigException, HTTPError)


def dry_run(torchx: Runner, request: Request, app: AppDef) -> AppDryRunInfo:
    """The scheduler's request for the job `app`, built but not sent; nothing is written or copied."""
    options = _options(torchx, request, _job_dir(request, name="DRY-RUN"))
    return torchx.dryrun(app, request.scheduler, cfg=options)


def submit(torchx: Runner, request: Request, app: AppDef) -> str:
    """Send the job `app`; returns its handle."""
    job_dir = _job_dir(request, name=f"{time.strftime('%Y%m%d-%H%M%S')}-{uuid.uuid4().hex[:4]}")
    options = _options(torchx, request, job_dir)
    workspace = None
    if request.scheduler != "local_cwd":
        logger.info("copying the code with the job: %.1f MiB", check_workspace(ROOT))
        workspace = f"file://{ROOT}"
    if request.scheduler not in IN_CONTAINERS:
        job_dir.parent.mkdir(parents=True, exist_ok=True)
    started = time.time()
    info = torchx.dryrun(app, request.scheduler, cfg=options, workspace=workspace)
    if request.scheduler == "local_cwd":
        local.show_on_terminal(info)
        job_dir = Path(info.request.log_dir)
    handle: str = torchx.schedule(info)
    record = records.JobRecord(
        handle=handle,
        recipe=request.recipe,
        run_dir=str(request.absolute_run_dir()),
        job_dir=str(job_dir),
        pid=os.getpid(),
        time=started,
    )
    records.save(record)
    return handle


def check_options(torchx: Runner, request: Request) -> None:
    """Check the request's scheduler options.

    Raises:
        ValueError: an option that the scheduler does not have, a malformed one, or one that is missing.
    """
    options = _options(torchx, request, Path())
    try:
        torchx.scheduler_run_opts(request.scheduler).resolve(options)
    except InvalidRunConfigException as error:
        raise ValueError(f"{request.scheduler}: {' '.join(str(error).split())} (give it with --option)") from None


def _job_dir(request: Request, *, name: str) -> Path:
    """Where the scheduler's output goes and, on Slurm, the copy of the code: a new folder in the run directory."""
    return request.absolute_run_dir() / "jobs" / name


def _options(torchx: Runner, request: Request, job_dir: Path) -> dict[str, CfgVal]:
    """Ours, the command line's, then .torchxconfig's: of the caller's folder before that of the checkout."""
    known = torchx.scheduler_run_opts(request.scheduler)
    ours = {"slurm": "job_dir", "local_cwd": "log_dir"}.get(request.scheduler)
    options: dict[str, CfgVal] = {ours: str(job_dir)} if ours else {}
    for option in request.options:
        key, equals, _ = option.partition("=")
        if not equals or known.get(key) is None or key == ours:
            names = ", ".join(sorted(name for name, _ in known if name != ours))
            raise ValueError(f"--option {option!r} is not KEY=VALUE with a key of {request.scheduler}: {names}")
        options |= known.cfg_from_str(option)
    folders = dict.fromkeys([str(Path.cwd()), str(ROOT)])
    apply_config_file(request.scheduler, options, dirs=list(folders))
    return options
