"""The trainer on machines of which the second rank's has no memory for copies beside the training."""

import os
import sys

from trainer.checkpoint import staging
from trainer.command_line import run_command
from trainer.commands import app

if __name__ == "__main__":
    if os.environ.get("RANK") == "1":
        staging.free_memory = lambda: 2**20
    sys.exit(run_command(app, sys.argv[1:]))
