"""The trainer's command line, which the last rank was given otherwise: OTHERWISE="OLD -> NEW" in its arguments."""

import os
import sys

from trainer.command_line import run_command
from trainer.commands import app

if __name__ == "__main__":
    arguments = sys.argv[1:]
    if int(os.environ["RANK"]) == int(os.environ["WORLD_SIZE"]) - 1:
        old, new = os.environ["OTHERWISE"].split(" -> ")
        arguments = [new if argument == old else argument for argument in arguments]
    sys.exit(run_command(app, arguments))
