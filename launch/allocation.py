"""What a Slurm job does within an allocation: start the run on all nodes, warn it in time, and see that it resumes.

    python -m launch.allocation --run-dir DIR --max-retries N --max-restarts M --nodes 2 --cpus-per-task 8 -- COMMAND

The batch script runs this process, on the job's first node; if it is killed, another one that has the job go on.  It
ends the run in good order some time before the allocation ends: the lead is what the last save took, measured, and
twice what lies between two steps at which ranks agree to stop.  Then, and after a failure that may be tried again, it
has Slurm start the job anew: by requeueing it, or where that is forbidden by a successor that depends on this job
(`afternotok`).
"""

import argparse
import logging
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from torchx.specs import AppState

from launch import attempts, signals
from launch.fit_nodes import Question, Unfit
from launch.logs import Span, first_failure
from launch.node import free_port, job_status
from launch.progress import newest_checkpoint, stopping_time_s
from launch.records import find_in, save_in
from launch.schedulers import slurm_queue
from launch.schedulers.slurm import NODE_OUTPUT
from launch.schedulers.slurm_queue import SlurmError, SlurmJob
from launch.schedulers.slurm_script import SCRIPT
from launch.steps import Steps
from trainer.exit_status import FAILED, STOPPED, WRONG_USE
from trainer.health.output import outlive_output
from trainer.health.stop_signal import ASKING
from trainer.run.run_dir import RunDir

logger = logging.getLogger(__name__)

