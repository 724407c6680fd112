"""Where reader processes come from: a server process that has imported what they need, and has no threads, forks them.

Not this process, whose CUDA and communication threads do not survive that.  Standard library only: the server imports
torch beside a process that asks for it before its own imports.
"""

import multiprocessing
import signal
from multiprocessing import forkserver, resource_tracker
from multiprocessing.context import ForkServerContext


def reader_server() -> ForkServerContext:
    """Starts readers; the first call starts the server and does not wait for it.

    SIGINT, SIGTERM and SIGUSR1 do not reach the readers, though shells and schedulers send them to all processes of a
    job: the trainer still needs batches until it has saved its state, and then ends them.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["pipelines.reading.reader"])
    asking = {signal.SIGINT, signal.SIGTERM, signal.SIGUSR1}
    # What is started below, and what it forks, inherits the mask.
    previous = signal.pthread_sigmask(signal.SIG_BLOCK, asking)
    try:
        # Starts a helper process and unblocks two of the signals, so it comes first.
        resource_tracker.ensure_running()
        signal.pthread_sigmask(signal.SIG_BLOCK, asking)
        forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, previous)
    return context
