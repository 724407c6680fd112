"""Slurm: one job of N whole nodes, one task per node, which continues by itself until the run is done.

TorchX's own request for Slurm is a heterogeneous job with a part a node, which current Slurm refuses for GPU machines
and which is N entries in the queue.  Ours is what a Slurm user would write by hand; what happens within an allocation,
and at its end, is in `launch.allocation`.
"""

import logging
import re
import shutil
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import ClassVar

from torchx.schedulers.api import AppDryRunInfo, DescribeAppResponse, ListAppResponse, Scheduler
from torchx.specs import AppDef, AppState, BindMount, CfgVal, Role, VolumeMount, macros, runopts
from torchx.workspace.dir_workspace import DirWorkspaceMixin

from launch import records
from launch.component import mounts_of
from launch.records import JobRecord
from launch.request import Request
from launch.schedulers import slurm_queue
from launch.schedulers.protocol import JobStatus, ListedJob, options_from
from launch.schedulers.slurm_doctor import look_at_cluster
from launch.schedulers.slurm_queue import SlurmJob
from launch.schedulers.slurm_reasons import why_it_waits
from launch.schedulers.slurm_script import SCRIPT, SlurmRequest, option
from trainer.command_line import Finding, WrongUse

logger = logging.getLogger(__name__)

OURS = {
    "array": "sweep, of which array=%4 starts at most 4 runs at a time",
    "chdir": "--run-dir",
    "container-image": "--image",
    "container-mounts": "--mount",
    "container-workdir": "the job's folder",
    "error": "the job's folder",
    "job-name": "the recipe and the run",
    "nodes": "--nodes",
    "ntasks": "--nodes",
    "ntasks-per-node": "--nodes: one task a node, which starts --procs-per-node processes",
    "open-mode": "append",
    "output": "the job's folder",
    "parsable": "submit",
    "test-only": "--dry-run",
    "wait": "status and logs --follow",
    "wrap": "the recipe",
}
"""Options of sbatch that a job sets itself, and what from; all others may be given."""

BATCH_OUTPUT = "job.out"
"""What the job's batch script says, in the job's folder."""

ARRAY_OUTPUT = "job-{}.out"
"""What the batch script of a job array's member says, in the folder of the array's code."""

NODE_OUTPUT = "node-{}.out"
"""What a node's processes say, in the job's folder."""

_OF_GPUS = ("gpus", "gres", "tres")
"""How options of sbatch begin that may ask for GPUs."""
_PATTERN = "%\\"
_NO_OUTPUT = "0:53"
"""Slurm's exit code of a job whose output file it could not make."""


