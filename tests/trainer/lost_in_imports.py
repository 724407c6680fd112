"""The trainer, whose rank 1 strikes itself with the signal LOST_BY before it has imported torch, nor started its guard.

The other's guard looks after it sooner than it does elsewhere.
"""

import os
import sys

from trainer import stopped
from trainer.__main__ import app
from trainer.command_line import run_command
from trainer.stop_signal import STOP

if __name__ == "__main__":
    stopped.LOOK_S, stopped.LOOKS = 0.1, 3
    STOP.listen()
    if os.environ["RANK"] == "1":
        os.kill(os.getpid(), int(os.environ["LOST_BY"]))
    sys.exit(run_command(app, sys.argv[1:]))
