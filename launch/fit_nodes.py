"""Which nodes of a Slurm allocation are not fit for its run, and why: what `trainer.health.fitness` finds on each."""

import json
import os
import re
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from launch.node import free_port, listen
from launch.progress import newest_complete
from launch.schedulers import slurm_queue
from launch.schedulers.slurm_queue import SlurmError
from launch.steps import Steps
from trainer.health import fitness
from trainer.run.run_dir import RunDir

PATIENCE_S = 600
"""After which a node that has not said whether it is fit is not.  Slurm itself may begin late there: a prolog takes
minutes, or an image has to come first."""


_DAEMON = re.compile(r"slurmstepd(?:-(\S+))?: error: (.*)")


@dataclass(frozen=True, slots=True)
class Unfit:
    """A node that cannot take part."""

    node: str
    """The node's name in Slurm."""
    why: str
    """A line that names it and says why."""
    answers: bool
    """Whether it said so itself; if not, it may have gone, which Slurm finds out in its own time."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Question:
    """What all nodes of an allocation are asked."""

    steps: Steps
    """How they are asked."""
    interpreter: str
    """The nodes' Python."""
    run_dir: Path
    """The run directory."""
    job_dir: Path
    """The job's folder in it."""
    data: tuple[str, ...]
    """Folders that every node reads."""
    procs_per_node: int
    """Processes on each node."""

    def unfit(self, listed: str) -> list[Unfit]:
        """Ask them, `listed` as Slurm writes them, and wait for their answers.

        Raises:
            SlurmError: the job has been given another number of nodes than it was sent for.
        """
        nodes = slurm_queue.node_names(listed)
        if len(nodes) != self.steps.nodes:
            raise SlurmError(
                f"the allocation has {len(nodes)} nodes, the job was sent for {self.steps.nodes}: submit it again with "
                f"--nodes {len(nodes)}, and it goes on from its last checkpoint"
            )
        # In the job's folder: what a killed start leaves behind there is nothing of the run's.
        token = f"jobs/{self.job_dir.name}/preflight-{os.getpid()}-{time.time_ns()}"
        (self.run_dir / token).write_text(token)
        try:
            return self._ask(nodes, token)
        finally:
            (self.run_dir / token).unlink(missing_ok=True)

    def _ask(self, nodes: Sequence[str], token: str) -> list[Unfit]:
        try:
            facts = self._facts(token)
        except subprocess.TimeoutExpired:
            # Slurm gives it no step as long as what an earlier start left there cannot be killed, for one.
            why = f"node {nodes[0]} does not answer: no step has come to its end there for {PATIENCE_S} s"
            return [Unfit(nodes[0], why, answers=False)]
        question = [self.interpreter, "-m", "trainer.health.fitness", "--as", facts]
        question += ["--run-dir", str(self.run_dir), "--procs-per-node", str(self.procs_per_node)]
        question += [word for path in self.data for word in ("--data", path)]
        complete = newest_complete(RunDir(self.run_dir))
        question += ["--complete", str(complete)] if complete else []
        # What the first process will do, before any has started.
        with listen(free_port()) as server:
            if self.steps.nodes > 1:
                question += ["--meet", f"{slurm_queue.own_address()}:{server.getsockname()[1]}"]
            words = self._answers(question)
        return read_answers(words, nodes)

    def _answers(self, question: Sequence[str]) -> str:
        command = self.steps.srun(question, ["--kill-on-bad-exit=0"])
        try:
            answer = subprocess.run(
                command, capture_output=True, text=True, errors="replace", timeout=PATIENCE_S, check=False
            )
        except subprocess.TimeoutExpired as late:
            return b"".join(text for text in (late.stdout, late.stderr) if text).decode(errors="replace")
        return answer.stdout + answer.stderr

    def _facts(self, token: str) -> str:
        """The first node's facts as the nodes' interpreter sees them, which may be in a container.

        Raises:
            TimeoutExpired: it has not told them.
        """
        facts = [self.interpreter, "-m", "trainer.health.fitness", "--facts", token]
        command = self.steps.srun(facts, ["--relative=0"], nodes=1)
        told = subprocess.run(
            command, capture_output=True, text=True, errors="replace", timeout=PATIENCE_S, check=False
        )
        # Where it cannot run, every node's own answer will say why.
        lines = told.stdout.splitlines() if told.returncode == 0 else []
        return lines[-1] if lines else fitness.as_argument(fitness.facts_here(token))


def read_answers(words: str, nodes: Sequence[str]) -> list[Unfit]:
    """The unfit ones of `nodes`, from what `trainer.health.fitness`, the shell and Slurm said on all of them."""
    answers, rest = {}, []
    for line in words.splitlines():
        try:
            answer = json.loads(line)
            answers[str(answer["node"])] = "; ".join(answer["problems"])
        except (ValueError, KeyError, TypeError):
            rest.append(line)
    unfit = [Unfit(node, f"node {node}: {found}", answers=True) for node, found in answers.items() if found]
    for node in nodes:
        if node not in answers:
            # In the shell's words before Slurm's, which only counts its tasks.
            own = [line.removeprefix("error: ") for line in rest if line.startswith(f"error: node {node} ")]
            # What its daemon said, which may not name it; of an image that cannot be had, enroot's words say most.
            daemons = [said[2] for line in rest if (said := _DAEMON.match(line)) and said[1] in (None, node)]
            told = sorted(daemons, key=lambda words: "[ERROR]" not in words)
            told += [line for line in rest if f"error: {node}:" in line]
            # What srun says of no node is about all of them: the step could not be started.
            told += [line for line in rest if line.startswith("srun: ") and ": task " not in line]
            slurms = [f"node {node} does not answer: {line}" for line in told]
            why = next(iter(own + slurms), f"node {node} does not answer")
            unfit.append(Unfit(node, why, answers=bool(own)))
    return unfit
