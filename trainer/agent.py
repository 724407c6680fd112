"""torchrun with its failures in a line: `python -m trainer.agent` takes torchrun's arguments.

torchrun ends a failed job with a traceback of its own and a table, some sixty lines under which the process's own
message is lost.  The processes have said what was wrong; this says which one failed first, and how.
"""

import signal
import sys
from collections.abc import Sequence

from torch.distributed import run as torchrun
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError


def main(arguments: Sequence[str]) -> int:
    """Run the job's processes on this node; returns the exit status."""
    try:
        torchrun.main(list(arguments))
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        code = failure.exitcode
        how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with status {code}"
        print(f"rank {rank} failed: it {how}", file=sys.stderr)
        return 1
    except SignalException as error:
        print(f"stopped by {signal.Signals(error.sigval).name}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