class Slurm(DirWorkspaceMixin, Scheduler[dict[str, CfgVal]]):
    """Slurm of any version from 22.05 on, with or without accounting."""

    needs_image: ClassVar[bool] = False
    has_arrays: ClassVar[bool] = True
    without_effect: ClassVar[tuple[str, ...]] = ()

    def __init__(self, session_name: str) -> None:
        super().__init__("slurm", session_name)

    def _run_opts(self) -> runopts:
        known = runopts()
        known.add("job_dir", type_=str, required=True, help="Where the code is copied to and the output goes.")
        return known

    def check(self, request: Request) -> dict[str, CfgVal]:
        """The request's options: any of sbatch but those that the job sets itself."""
        if set(_PATTERN) & set(str(request.absolute_run_dir)):
            raise ValueError(
                f"--run-dir {request.absolute_run_dir}: Slurm reads % and \\ in the names of files as patterns: "
                "choose a folder without them"
            )
        options = options_from(request, parse=_sbatch_option)
        _check_image(request, options)
        options["job_dir"] = str(records.folder_of(request.absolute_run_dir, "DRY-RUN"))
        return options

    def _submit_dryrun(self, app: AppDef, cfg: dict[str, CfgVal]) -> AppDryRunInfo[SlurmRequest]:
        role, job_dir = app.roles[0], str(cfg["job_dir"])
        given = {key: str(value) for key, value in cfg.items() if key != "job_dir" and not _of_steps(key)}
        of_steps = [option(key, str(value)) for key, value in cfg.items() if _of_steps(key)]
        steps = [*_container(role, Path(job_dir)), *of_steps]
        options = _options_of(app.name, role, given) | given
        named = role.resource.memMB > 0
        if not named and not any("gpu" in f"{key}={options[key]}" for key in options if key.startswith(_OF_GPUS)):
            # Where devices are not confined it would find those of others.
            words = "the job asks for %s cores a node and no GPU: where nodes have GPUs, name their type with --machine"
            logger.warning(words, options.get("cpus-per-task", "Slurm's usual"))
        options |= {"chdir": job_dir, "output": BATCH_OUTPUT, "open-mode": "append"}
        job_dirs, at_once = [job_dir], given.get("array", "")
        if at_once and len(app.roles) == 1:
            raise WrongUse(f"--option array={at_once} is for a sweep's many runs: leave it out")
        if len(app.roles) > 1:
            options |= {"array": f"0-{len(app.roles) - 1}{at_once}", "output": ARRAY_OUTPUT.format("%a")}
            job_dirs = [
                str(records.folder_of(Path(member.metadata["run_dir"]), Path(job_dir).name)) for member in app.roles
            ]
        request = SlurmRequest(
            job_dir=job_dir,
            options=options,
            # TorchX's name of the job is not known before it has a number.
            environment={key: value for key, value in role.env.items() if key != "TORCHX_JOB_ID"},
            commands=tuple(
                _command(member, folder, options.get("cpus-per-task", "0"), steps)
                for member, folder in zip(app.roles, job_dirs, strict=True)
            ),
            job_dirs=tuple(job_dirs),
            packages=("torchx", "typer") if role.metadata["image"] else (),
        )
        return AppDryRunInfo(request, str)

    def schedule(self, dryrun_info: AppDryRunInfo[SlurmRequest]) -> str:
        """Submit, and return the job's number; a job that Slurm refuses leaves nothing behind.

        Raises:
            SlurmError: it refuses.
        """
        request = dryrun_info.request
        script = Path(request.job_dir, SCRIPT)
        try:
            script.write_text(request.script())
            for number, folder in enumerate(request.job_dirs if len(request.job_dirs) > 1 else ()):
                Path(folder).mkdir(parents=True)
                Path(folder, BATCH_OUTPUT).symlink_to(Path(request.job_dir, ARRAY_OUTPUT.format(number)))
            return slurm_queue.submit(request.submission(), lambda job: job.work_dir == request.job_dir)
        except Exception:
            # The job's folder holds the copy of the code too.
            for folder in (request.job_dir, *request.job_dirs):
                shutil.rmtree(folder, ignore_errors=True)
            raise

    def status(self, app_id: str, record: JobRecord | None) -> JobStatus | None:
        """From Slurm, and from the job's own output where Slurm has forgotten it."""
        job = _find(app_id, record)
        if job is None:
            return _ended(app_id, record)
        reason = _explained(job, record)
        if job.state == AppState.RUNNING and job.nodes:
            # Slurm counts the job as running until it, or the run, gives such a node up.
            lost = slurm_queue.lost_nodes(job.nodes, cluster=app_id.rpartition(":")[0]).items()
            reason = "; ".join([*filter(None, [reason]), *(f"node {node} is {state}" for node, state in lost)])
        return JobStatus(state=job.state, reason=reason, nodes=job.nodes, time_left=_time_left(job))

    def output(self, app_id: str, record: JobRecord | None, node: int) -> Iterator[str]:
        """From the job's folder, which the run directory holds."""
        job = record or self.record_of(app_id)
        if job is None:
            raise ValueError(
                f"job {app_id} is unknown to Slurm and to this checkout: where its output lies is not known"
            )
        path = Path(job.job_dir, NODE_OUTPUT.format(node))
        if not path.is_file():
            raise ValueError(f"{path} does not exist: the job has not started there, or has no such node")
        yield from path.read_text(errors="replace").splitlines(keepends=True)

    def cancel_job(self, app_id: str, record: JobRecord | None) -> None:
        """SIGTERM to every process; Slurm kills what still runs after KillWait."""
        if record is not None and _find(app_id, record) is None:
            raise ValueError(f"slurm no longer knows job {app_id}: it has ended")
        slurm_queue.cancel(app_id)

    def jobs(self) -> Sequence[ListedJob]:
        """The jobs whose folder holds a record of ours, whoever submitted them."""
        found = []
        for job in slurm_queue.all_jobs():
            record = records.find_in(Path(job.work_dir)) if job.work_dir else None
            if record is not None:
                found.append(ListedJob(app_id=job.job_id, state=job.state, record=record))
        return found

    def doctor(self) -> Iterator[Finding]:
        """Partitions, limits, GPUs, accounting."""
        return look_at_cluster()

    def record_of(self, app_id: str) -> JobRecord | None:
        """From the job's folder, as Slurm knows it."""
        job = slurm_queue.find_job(app_id)
        return records.find_in(Path(job.work_dir)) if job and job.work_dir else None

    def describe(self, app_id: str) -> DescribeAppResponse | None:
        """TorchX's: the state alone."""
        found = self.status(app_id, None)
        return None if found is None else DescribeAppResponse(app_id=app_id, state=found.state, msg=found.reason)

    def list(self) -> list[ListAppResponse]:
        """Asked by TorchX; our own listing is `jobs`."""
        return [ListAppResponse(app_id=job.app_id, state=job.state) for job in self.jobs()]

    def _cancel_existing(self, app_id: str) -> None:
        self.cancel_job(app_id, None)


