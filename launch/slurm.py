"""TorchX's Slurm scheduler, with job states that are read on any Slurm and requests that current Slurm understands.

TorchX 0.7.0 asks `sacct` for the state of a job.  That fails where no accounting database runs, and states such as
COMPLETING or "CANCELLED by 0" are unknown to it.  This class asks `sacct` first, and on failure says so and asks
`scontrol`; what the controller has forgotten (minutes after the end) it reads from the job's own output.
"""

import logging
import re
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torchx.schedulers.api import AppDryRunInfo, DescribeAppResponse, ListAppResponse
from torchx.schedulers.slurm_scheduler import SLURM_STATES, SlurmBatchRequest, SlurmOpts, SlurmScheduler
from torchx.specs import AppDef, AppState, ReplicaStatus, Role, RoleStatus

from launch.records import job_dir_of

logger = logging.getLogger(__name__)

STATES = {
    **SLURM_STATES,
    # TorchX takes a cancelled job for a failed one.
    "CANCELLED": AppState.CANCELLED,
    "COMPLETING": AppState.RUNNING,
    "CONFIGURING": AppState.PENDING,
    "RESV_DEL_HOLD": AppState.PENDING,
    "REQUEUE_FED": AppState.PENDING,
    "REQUEUE_HOLD": AppState.PENDING,
    "SIGNALING": AppState.RUNNING,
    "SPECIAL_EXIT": AppState.FAILED,
    "STAGE_OUT": AppState.RUNNING,
    "STOPPED": AppState.PENDING,
}

# A job of several parts is in the first of these states that any part is in.
PRECEDENCE = (AppState.FAILED, AppState.CANCELLED, AppState.RUNNING, AppState.PENDING, AppState.SUCCEEDED)


@dataclass(frozen=True, kw_only=True, slots=True)
class JobPart:
    """One node's part of a heterogeneous job, or the whole of a job on one node."""

    job_id: str
    """The job's number; all parts of a heterogeneous job share it."""
    name: str
    """ROLE-REPLICA, as TorchX names the parts."""
    state: AppState
    """The part's state in TorchX's terms."""


def app_state(slurm_state: str) -> AppState:
    """TorchX's state for Slurm's, which may carry more words ("CANCELLED by 0").

    Raises:
        SlurmError: Slurm reports a state that this code does not know.
    """
    word = slurm_state.split()[0].rstrip("+") if slurm_state.split() else ""
    if word not in STATES:
        raise SlurmError(f"slurm reports state {slurm_state!r}, which is unknown here: add it to launch/slurm.py")
    return STATES[word]


def parse_sacct(output: str) -> list[JobPart]:
    """Parts from `sacct --parsable2 --noheader --allocations --format=JobID,JobName,State`."""
    parts = []
    for line in output.splitlines():
        job_id, name, state = line.split("|")
        parts.append(JobPart(job_id=job_id.split("+")[0], name=name, state=app_state(state)))
    return parts


def parse_scontrol(output: str) -> list[JobPart]:
    """Parts from `scontrol --oneliner show job`."""
    parts = []
    for line in output.splitlines():
        fields: dict[str, str] = {}
        for key, value in re.findall(r"(?:^|\s)(JobId|HetJobId|JobName|JobState)=(\S+)", line):
            # These come first; a user's words (Comment=, Command=) later in the line may look like them.
            fields.setdefault(key, value)
        if "JobState" in fields:
            job_id = fields.get("HetJobId") or fields["JobId"]
            parts.append(JobPart(job_id=job_id, name=fields["JobName"], state=app_state(fields["JobState"])))
    return parts


def state_of(parts: list[JobPart]) -> AppState:
    """The state of the job as a whole."""
    states = {part.state for part in parts}
    return next((state for state in PRECEDENCE if state in states), AppState.UNKNOWN)


class SlurmError(OSError):
    """A command of Slurm failed; the message is the command's."""


