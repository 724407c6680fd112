"""Waits for what another node has written, because shared file systems may show it late."""

import time
from collections.abc import Callable

LAG_S = 75.0
"""How long a node may take to see what another has written: clients of NFS ask anew about a folder they know once a
minute (`acdirmax`)."""


def shown(look: Callable[[], bool]) -> bool:
    """Whether this node sees what another one has written, once the file system has had time to show it."""
    deadline = time.monotonic() + LAG_S
    while not look():
        if time.monotonic() > deadline:
            return False
        time.sleep(1.0)
    return True