TAKEN = ("NODE_FAIL", "PREEMPTED", "CANCELLED", "TIMEOUT", "REQUEUED", "COMPLETING", "DEADLINE", "BOOT_FAIL")
"""States in which Slurm is ending the job itself."""
NODE_FAILURE = "node failure"
PATIENCE_S = 900.0
"""How long a controller that does not answer is waited for: without it nothing goes on."""
LOOK_S = 600.0
"""How often a run's time limit is asked for: people shorten and extend those of running jobs."""
TELL_S = 5.0
"""How long after its start a run may be told to stop, and how often it is told again."""
ENDING_S = 180
"""How long nodes may take to end after the first one; the guards of their ranks end those in less (`END_S` of
`trainer.health.watchdog`).  Of a node where the daemon of its step was killed srun never hears: it would wait for ever.
"""
MAX_STOPS = 3
"""Starts in a row that may stop without a new checkpoint."""
MAX_EXCLUSIONS = 3
"""Starts in a row without fit nodes after which it is not the nodes."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Allocation:
    """One allocation of a job."""

    job_id: str
    """Slurm's number of the job."""
    job_dir: Path
    """The folder of the output; its name is the submission's."""
    run_dir: Path
    """The run directory."""
    steps: Steps
    """How its nodes are told what to run; their folder holds the batch script, too."""
    max_retries: int
    """Failures in a row without a new checkpoint after which there is another start."""
    max_restarts: int
    """Starts within this allocation after the first."""
    question: Question
    """What its nodes are asked before a start."""
    command: tuple[str, ...]
    """The command that every node runs."""

    def run(self, killed: int = 0) -> int:
        """Start the run until it is done or this allocation should end; returns the batch job's exit status.  After a
        process that did so was killed, with status `killed`, its steps still run here: another start is a new one's.
        """
        try:
            return self._after_kill(f"launch.allocation was killed by signal {killed - 128}") if killed else self._run()
        except (OSError, ValueError) as error:
            # The run directory is gone, damaged, full or over its quota, or Slurm does not answer for too long.
            print(f"error: {error}", flush=True)
            return self._say(FAILED, f": {error}")

    def _run(self) -> int:
        attempts.note_first_start(self.job_dir)
        restarts = 0
        before = after = self._newest_step()
        unfit = self._ask_nodes()
        while not unfit:
            started = time.time()
            status, told_to_stop = self._start()
            after = self._newest_step()
            if status == 0:
                self._note("done", "", before, after)
                return self._say(0, "")
            job = slurm_queue.find_job(self.job_id, PATIENCE_S)
            taken = _taken(job)
            if job is not None and taken and taken != NODE_FAILURE:
                return self._end_taken(taken, job, before, after)
            if status == STOPPED or taken:
                taken = taken or ("preempted" if _is_preempted(job) else "")
                reason = taken or "stopped in good order"
                self._note("taken" if taken else "stopped", reason, before, after)
                return self._too_short() or self.go_on(reason)
            if status == WRONG_USE:
                self._note("failed", self._fault(started), before, after)
                return self._say(WRONG_USE, ": wrong use, which another start would repeat")
            # An allocation that is about to end, or was asked to, is no place for another start.
            last = told_to_stop or restarts == self.max_restarts
            # Was it a node?  Slurm takes minutes to notice that one has lost its power.
            unfit = [] if told_to_stop else self._ask_nodes()
            if not unfit:
                why = self._fault(started)
                self._note("failed", why, before, after)
                too_often = self._too_often()
                if last or too_often:
                    return too_often or self.go_on(why)
                before, restarts = after, restarts + 1
                logger.info("starting again within the allocation (%d of %d)", restarts, self.max_restarts)
        # Nodes that were taken while they were asked answer nothing.
        ended = self._end_if_taken(before, after)
        if ended:
            return ended
        self._note("unfit", "; ".join(node.why for node in unfit), before, after)
        return self._leave_out(unfit)

    def _after_kill(self, why: str) -> int:
        before = max((attempt.step for attempt in attempts.read(self.run_dir)), default=0)
        after = self._newest_step()
        ended = self._end_if_taken(before, after)
        if ended:
            return ended
        self._note("failed", why, before, after)
        return self._too_often() or self.go_on(why)

    def _too_often(self) -> int:
        """The exit status if the last failure was one too many; otherwise 0."""
        count = attempts.failures_without_progress(attempts.read(self.run_dir, self.job_dir.name))
        if count <= self.max_retries:
            return 0
        why = f"{count} failures in a row without a new checkpoint, --max-retries is {self.max_retries}"
        return self._say(FAILED, f": {why}")

    def _end_if_taken(self, before: int, after: int) -> int:
        """The exit status if Slurm has taken the allocation; otherwise 0."""
        job = slurm_queue.find_job(self.job_id, PATIENCE_S)
        taken = _taken(job)
        if job is None or taken in ("", NODE_FAILURE):
            return 0
        return self._end_taken(taken, job, before, after)

    def _end_taken(self, how: str, job: SlurmJob, before: int, after: int) -> int:
        """Slurm starts a job that it requeued again by itself, and one that was cancelled was cancelled; a time limit
        that came before the run had stopped, and a preemption without a requeue, leave it to a successor."""
        if job.reason == "TimeLimit":
            self._note("stopped", "the time limit", before, after)
            return self._too_short() or self._chain("the time limit")
        preempted = _is_preempted(job)
        self._note("taken", "preempted" if preempted else how, before, after)
        if preempted and not _is_requeued(job):
            return self._chain("preempted")
        return self._say(STOPPED, f": {'preempted; requeued' if preempted else how}")

    def _too_short(self) -> int:
        """The exit status if allocations end again and again before the run has saved anything new; otherwise 0."""
        count = attempts.stops_without_progress(attempts.read(self.run_dir, self.job_dir.name))
        if count < MAX_STOPS:
            return 0
        return self._say(FAILED, f": {count} starts in a row stopped before a new checkpoint: ask for more time")

    def _ask_nodes(self) -> list[Unfit]:
        job = slurm_queue.find_job(self.job_id, PATIENCE_S)
        # A running job may have been shrunk since, which its variables do not show.
        unfit = self.question.unfit(job.nodes if job and job.nodes else os.environ["SLURM_JOB_NODELIST"])
        for node in unfit:
            print(f"error: {node.why}", flush=True)
        return unfit

    def _leave_out(self, unfit: Sequence[Unfit]) -> int:
        """Try the job on other nodes, where there are any; Slurm says so by taking or refusing a successor.

        Nodes that do not answer are left to Slurm, which starts nothing on one that has gone, until they do so twice.
        """
        why = "; ".join(node.why for node in unfit)
        times = attempts.unfit_without_progress(attempts.read(self.run_dir, self.job_dir.name))
        if times >= MAX_EXCLUSIONS:
            return self._say(FAILED, f": {why}; other nodes were not fit either")
        if times <= 1 and not any(node.answers for node in unfit):
            return self.go_on(why)
        job = slurm_queue.find_job(self.job_id, PATIENCE_S)
        excluded = ",".join([*filter(None, [job.excluded if job else ""]), *(node.node for node in unfit)])
        return self._chain(why, [f"--exclude={excluded}"])

    def _start(self) -> tuple[int, bool]:
        """Run the command on all nodes; returns the exit status of the whole, and whether it was told to stop."""
        early = signals.next_signal(0.0)
        if early in ASKING:
            logger.info("%s: nothing is started", early.name)
            return STOPPED, True
        environment = {
            **os.environ,
            "TORCHX_RANK0_HOST": slurm_queue.own_address(),
            # This process is on the first node, so what is free here is free there; a new one at every start.
            "MASTER_PORT": str(free_port()),
        }
        output = self.job_dir / NODE_OUTPUT.format("%n")
        # A node that fails takes the others with it; one that is done does not, but they end at about the same time.
        options = ["--kill-on-bad-exit=1", f"--wait={ENDING_S}", f"--output={output}", "--open-mode=append"]
        srun = subprocess.Popen(self.steps.srun(self.command, options), env=environment)
        started = time.time()
        warn_at, stopping, tell_at = self._warning_time(started, None, PATIENCE_S), False, time.monotonic() + TELL_S
        while srun.poll() is None:
            left_s = math.inf if warn_at is None else warn_at - time.time()
            received = signals.next_signal(max(1.0, tell_at - time.monotonic()) if stopping else min(left_s, LOOK_S))
            if received is None:
                # The limit may have been changed since, and the run knows better how long it takes to save.
                warn_at = self._warning_time(started, warn_at)
            near = warn_at is not None and time.time() >= warn_at
            if not stopping and (near or received in ASKING):
                why = received.name if received in ASKING else "the time limit is near"
                logger.info("%s: the run saves its state and stops", why)
                stopping = True
            if stopping and time.monotonic() >= tell_at:
                # srun ends its step on SIGTERM and SIGINT; SIGUSR1 it passes on, to what may not be there yet to hear.
                srun.send_signal(signal.SIGUSR1)
                tell_at = time.monotonic() + TELL_S
        return job_status(srun.returncode), stopping

    def _warning_time(self, started: float, known: float | None, patience_s: float = 0.0) -> float | None:
        """When the run, `started` at that time, must be told to stop; None without a time limit.  What is `known`
        stands if the controller does not answer."""
        try:
            job = slurm_queue.find_job(self.job_id, patience_s)
        except SlurmError:
            return known
        if job is None or job.end_time is None:
            return None
        # At most half of a short allocation is kept for the last save.
        return job.end_time - min(stopping_time_s(RunDir(self.run_dir)), (job.end_time - started) / 2)

    def _newest_step(self) -> int:
        return newest_checkpoint(RunDir(self.run_dir))

    def _fault(self, started: float) -> str:
        """Why the start of that time failed, in the words of the rank or node that failed first."""
        record = find_in(self.job_dir)
        # Lines may be stamped to the second.
        fault = first_failure(record, Span(int(started))) if record else None
        return str(fault or "a process failed")

    def _note(self, ended: attempts.Ending, reason: str, before: int, after: int) -> None:
        attempts.note(self.run_dir, self.job_dir.name, ended=ended, reason=reason, before=before, after=after)

    def go_on(self, reason: str) -> int:
        """Have Slurm start the job again, by a requeue or, where that is refused, a successor."""
        logger.info("%s: the job asks Slurm to start it again", reason)
        requeue = slurm_queue.run(["scontrol", "requeue", self.job_id], PATIENCE_S)
        # One that a busy controller takes without an answer is refused the second time.
        if requeue.returncode == 0 or _is_requeued(slurm_queue.find_job(self.job_id, PATIENCE_S)):
            # Slurm ends this process; until it does, nothing else is to be done.
            return self._say(STOPPED, f": {reason}; requeued")
        logger.info("scontrol requeue was refused (%s): a successor waits for this job", requeue.stderr.strip())
        return self._chain(reason)

    def _chain(self, reason: str, options: Sequence[str] = ()) -> int:
        """Leave the run to another job, which starts when this one has ended; its options go before the script's."""
        depends = f"--dependency=afternotok:{self.job_id}"
        index = os.environ.get("SLURM_ARRAY_TASK_ID")
        member = [f"--array={index}"] if index else []
        command = ["sbatch", "--parsable", depends, *member, *options, str(self.steps.code_dir / SCRIPT)]
        try:
            number = slurm_queue.submit(command, lambda job: f":{self.job_id}(" in job.dependency, PATIENCE_S)
            successor = number + (f"_{index}" if index else "")
        except SlurmError as error:
            return self._say(FAILED, f": {reason}; Slurm takes no other job to go on with it: {error}")
        record = find_in(self.job_dir)
        if record is not None:
            save_in(self.job_dir, replace(record, handle=f"{record.handle.rpartition('/')[0]}/{successor}"))
        return self._say(STOPPED, f": {reason}; job {successor} goes on")

    def _say(self, status: int, why: str) -> int:
        """The last words, which `status` reads where Slurm has forgotten the job."""
        print(f"the job ends with status {status}{why}", flush=True)
        return status


