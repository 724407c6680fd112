"""Slurm's words about jobs, read with or without accounting.

`scontrol` knows waiting and running jobs, and those that ended minutes ago; `sacct` knows all, where there is an
accounting database.  Nothing in other people's jobs may stop the reading: what is not understood is unknown.

A job's number is CLUSTER:NUMBER where sbatch was told one of several clusters.
"""

import logging
import os
import re
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from torchx.schedulers.slurm_scheduler import SLURM_STATES
from torchx.specs import AppState

STATES = {
    **SLURM_STATES,
    "COMPLETING": AppState.RUNNING,
    "CONFIGURING": AppState.PENDING,
    "EXPEDITING": AppState.PENDING,
    "LAUNCH_FAILED": AppState.PENDING,
    "POWER_UP_NODE": AppState.PENDING,
    "RECONFIG_FAIL": AppState.PENDING,
    "RESIZING": AppState.RUNNING,
    "RESV_DEL_HOLD": AppState.PENDING,
    "REQUEUE_FED": AppState.PENDING,
    "REQUEUE_HOLD": AppState.PENDING,
    "SIGNALING": AppState.RUNNING,
    "SPECIAL_EXIT": AppState.FAILED,
    "STAGE_OUT": AppState.RUNNING,
    "STOPPED": AppState.PENDING,
    "UPDATE_DB": AppState.RUNNING,
}

REVOKED = "REVOKED"
"""State of a job in a federation of clusters that another cluster runs."""

# A value ends where the next key begins: "JobName=a b UserId=root(0) ...".
_FIELD = re.compile(r"(\S+?)=(.*?)(?=\s+[A-Z][A-Za-z0-9:/_]*=|\s*$)")
# "Unable to contact slurm controller (connect failure)", "Socket timed out on send/recv operation", ...
_NO_ANSWER = re.compile(
    "unable to contact slurm controller|socket timed out|connection (?:refused|reset|timed out)|"
    "slurm_receive_msg|zero bytes were transmitted|temporarily unable to accept",
    flags=re.IGNORECASE,
)
_SAID = re.compile(r"^#SBATCH --([a-z-]+)", flags=re.MULTILINE)
# A site's wrapper may greet before and after it; with several clusters the cluster's name follows.
_NUMBER = re.compile(r"^(\d+)(?:;(\S*))?\s*$", flags=re.MULTILINE)
_CLUSTER = re.compile(r"^#SBATCH --clusters=(\S+)", flags=re.MULTILINE)
_VARIABLES = {"array-inx": "array", "mem-per-node": "mem", "no-requeue": "requeue", "timelimit": "time"}
"""Variables SBATCH_* that are called otherwise than the option that they stand for."""
_ALONE = ("array", "error", "test-only", "wait")
"""Options that no script of ours says, and that a shell must not say either."""
_OF_THE_SITE = ("SLURM_CLUSTERS", "SLURM_CONF", "SLURM_CONF_SERVER", "SLURM_JWT")
"""Variables SLURM_* that say where Slurm is."""
ASK_AGAIN_S = 5.0
UNANSWERED_S = 60.0
"""How long a person who submits a job waits for a controller that does not answer."""
_SEPARATOR = "\x1f"
_SACCT_FIELDS = ("JobID", "State", "NodeList", "ExitCode", "Reason", "WorkDir")


logger = logging.getLogger(__name__)


