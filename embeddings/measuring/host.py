"""The memory of the machine that this process runs on, as far as its control groups let it (containers, Slurm)."""

import math
import os
from collections.abc import Iterator
from pathlib import Path

_OWN, _ROOT = Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")
_NAMES = (
    ("memory.max", "memory.current", ("inactive_file", "active_file")),
    ("memory.limit_in_bytes", "memory.usage_in_bytes", ("total_inactive_file", "total_active_file")),
)
"""Files of a group's limit and use, and entries of its `memory.stat` that count what is cached of files, by version of
Linux's control groups."""


def host_memory_gib(processes: int, own: Path = _OWN, root: Path = _ROOT) -> float:
    """GiB of host memory for each of so many processes of this node: the machine's, or less where a group has less.

    Rounded down to a quarter of a GiB, so that nodes of one type, which differ by a few pages, plan alike.
    """
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    total = min([total, *(limit for limit, _ in _limits(own, root))])
    return max(math.floor(4 * total / processes / 2**30) / 4, 0.25)


def free_memory(own: Path = _OWN, root: Path = _ROOT) -> int:
    """Bytes that this process can have without swapping, or being killed for it; caches of files make room."""
    with open("/proc/meminfo") as file:
        free = next(int(line.split()[1]) * 1024 for line in file if line.startswith("MemAvailable:"))
    return max(0, min([free, *(limit - used for limit, used in _limits(own, root))]))


def _limits(own: Path, root: Path) -> Iterator[tuple[int, int]]:
    """(limit, what is used of it and must stay), bytes, of every group that limits this process's memory.

    `own` names the process's group by the path from `root`, in a container perhaps by one that is not to be seen.
    """
    for line in own.read_text().splitlines() if own.is_file() else ():
        number, controllers, path = line.split(":", 2)
        if number == "0" or "memory" in controllers.split(","):
            group = Path(path.lstrip("/"))
            for folder in (group, *group.parents):
                yield from _limit(root / ("" if number == "0" else "memory") / folder)


def _limit(folder: Path) -> Iterator[tuple[int, int]]:
    for limit, used, cached in _NAMES:
        try:
            most, now = (folder / limit).read_text().strip(), int((folder / used).read_text())
            entries = dict(entry.split() for entry in (folder / "memory.stat").read_text().splitlines())
        except OSError:
            continue
        if most.isdigit():
            yield int(most), now - sum(int(entries.get(name, 0)) for name in cached)