def own_id(environment: Mapping[str, str]) -> str:
    """This job's number.  Of a job array's member it is ARRAY_INDEX: Slurm gives one member the array's own number, by
    which commands mean all members."""
    array = environment.get("SLURM_ARRAY_JOB_ID")
    return f"{array}_{environment['SLURM_ARRAY_TASK_ID']}" if array else environment["SLURM_JOB_ID"]


def _is_requeued(job: SlurmJob | None) -> bool:
    """Whether Slurm will start this job again by itself."""
    return job is not None and int(job.restarts or 0) > int(os.environ.get("SLURM_RESTART_COUNT", "0"))


def _is_preempted(job: SlurmJob | None) -> bool:
    """Whether Slurm has told this start of the job to make way for another one."""
    # The time of a preemption stays through a requeue.
    return job is not None and job.preempt_time is not None and job.preempt_time >= (job.start_time or 0.0)


def _taken(job: SlurmJob | None) -> str:
    """Whether Slurm is taking the allocation, or a node of it, away; empty if not."""
    if job is None:
        return ""
    word = job.slurm_state.split()[0]
    # A word of a newer Slurm is no reason to end a run.
    if word in TAKEN or job.state not in (AppState.RUNNING, AppState.SUBMITTED, AppState.UNKNOWN):
        # Slurm's word for every end from outside while processes are still ending.
        return "ended from outside" if word == "COMPLETING" else word
    if job.nodes:
        # The job still counts as running for a while after a node has gone.
        return NODE_FAILURE if slurm_queue.lost_nodes(job.nodes, PATIENCE_S) else ""
    return ""


