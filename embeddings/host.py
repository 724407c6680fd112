"""The memory of the machine that this process runs on."""

import math
import os
from pathlib import Path

_LIMITS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))
"""Where a container's limit stands, by version of Linux's control groups."""


def host_memory_gib(processes: int, limits: tuple[Path, ...] = _LIMITS) -> float:
    """GiB of host memory for each of so many processes of this node: the machine's, or less where a container has less.

    Rounded down to a quarter of a GiB, so that nodes of one type, which differ by a few pages, plan alike.
    """
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for file in limits:
        try:
            text = file.read_text().strip()
        except OSError:
            continue
        if text.isdigit():
            total = min(total, int(text))
    return max(math.floor(4 * total / processes / 2**30) / 4, 0.25)
