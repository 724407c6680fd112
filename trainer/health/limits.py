"""Limits of the system (`ulimit`): raised as far as allowed, and reported before work begins if they are too low.

Slurm's jobs inherit those of the login shell that sent them.  Standard library only: with too few threads allowed,
NumPy cannot be imported.
"""

import os
import resource
import socket
from pathlib import Path

OPEN_FILES = 128
"""What a process may have open besides its connections: devices, data, logs, checkpoints (27 were seen on a CPU)."""
CONNECTIONS_A_RANK = 4
"""The store's and those of groups of processes, of which a process may have one to each rank."""
THREADS_A_PROCESS = 64
"""Threads of a process that trains, its readers and its writer (17 were seen, with one thread a process for
arithmetic)."""


def raise_limits(*, ranks: int, processes: int) -> None:
    """Let this process and those that it starts have all open files and threads that the system allows.

    Args:
        ranks: processes of the whole job.
        processes: those of this machine that have yet to start their threads.

    Raises:
        OSError: these are too few; names the limit, the need and the fix.
    """
    files = _raised(resource.RLIMIT_NOFILE)
    needed = OPEN_FILES + CONNECTIONS_A_RANK * ranks
    if files < needed:
        raise OSError(
            f"{socket.gethostname()} lets a process have {files} files and connections open, one of {ranks} ranks may "
            f"need {needed}: have the hard limit raised (ulimit -Hn, /etc/security/limits.conf)"
        )
    threads, needed = _raised(resource.RLIMIT_NPROC), THREADS_A_PROCESS * processes
    # The superuser is exempt.
    if os.geteuid() != 0 and threads - threads_of_user() < needed:
        raise OSError(
            f"{socket.gethostname()} lets you have {threads} processes and threads, of which {threads_of_user()} are "
            f"there, and {processes} ranks need some {needed}: have the hard limit raised (ulimit -Hu)"
        )


def threads_of_user() -> int:
    """Threads on this machine of the user of this process, as far as they may be seen."""
    own, count = f"Uid:\t{os.getuid()}\t", 0
    for process in Path("/proc").glob("[0-9]*/status"):
        try:
            status = process.read_text()
        except OSError:
            continue
        if own in status:
            count += int(status.partition("Threads:")[2].split()[0])
    return count


def _raised(limit: int) -> float:
    _, most = resource.getrlimit(limit)
    resource.setrlimit(limit, (most, most))
    return float("inf") if most == resource.RLIM_INFINITY else most