class AnySlurm(SlurmScheduler):
    """Slurm with or without accounting."""

    def _submit_dryrun(self, app: AppDef, cfg: SlurmOpts) -> AppDryRunInfo[SlurmBatchRequest]:
        info = super()._submit_dryrun(app, cfg)
        for replica in info.request.replicas.values():
            # Since Slurm 22.05 srun does not take over sbatch's cores a task: every process would share one core.
            if "cpus-per-task" in replica.sbatch_opts:
                replica.srun_opts["cpus-per-task"] = str(replica.sbatch_opts["cpus-per-task"])
            # A requeued job goes on in its output files.
            replica.srun_opts["open-mode"] = "append"
        return info

    def schedule(self, dryrun_info: AppDryRunInfo[SlurmBatchRequest]) -> str:
        """Submit, and return the job's number.  TorchX's own hides why sbatch failed and leaves its files behind."""
        request = dryrun_info.request
        assert request.job_dir is not None
        script = Path(request.job_dir, "job.sh")
        try:
            script.write_text(request.materialize())
            sbatch = _run([*request.cmd, f"--chdir={request.job_dir}", str(script)])
            if sbatch.returncode != 0:
                raise SlurmError(f"sbatch failed: {' '.join(sbatch.stderr.split())}")
        except Exception:
            # The copy of the code too.
            shutil.rmtree(request.job_dir, ignore_errors=True)
            raise
        return sbatch.stdout.strip().split(";")[0]

    def describe(self, app_id: str) -> DescribeAppResponse | None:
        """The job's state and each node's; None where nothing remembers the job."""
        parts = [part for part in self._parts(["-j", app_id], ["show", "job", app_id]) if part.job_id == app_id]
        if not parts:
            return self._describe_from_output(app_id)
        roles: dict[str, Role] = {}
        statuses: dict[str, RoleStatus] = {}
        for part in parts:
            role, dash, replica = part.name.rpartition("-")
            if not (dash and replica.isdigit()):
                continue
            roles.setdefault(role, Role(name=role, num_replicas=0, image="")).num_replicas += 1
            status = ReplicaStatus(id=int(replica), role=role, state=part.state, hostname="")
            statuses.setdefault(role, RoleStatus(role, [])).replicas.append(status)
        state = state_of(parts)
        return DescribeAppResponse(
            app_id=app_id,
            roles=list(roles.values()),
            roles_statuses=list(statuses.values()),
            state=state,
            msg=state.name,
        )

    def list(self) -> list[ListAppResponse]:
        """Every job that Slurm remembers."""
        jobs: dict[str, list[JobPart]] = {}
        for part in self._parts(["--starttime", "1970-01-01"], ["show", "job"]):
            jobs.setdefault(part.job_id, []).append(part)
        return [ListAppResponse(app_id=job_id, state=state_of(parts)) for job_id, parts in jobs.items()]

    def _parts(self, sacct_arguments: Sequence[str], scontrol_arguments: Sequence[str]) -> Sequence[JobPart]:
        columns = ["--parsable2", "--noheader", "--allocations", "--format=JobID%30,JobName%60,State%40"]
        sacct = _run(["sacct", *columns, *sacct_arguments])
        if sacct.returncode == 0:
            return parse_sacct(sacct.stdout)
        logger.info("sacct failed (%s): asking scontrol", " ".join(sacct.stderr.split()))
        scontrol = _run(["scontrol", "--oneliner", *scontrol_arguments])
        if scontrol.returncode != 0 and "Invalid job id" not in scontrol.stderr:
            raise SlurmError(f"scontrol failed: {' '.join(scontrol.stderr.split())}")
        return parse_scontrol(scontrol.stdout) if scontrol.returncode == 0 else []

    def _describe_from_output(self, app_id: str) -> DescribeAppResponse | None:
        """The end of a job that Slurm has forgotten, from the last line of its batch script's output."""
        job_dir = job_dir_of("slurm", app_id)
        output = job_dir / f"slurm-{app_id}.out" if job_dir else None
        if output is None or not output.is_file():
            return None
        codes = re.findall(r"^job exited with code (\d+)$", output.read_text(errors="replace"), flags=re.MULTILINE)
        if not codes:
            return None
        logger.info("slurm no longer knows job %s: its state is read from %s", app_id, output)
        state = AppState.SUCCEEDED if codes[-1] == "0" else AppState.FAILED
        return DescribeAppResponse(app_id=app_id, state=state, msg=state.name)


def _run(command: list[str]) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise SlurmError(f"{command[0]} is not installed: run this where Slurm's commands are") from None


def create_scheduler(session_name: str, **_: Any) -> AnySlurm:
    """TorchX's factory."""
    return AnySlurm(session_name)
