"""The trainer's command line.

    python -m trainer recipes
    python -m trainer train RECIPE [--run-dir DIR] [--plan FILE] [--from-step N] [--init-from DIR]
                                [--init-only NAMES ...] [--profile STEP:COUNT] [--set key=value ...]
    python -m trainer evaluate RUN_DIR [--step N] [--set data.path=DIR ...]
    python -m trainer report RUN_DIR [RUN_DIR ...] [--out FILE]
    python -m trainer checkpoints RUN_DIR [--verify] [--pin N] [--unpin N]
    python -m trainer export RUN_DIR --out DIR [--step N] [--data DIR]
    python -m trainer import DIR --out RUN_DIR [--data DIR]
    python -m trainer plan RECIPE --world-size W [--local-world-size L] [--hbm-gib G] [--host-gib G]
                                [--out FILE] [--like RUN_DIR] [--set key=value ...]
    python -m trainer doctor

`train` is one process when started plainly and joins the job when started by torchrun.  A run directory that holds a
complete checkpoint is resumed.  Exit status: 0 done, 1 failed, 2 wrong use, 3 stopped in good order (the same command
goes on).
"""

import os
import sys

from trainer.health.guard import GUARD
from trainer.health.output import outlive_output
from trainer.health.stop_signal import STOP


def main(arguments: list[str]) -> int:
    """Run a command; returns its exit status."""
    # Before PyTorch is there.  Threads that are done with their part of an operation wait for the others busily, by
    # default so long that steps take many times as long where something else needs the cores; this suffices alone.
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "20000")
    if arguments[:1] in (["train"], ["evaluate"]):
        outlive_output()
        if arguments[:1] == ["train"]:
            STOP.listen()
        GUARD.start()
    # These take a third of a second, in which the process is looked after already.
    from trainer.command_line import run_command
    from trainer.commands import app

    return run_command(app, arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
