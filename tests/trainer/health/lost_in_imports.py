"""The trainer, whose rank 1 is lost before it has imported torch: by the signal LOST_BY, before it has started a guard,
or, where that is no number, because an import never ends.

Guards look after ranks sooner than they do elsewhere.
"""

import os
import sys
import threading

from trainer.command_line import run_command
from trainer.commands import app
from trainer.health import stopped
from trainer.health.guard import GUARD
from trainer.health.stop_signal import STOP


class NeverFound:
    """Hangs in place of finding the module."""

    @staticmethod
    def find_spec(name: str, path: object = None, target: object = None) -> None:
        if name == "trainer.jobs.train":
            threading.Event().wait()


if __name__ == "__main__":
    stopped.LOOK_S, stopped.LOOKS = 0.1, 3
    STOP.listen()
    lost_by = os.environ["LOST_BY"]
    if os.environ["RANK"] == "1":
        if lost_by.isdigit():
            os.kill(os.getpid(), int(lost_by))
        sys.meta_path.insert(0, NeverFound)
    GUARD.start()
    sys.exit(run_command(app, sys.argv[1:]))
