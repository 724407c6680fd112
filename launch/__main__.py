"""The launcher's command line.  Needs torchx and typer, not torch.

    python -m launch submit RECIPE --scheduler NAME --nodes N --procs-per-node P [--dry-run] [--run-dir DIR] [--set ...]
    python -m launch sweep RECIPE --set KEY=V1,V2 ...      (and the options of submit)
    python -m launch status|logs|cancel HANDLE
    python -m launch list|doctor --scheduler NAME

`submit` checks the recipe and its overrides here, before anything is sent; its last line is the job's handle.  On
local_cwd it shows the job until its end.  Exit status: 0 done, 1 failed, 2 wrong use, 3 stopped in good order (the same
command goes on).
"""

import signal
import sys

from trainer.health.output import outlive_output


def main(arguments: list[str]) -> int:
    """Run a command; returns its exit status."""
    if arguments[:1] in (["submit"], ["sweep"]):
        outlive_output()
    # The imports take a third of a second, in which nothing has happened yet: Ctrl-C ends them without a word.
    interrupted = signal.signal(signal.SIGINT, signal.SIG_DFL)
    from launch.commands import app, show_own_messages
    from trainer.command_line import run_command

    signal.signal(signal.SIGINT, interrupted)
    show_own_messages()
    return run_command(app, arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
