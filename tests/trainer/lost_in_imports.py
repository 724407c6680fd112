"""The trainer, whose rank 1 strikes itself with the signal LOST_BY before it has imported torch.

The other looks after it sooner than it does elsewhere.
"""

import os
import sys

from trainer import stop_signal, stopped
from trainer.__main__ import app
from trainer.command_line import run_command

if __name__ == "__main__":
    stop_signal.LOOK_S, stopped.LOOKS = 0.1, 3
    stop_signal.STOP.listen()
    if os.environ["RANK"] == "1":
        os.kill(os.getpid(), int(os.environ["LOST_BY"]))
    sys.exit(run_command(app, sys.argv[1:]))