def _find(app_id: str, record: JobRecord | None) -> SlurmJob | None:
    """What Slurm knows of our job.  A cluster that was set up anew gives the same numbers to others."""
    job = slurm_queue.find_job(app_id)
    if job is None or record is None or not job.work_dir:
        return job
    return job if Path(job.work_dir).name == Path(record.job_dir).name else None


_INSTEAD = {
    "gpus-per-node": ("gres", "gpus", "gpus-per-task"),
    "mem": ("mem-per-cpu", "mem-per-gpu"),
    "cpus-per-task": ("cpus-per-gpu",),
    "requeue": ("no-requeue",),
    "exclusive": ("oversubscribe",),
}
"""An option of ours -> options of a site that take its place."""


def _options_of(name: str, role: Role, given: Mapping[str, str]) -> dict[str, str]:
    """What a job asks for by itself."""
    resource = role.resource
    options = {"job-name": name, "nodes": str(role.num_replicas), "ntasks-per-node": "1"}
    if resource.memMB > 0:
        # A named machine type: the whole machine.
        options |= {"exclusive": "", "mem": str(resource.memMB)}
    if resource.gpu > 0:
        options["gpus-per-node"] = str(resource.gpu)
    options |= {"cpus-per-task": str(resource.cpu), "requeue": ""}
    # What a site wants said otherwise takes the place of what we would say.
    for ours, others in _INSTEAD.items():
        if any(other in given for other in others):
            options.pop(ours, None)
    return options


def _command(role: Role, job_dir: str, cpus_per_task: str, step_options: Sequence[str]) -> tuple[str, ...]:
    """What happens within an allocation, and what of it on every node, by srun with `step_options`."""
    # One command for all nodes: each reads its number, and `launch.allocation` says who the first one is.
    values = macros.Values(img_root="", app_id="SLURM_JOB_ID", replica_id="SLURM_NODEID", rank0_env="TORCHX_RANK0_HOST")
    node, about = values.apply(role), role.metadata
    own = ["-m", "launch.allocation", "--run-dir", about["run_dir"], "--job-dir", job_dir]
    own += ["--max-retries", str(role.max_retries), "--max-restarts", str(about["max_restarts"])]
    own += ["--nodes", str(role.num_replicas), "--procs-per-node", str(about["procs_per_node"])]
    own += ["--cpus-per-task", cpus_per_task, *(word for path in about["data"] for word in ("--data", path))]
    own += [f"--step-option={option}" for option in step_options]
    # Slurm's commands are outside of an image, and so is what talks to them.
    outside = sys.executable if about["image"] else node.entrypoint
    return (outside, *own, "--", node.entrypoint, *node.args)


def _of_steps(key: str) -> bool:
    """Whether an option is about the container, in which only what runs on the nodes is."""
    return key.removeprefix("no-").startswith("container-")