class SlurmError(OSError):
    """A command of Slurm failed; the message is the command's."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SlurmJob:
    """One job as Slurm tells of it; an empty text is what was not told."""

    job_id: str
    """The job's number; of a job array's member, ARRAY_INDEX."""
    slurm_state: str
    """Slurm's word, such as RUNNING."""
    reason: str = ""
    """Slurm's word for why it waits or ended."""
    nodes: str = ""
    """The nodes that it runs or ran on."""
    exit_code: str = ""
    """How it ended, as Slurm writes it: STATUS:SIGNAL."""
    end_time: float | None = None
    """When it ends at the latest, in Unix seconds; None where there is no limit."""
    work_dir: str = ""
    """The folder that it was submitted from; for our jobs, the job's folder."""
    excluded: str = ""
    """Nodes that it must not run on."""
    start_time: float | None = None
    """When it last started, likewise."""
    preempt_time: float | None = None
    """When it was last told to make way for another job, likewise; of an earlier start, too."""
    restarts: str = ""
    """How often it has been requeued."""
    dependency: str = ""
    """The jobs that it waits for, in Slurm's words."""

    @property
    def state(self) -> AppState:
        """The job's state in TorchX's terms."""
        return app_state(self.slurm_state)


def app_state(slurm_state: str) -> AppState:
    """TorchX's state for Slurm's, which may carry more words ("CANCELLED by 0")."""
    words = slurm_state.split()
    return STATES.get(words[0].rstrip("+") if words else "", AppState.UNKNOWN)


def run(
    command: Sequence[str], patience_s: float = 0.0, environment: Mapping[str, str] = os.environ
) -> "subprocess.CompletedProcess[str]":
    """Run one of Slurm's commands; again for `patience_s` seconds if the controller does not answer, which an update or
    a failover of it may take.

    Raises:
        SlurmError: it is not installed.
    """
    deadline = time.monotonic() + patience_s
    # Moments as Unix seconds, which no time zone and no change to winter time shifts.
    variables = {**environment, "SLURM_TIME_FORMAT": "%s"}
    while True:
        try:
            done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False, env=variables)
        except FileNotFoundError:
            raise SlurmError(f"{command[0]} is not installed: run this where Slurm's commands are") from None
        if done.returncode == 0 or not _NO_ANSWER.search(done.stderr) or time.monotonic() > deadline:
            return done
        time.sleep(ASK_AGAIN_S)


def submit(command: Sequence[str], is_ours: Callable[[SlurmJob], bool], patience_s: float = UNANSWERED_S) -> str:
    """Send a job by a command that ends in its batch script; returns the job's number.

    A busy controller may take a job without answering, so one that `is_ours` finds is not sent again.

    Raises:
        SlurmError: Slurm refuses it, or does not answer for `patience_s` seconds.
    """
    script = Path(command[-1]).read_text()
    environment = _without_overrides(script)
    cluster = _CLUSTER.search(script)
    deadline = time.monotonic() + patience_s
    while True:
        sbatch = run(command, environment=environment)
        if sbatch.returncode == 0:
            for line in sbatch.stderr.splitlines():
                # What a site says of the job that it takes: moved to another queue, say, or its hours nearly used up.
                logger.warning("%s", line)
            return _number(sbatch.stdout)
        said = f"sbatch failed: {' '.join(sbatch.stderr.split())}"
        if not _NO_ANSWER.search(sbatch.stderr):
            raise SlurmError(said)
        time.sleep(ASK_AGAIN_S)
        left_s = max(0.0, deadline - time.monotonic())
        known = run(["scontrol", "--oneliner", "show", "job"], left_s, _asking(cluster[1] if cluster else ""))
        if known.returncode != 0:
            raise SlurmError(f"{said}; it may have taken the job all the same: look at squeue before you send it again")
        taken = next(filter(is_ours, parse_scontrol(known.stdout)), None)
        if taken is not None:
            return (f"{cluster[1]}:" if cluster else "") + taken.job_id.partition("_")[0]
        if time.monotonic() > deadline:
            raise SlurmError(said)


def _number(output: str) -> str:
    numbers = _NUMBER.findall(output)
    if not numbers:
        said = " ".join(output.split())[:80]
        raise SlurmError(f"sbatch gave no number of a job but said {said!r}: leave out what makes it do so")
    number, cluster = numbers[-1]
    return f"{cluster}:{number}" if cluster else str(number)


