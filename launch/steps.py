"""A command on all nodes of a Slurm allocation at once: one of its steps."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, kw_only=True, slots=True)
class Steps:
    """How the steps of an allocation are started."""

    code_dir: Path
    """The folder of the code, in which every node runs."""
    nodes: int
    """Nodes that the job has."""
    cpus_per_task: int
    """Cores of a node's task; 0: what Slurm gives."""
    options: tuple[str, ...] = ()
    """More options of srun: the container, where there is one."""

    def srun(self, command: Sequence[str], more: Sequence[str], nodes: int = 0) -> list[str]:
        """`command` on the first `nodes` (0: all), in the job's folder, with `more` options of srun."""
        count = nodes or self.nodes
        options = [f"--nodes={count}", f"--ntasks={count}", "--ntasks-per-node=1", "--export=ALL", *self.options]
        # Since Slurm 22.05 srun does not take over sbatch's cores a task: every process would share one core.
        options += [f"--cpus-per-task={self.cpus_per_task}"] if self.cpus_per_task else []
        options += ["--wait=0", "--mpi=none", *more]
        return ["srun", *options, "/bin/sh", "-c", _ENTER, "sh", str(self.code_dir), *command]


_ENTER = """\
# An early warning is no end of what cannot hear it yet.
trap '' USR1
node="node ${SLURMD_NODENAME:-$(hostname)}"
cd "$1" 2>/dev/null || {
  echo "error: $node has no folder $1, which holds the job's code: put the run directory where all nodes see it" >&2
  exit 5
}
command -v "$2" >/dev/null || {
  echo "error: $node has no interpreter $2: name one with --python that all nodes have" >&2
  exit 5
}
shift
exec "$@"
"""
"""Enters the job's folder on each node; where it cannot, Slurm would start in another, with the code that is there."""
