"""The batch script of a job on Slurm, and how it is sent."""

import shlex
from collections.abc import Sequence
from dataclasses import dataclass

from launch.environment import FIT
from trainer.exit_status import WRONG_USE

SCRIPT = "job.sh"
"""The batch script's name, in the job's folder."""

ONCE = ("begin", "dependency", "hold")
"""Options about when a job may start: said of its first submission only, not of its successors."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SlurmRequest:
    """A batch script and its options."""

    job_dir: str
    """The folder of the code and of the output."""
    options: dict[str, str]
    """Options of sbatch; an empty value stands for an option that takes none."""
    environment: dict[str, str]
    """Variables besides those of the submitting shell."""
    commands: tuple[tuple[str, ...], ...]
    """What the batch script runs, an interpreter with `-m launch.allocation`: one, or of a job array each member's."""
    job_dirs: tuple[str, ...]
    """The folder of each job's output; if there is one job, its `job_dir`."""
    packages: tuple[str, ...] = ()
    """What the batch script's interpreter needs; empty: all that a run does."""

    def script(self) -> str:
        """The file that sbatch reads: sending it again by hand does the same."""
        lines = [f"#SBATCH {option(k, shlex.quote(v) if v else v)}" for k, v in self.options.items() if k not in ONCE]
        lines += [f"export {key}={shlex.quote(value)}" for key, value in self.environment.items()]
        lines += [_LISTEN, *_checks(self.job_dir, self.commands[0][0], self.packages)]
        if len(self.commands) == 1:
            lines += [f"set -- {shlex.join(self.commands[0])}"]
        else:
            members = [f"{i}) set -- {shlex.join(command)} ;;" for i, command in enumerate(self.commands)]
            lines += ['case "$SLURM_ARRAY_TASK_ID" in', *members, "esac"]
        # -p: a file that BASH_ENV names might print, or exit, with which the job would count as done.
        return "\n".join(["#!/bin/bash -p", *lines, _RUN])

    def submission(self) -> list[str]:
        """The command that sends it the first time."""
        once = [option(key, value) for key, value in self.options.items() if key in ONCE]
        return ["sbatch", "--parsable", *once, f"{self.job_dir}/{SCRIPT}"]

    def __str__(self) -> str:
        return f"{shlex.join(self.submission())}\n\n{self.script()}"


def _checks(job_dir: str, interpreter: str, packages: Sequence[str]) -> list[str]:
    """Lines of the batch script that check whether the first node can run our code at all; what it lacks is one line,
    and another start would lack it, too."""
    folder, python = shlex.quote(job_dir), shlex.quote(interpreter)
    no_folder = shlex.quote(f"folder {job_dir}: keep --run-dir on a file system that all nodes share")
    no_python = shlex.quote(f"interpreter {interpreter}: name one with --python that all nodes have")
    swallows = shlex.quote(f"error: {interpreter} ends with 0 whatever it has run: let its last line begin with exec")
    return [
        f'refuse() {{ echo "the job ends with status {WRONG_USE}"; exit {WRONG_USE}; }}',
        'lacks() { echo "error: $(hostname) has no $1" >&2; refuse; }',
        f"cd {folder} || lacks {no_folder}",
        f"command -v {python} >/dev/null || lacks {no_python}",
        f"(deaf {shlex.join([interpreter, '-m', 'launch.environment', *packages])})",
        f"case $? in {FIT}) ;; 0) echo {swallows} >&2; refuse ;; *) refuse ;; esac",
    ]


_LISTEN = """\
# Slurm may tell this shell alone.  What it starts is deaf until it listens, so it is told again and again.
deaf() { trap '' USR1 TERM; exec "$@"; }
tell() { asked=$1; while kill -$1 $! 2>/dev/null; do sleep 0.5; done; }
trap 'tell USR1' USR1
trap 'tell TERM' TERM INT HUP"""

_RUN = """\
deaf "$@" &
[ -z "$asked" ] || tell $asked
# A signal ends a wait early.
while kill -0 $! 2>/dev/null; do wait $!; done
wait $!
status=$?
# Killed, as where the memory of this node runs out, it could not have the job go on.
[ $status -le 128 ] || deaf "$1" -m launch.allocation --killed $status "${@:4}"
exit $status
"""


def option(key: str, value: str) -> str:
    """As a command of Slurm takes it; an empty value stands for none."""
    return f"--{key}={value}" if value else f"--{key}"