def _asking(cluster: str) -> Mapping[str, str]:
    """The environment in which Slurm's commands ask that cluster; without a name, the one that they ask anyway."""
    return {**os.environ, "SLURM_CLUSTERS": cluster} if cluster else os.environ


def _without_overrides(script: str) -> dict[str, str]:
    """The environment less the variables SBATCH_* that would take the place of what the script says, and less SLURM_*,
    which srun would take for its own: those of a person's srun (SLURM_LABELIO), or of the job that sends this one."""
    said, kept = {*_SAID.findall(script), *_ALONE}, dict(os.environ)
    for name in os.environ:
        option = name.removeprefix("SBATCH_").lower().replace("_", "-")
        of_srun = name.startswith(("SLURM_", "SLURMD_")) and name not in _OF_THE_SITE
        if of_srun or (name.startswith("SBATCH_") and _VARIABLES.get(option, option) in said):
            value = kept.pop(name)
            if "SLURM_JOB_ID" not in os.environ:
                logger.info("%s=%s of the environment has no effect: the job's script decides", name, value)
    return kept


def fields_of(line: str) -> dict[str, str]:
    """The fields of a line of `scontrol --oneliner`; the first of a name counts, for a user's words come later."""
    found: dict[str, str] = {}
    for key, value in _FIELD.findall(line):
        found.setdefault(key, value)
    return found


def parse_scontrol(output: str) -> list[SlurmJob]:
    """Jobs from `scontrol --oneliner show job`."""
    jobs = []
    for line in output.splitlines():
        told = fields_of(line)
        if "JobState" not in told or "JobId" not in told:
            continue
        array = told.get("ArrayJobId")
        # A member that has not started shares one line with the others: its index is a range, and names no job yet.
        member = f"{array}_{told['ArrayTaskId']}" if array and told.get("ArrayTaskId", "").isdigit() else array
        jobs.append(
            SlurmJob(
                job_id=member or told["JobId"],
                slurm_state=told["JobState"],
                reason="" if told.get("Reason") in (None, "None") else told["Reason"],
                nodes="" if told.get("NodeList") in (None, "(null)") else told["NodeList"],
                exit_code=told.get("ExitCode", ""),
                # For a job without a limit Slurm reports an end a year from now.
                end_time=None if told.get("TimeLimit") == "UNLIMITED" else _moment(told.get("EndTime", "")),
                start_time=_moment(told.get("StartTime", "")),
                preempt_time=_moment(told.get("PreemptTime", "")),
                work_dir=told.get("WorkDir", ""),
                restarts=told.get("Restarts", ""),
                dependency=told.get("Dependency", ""),
                excluded="" if told.get("ExcNodeList") in (None, "(null)") else told["ExcNodeList"],
            )
        )
    return jobs


def _moment(text: str) -> float | None:
    """Unix seconds; None for "Unknown", "None" and "N/A"."""
    return float(text) if text.isdigit() else None


def parse_sacct(output: str) -> list[SlurmJob]:
    """Jobs from sacct with the columns of `_SACCT_FIELDS`."""
    jobs = []
    for line in output.splitlines():
        values = line.split(_SEPARATOR)
        if len(values) < len(_SACCT_FIELDS):
            continue
        told = dict(zip(_SACCT_FIELDS, values, strict=False))
        jobs.append(
            SlurmJob(
                # Of members that have not started, the array's: "5_[1-3]".
                job_id=told["JobID"].partition("_[")[0],
                slurm_state=told["State"],
                reason="" if told["Reason"] in ("", "None") else told["Reason"],
                nodes="" if told["NodeList"] in ("", "None assigned") else told["NodeList"],
                exit_code=told["ExitCode"],
                work_dir=told["WorkDir"],
            )
        )
    return jobs