def _check_image(request: Request, options: Mapping[str, CfgVal]) -> None:
    """What srun is told of a container, by options of pyxis, must be sayable in them.

    Raises:
        ValueError: it is not, or there is no image.
    """
    without = [f"--option {key}" for key in options if _of_steps(key)] + ["--mount"] * bool(request.mounts)
    if request.image is None and without:
        raise ValueError(f"{without[0]} has no effect with scheduler slurm without --image: leave it out")
    for mount in mounts_of(request):
        if isinstance(mount, VolumeMount):
            raise ValueError(
                f"--mount {mount.src}:{mount.dst_path}: on slurm give SRC as an absolute path of the nodes"
            )
    if request.image is not None and re.search(r"[,:\s]", str(request.absolute_run_dir)):
        raise ValueError(
            f"--run-dir {request.absolute_run_dir} cannot be mounted in a container: choose one without commas, colons "
            "and blanks"
        )


def _container(role: Role, job_dir: Path) -> list[str]:
    """Options of srun with which nodes run in the image, by pyxis: the run directory has its own path there, too."""
    if not role.metadata["image"]:
        return []
    run_dir = job_dir.parents[1]
    mounts = [f"{run_dir}:{run_dir}"]
    for mount in role.mounts:
        assert isinstance(mount, BindMount), "checked"
        mounts.append(f"{mount.src_path}:{mount.dst_path}{':ro' * mount.read_only}")
    return [f"--container-image={role.metadata['image']}", f"--container-mounts={','.join(mounts)}"]


def _sbatch_option(key: str, value: str) -> dict[str, CfgVal]:
    key = key.lstrip("-").replace("_", "-")
    if key in OURS and not (key == "array" and re.fullmatch(r"%\d+", value)):
        raise ValueError(f"--option {key}={value}: the job sets sbatch's --{key} itself (from {OURS[key]})")
    if key == "container":
        raise ValueError(
            f"--option {key}={value}: the batch script would run in the container, where Slurm's commands are not; "
            "name an image for pyxis with --image, or a script with --python that enters it (docs/launch.md)"
        )
    if not re.fullmatch(r"[a-z][a-z0-9-]+", key):
        raise ValueError(f"--option {key}={value}: give the long name of an option of sbatch, such as partition=main")
    if "\n" in value:
        raise ValueError(f"--option {key}: its value must be one line")
    return {key: value}


def _explained(job: SlurmJob, record: JobRecord | None) -> str:
    """Why it waits or how it ended."""
    if job.state == AppState.PENDING:
        return why_it_waits(job.reason) if job.reason or job.slurm_state == "PENDING" else job.slurm_state
    if job.state in (AppState.FAILED, AppState.CANCELLED):
        words = [job.slurm_state, f"reason {job.reason}" if job.reason else "", f"exit code {job.exit_code}"]
        _, why = _last_words(record)
        if job.exit_code == _NO_OUTPUT:
            why = f"its first node cannot write in {job.work_dir}: keep --run-dir on a file system that all nodes share"
        return ", ".join(word for word in words if word) + (f": {why}" if why else "")
    return job.reason


def _time_left(job: SlurmJob) -> str:
    if job.state != AppState.RUNNING or job.end_time is None:
        return ""
    seconds = max(0, int(job.end_time - time.time()))
    clock = f"{seconds // 3600 % 24}:{seconds // 60 % 60:02}:{seconds % 60:02}"
    return f"{seconds // 86400} days {clock}" if seconds >= 86400 else clock


def _ended(app_id: str, record: JobRecord | None) -> JobStatus | None:
    """The end of a job that Slurm has forgotten, as it told it itself."""
    status, why = _last_words(record)
    if record is None or not status:
        return None
    logger.info("slurm no longer knows job %s: its state is read from %s", app_id, Path(record.job_dir, BATCH_OUTPUT))
    return JobStatus(state=AppState.SUCCEEDED if status == "0" else AppState.FAILED, reason=why)


def _last_words(record: JobRecord | None) -> tuple[str, str]:
    """(exit status, why) from the last words of a job's batch script; empty where there are none."""
    output = Path(record.job_dir, BATCH_OUTPUT) if record else None
    if output is None or not output.is_file():
        return "", ""
    ends = re.findall(r"^the job ends with status (\d+)(.*)$", output.read_text(errors="replace"), flags=re.MULTILINE)
    return (ends[-1][0], ends[-1][1].lstrip(": ")) if ends else ("", "")
