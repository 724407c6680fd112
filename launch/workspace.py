"""The code that travels with a job: this checkout, less what .torchxignore names, and its size.

TorchX copies every file that is not ignored, whatever its size; a forgotten data set or checkpoint would be copied with
each job, so a limit refuses it and names the folders that weigh most.
"""

import filecmp
from collections import Counter
from pathlib import Path

import fsspec
from torchx.workspace.api import walk_workspace

ROOT = Path(__file__).resolve().parents[1]
"""The folder of this checkout."""

LIMIT_MIB = 64


def workspace_size(root: Path) -> Counter[str]:
    """Bytes of each entry of `root` that would be copied with a job."""
    sizes: Counter[str] = Counter()
    for folder, _, files in walk_workspace(fsspec.filesystem("file"), str(root)):
        relative = Path(folder).relative_to(root)
        for name, info in files.items():
            entry = relative.parts[0] if relative.parts else name
            sizes[entry] += int(str(info["size"]))
    return sizes


def check_workspace(root: Path, *, limit_mib: int = LIMIT_MIB) -> float:
    """Size of the job's code in MiB.

    Raises:
        ValueError: it is above the limit; names the largest entries.
    """
    sizes = workspace_size(root)
    total_mib = sizes.total() / 2**20
    if total_mib > limit_mib:
        largest = ", ".join(f"{entry} {size / 2**20:.0f} MiB" for entry, size in sizes.most_common(3))
        raise ValueError(
            f"the code to copy with the job is {total_mib:.0f} MiB, the limit is {limit_mib} ({largest}): "
            "name what is not code in .torchxignore"
        )
    return total_mib


def share_with_older(copy: Path) -> None:
    """Let files of a new copy of the code that are as in the newest copy beside it be the same files (hard links), so
    that a run's many jobs take the room of one; where the file system has no links, copies stay copies."""
    copies = sorted(folder for folder in copy.parent.iterdir() if folder.is_dir() and folder <= copy)
    if len(copies) < 2:
        return
    older, link = copies[-2], copy / ".link"
    for file in [path for path in copy.rglob("*") if path.is_file() and not path.is_symlink()]:
        known = older / file.relative_to(copy)
        if known.is_symlink() or not known.is_file() or not filecmp.cmp(file, known, shallow=False):
            continue
        try:
            link.hardlink_to(known)
        except OSError:
            return
        link.replace(file)


def travels(folder: Path) -> bool:
    """Whether a folder of the checkout is copied with a job."""
    return any(
        Path(copied).is_relative_to(folder) and files
        for copied, _, files in walk_workspace(fsspec.filesystem("file"), str(ROOT))
    )