def find_job(job_id: str, patience_s: float = 0.0) -> SlurmJob | None:
    """What Slurm knows of a job; None where it has forgotten it or never knew it.

    Raises:
        SlurmError: Slurm does not answer.
    """
    cluster, _, number = job_id.rpartition(":")
    environment = _asking(cluster)
    scontrol = run(["scontrol", "--oneliner", "show", "job", number], patience_s, environment)
    if scontrol.returncode == 0:
        jobs = parse_scontrol(scontrol.stdout)
    elif "Invalid job id" in scontrol.stderr:
        jobs = _from_sacct(["--jobs", number], environment)
    else:
        raise SlurmError(f"scontrol failed: {' '.join(scontrol.stderr.split())}")
    if any(job.slurm_state == REVOKED for job in jobs):
        everywhere = run(["scontrol", "--federation", "--oneliner", "show", "job", number], patience_s, environment)
        jobs = [job for job in parse_scontrol(everywhere.stdout) if job.slurm_state != REVOKED] or jobs
    exact = [job for job in jobs if job.job_id == number]
    # Slurm lists the members of a job array, not the array as a whole.
    return next(iter(exact or jobs), None)


def cancel(job_id: str) -> None:
    """End a job, or a job array with all its members.

    Raises:
        SlurmError: Slurm refuses, or does not answer.
    """
    cluster, _, number = job_id.rpartition(":")
    scancel = run(["scancel", number], environment=_asking(cluster))
    if scancel.returncode != 0:
        raise SlurmError(f"scancel failed: {' '.join(scancel.stderr.split())}")


def node_address(node: str) -> str:
    """The address at which other nodes reach a node; its name if Slurm has no other, which only Slurm may know."""
    scontrol = run(["scontrol", "--oneliner", "show", "node", node])
    told = [fields_of(line) for line in scontrol.stdout.splitlines() if line.startswith("NodeName=")]
    return told[-1].get("NodeAddr", node) if told else node


def node_names(listed: str) -> list[str]:
    """The names in a list as Slurm writes it, n[1-2]."""
    told = run(["scontrol", "show", "hostnames", listed]).stdout.splitlines()
    # Around them a site's wrapper may greet.
    return [line for line in told if re.fullmatch(r"[\w.-]+", line)]


def lost_nodes(nodes: str, patience_s: float = 0.0, cluster: str = "") -> dict[str, str]:
    """Which of `nodes` (a list as Slurm writes it) are down or silent, with Slurm's word for their state."""
    ask = ["sinfo", "--noheader", "--Node", f"--nodes={nodes}", "--format=%N %T"]
    told = [line.split() for line in run(ask, patience_s, _asking(cluster)).stdout.splitlines()]
    states = {words[0]: words[1] for words in told if len(words) == 2}
    lost = ("down", "fail", "*", "unk")
    return {node: state for node, state in states.items() if any(word in state.lower() for word in lost)}


def own_address() -> str:
    """The address at which other nodes of a job reach this one."""
    return node_address(os.environ.get("SLURMD_NODENAME", "localhost"))


def all_jobs() -> list[SlurmJob]:
    """Every job that Slurm remembers, other people's too, oldest first.

    Raises:
        SlurmError: Slurm does not answer.
    """
    scontrol = run(["scontrol", "--oneliner", "show", "job"])
    if scontrol.returncode != 0:
        raise SlurmError(f"scontrol failed: {' '.join(scontrol.stderr.split())}")
    live = {job.job_id: job for job in parse_scontrol(scontrol.stdout)}
    past = {job.job_id: job for job in _from_sacct(["--starttime", "now-30days"])}
    return list((past | live).values())


def _from_sacct(arguments: Sequence[str], environment: Mapping[str, str] = os.environ) -> list[SlurmJob]:
    columns = ["--parsable2", "--noheader", "--allocations", f"--delimiter={_SEPARATOR}"]
    sacct = run(["sacct", *columns, f"--format={','.join(_SACCT_FIELDS)}", *arguments], environment=environment)
    # Without an accounting database it fails, and nothing is known beyond what scontrol said.
    return parse_sacct(sacct.stdout) if sacct.returncode == 0 else []