def main(arguments: Sequence[str]) -> int:
    """Parse the arguments of the batch script and run; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m launch.allocation", description="Run a job within an allocation.")
    parser.add_argument("--run-dir", type=Path, required=True, help="the run directory")
    parser.add_argument("--job-dir", type=Path, required=True, help="where the output goes")
    parser.add_argument("--max-retries", type=int, required=True, help="failures in a row without a new checkpoint")
    parser.add_argument("--max-restarts", type=int, required=True, help="starts within the allocation")
    parser.add_argument("--nodes", type=int, required=True, help="nodes of the job")
    parser.add_argument("--cpus-per-task", type=int, required=True, help="cores a node; 0: what Slurm gives")
    parser.add_argument("--step-option", action="append", default=[], help="an option of srun for what nodes run")
    parser.add_argument("--data", action="append", default=[], help="a folder that every node reads")
    parser.add_argument("--procs-per-node", type=int, required=True, help="processes a node")
    parser.add_argument("--killed", type=int, default=0, help="status of a process as this one that was killed")
    parser.add_argument("command", nargs="+", help="after --: what every node runs")
    given = parser.parse_args(arguments)
    outlive_output()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    signals.hold()
    steps = Steps(
        code_dir=Path.cwd(), nodes=given.nodes, cpus_per_task=given.cpus_per_task, options=tuple(given.step_option)
    )
    return Allocation(
        job_id=own_id(os.environ),
        job_dir=given.job_dir,
        run_dir=given.run_dir,
        max_retries=given.max_retries,
        max_restarts=given.max_restarts,
        steps=steps,
        question=Question(
            steps=steps,
            interpreter=given.command[0],
            run_dir=given.run_dir,
            job_dir=given.job_dir,
            data=tuple(given.data),
            procs_per_node=given.procs_per_node,
        ),
        command=tuple(given.command),
    ).run(given.killed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
