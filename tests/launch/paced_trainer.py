"""The trainer, no faster than a step every so many seconds: its run then outlasts an allocation on any machine.

python -m tests.launch.paced_trainer SECONDS train RECIPE ...
"""

import sys
import time
from typing import Any

from trainer.command_line import run_command
from trainer.commands import app
from trainer.health.stop_signal import STOP


def main(seconds: float, arguments: list[str]) -> int:
    """Run the trainer's command line; returns its exit status."""
    from trainer.steps.feed import Feed

    real = Feed.__next__

    def after_a_while(feed: Feed) -> Any:
        time.sleep(seconds)
        return real(feed)

    Feed.__next__ = after_a_while  # type: ignore[method-assign]
    return run_command(app, arguments)


if __name__ == "__main__":
    # Before torch is imported, as the trainer does.
    STOP.listen()
    sys.exit(main(float(sys.argv[1]), sys.argv[2:]))
