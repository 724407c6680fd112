"""File systems in files, through loop devices: disks that may be filled, struck and copied.  Mounting needs root."""

import errno
import os
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PATIENCE_S = 10.0
"""How long processes that end may still use a disk."""
MENDED = 1
"""Exit status of fsck where it has found something and corrected it."""


def run_tool(*command: str) -> None:
    """One of the system's.  Raises CalledProcessError if it fails."""
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


def make_image(path: Path, size: str, kind: str) -> None:
    """An empty file system in a file."""
    run_tool("truncate", "-s", size, str(path))
    run_tool(f"mkfs.{kind}", "-q", str(path))


@contextmanager
def mounted(image: Path, at: Path) -> Iterator[Path]:
    """An image through a loop device for the duration of the block."""
    at.mkdir(exist_ok=True)
    run_tool("mount", "-o", "loop", str(image), str(at))
    try:
        yield at
    finally:
        run_tool("umount", "--lazy", str(at))


class SmallDisk:
    """An ext4 file system that can run full or go read-only, as one with a bad disk does, and is mended."""

    def __init__(self, image: Path, at: Path) -> None:
        """`image` is one of `make_image`, and mounted at `at`."""
        self._image, self.at = image, at
        self._filler = at / "filler"

    def fill(self) -> None:
        """Take all the room that is left, without writing to it."""
        with self._filler.open("ab") as file:
            size, end = os.statvfs(self.at).f_blocks * os.statvfs(self.at).f_frsize, 0
            while size >= os.statvfs(self.at).f_frsize:
                try:
                    os.posix_fallocate(file.fileno(), end, size)
                    end += size
                except OSError as error:
                    if error.errno != errno.ENOSPC:
                        raise
                    size //= 2

    def break_down(self) -> None:
        """Let the kernel find an error in it, at which it takes no more writes, those under way included."""
        mounts = [line.split() for line in Path("/proc/mounts").read_text().splitlines()]
        device = next(mount[0] for mount in mounts if mount[1] == str(self.at))
        Path("/sys/fs/ext4", Path(device).name, "trigger_fs_error").write_text("1")

    def mend(self) -> None:
        """As after a restart of the machine; nothing may use it for long."""
        deadline = time.monotonic() + PATIENCE_S
        while subprocess.run(["umount", str(self.at)], stderr=subprocess.DEVNULL, check=False).returncode:
            assert time.monotonic() < deadline, f"{self.at} is in use"
            time.sleep(0.1)
        # A container that began meanwhile has a copy of the mounts: as long as that lives it is the same file system
        # that would be mounted again, broken as it is.
        while subprocess.run(["losetup", "-j", str(self._image)], check=True, capture_output=True).stdout:
            assert time.monotonic() < deadline, f"{self._image} is mounted elsewhere: try `unshare --mount` before it"
            time.sleep(0.1)
        checked = subprocess.run(["fsck.ext4", "-p", str(self._image)], stdout=subprocess.DEVNULL, check=False)
        assert checked.returncode <= MENDED, f"{self._image} cannot be mended"
        run_tool("mount", "-o", "loop,errors=remount-ro", str(self._image), str(self.at))
        self._filler.unlink(missing_ok=True)


@contextmanager
def small_disk(folder: Path, size: str) -> Iterator[SmallDisk | None]:
    """A disk in `folder` for the duration of the block; None where this process may not mount one."""
    if os.geteuid() != 0 or not Path("/sys/fs/ext4").is_dir():
        yield None
        return
    make_image(folder / "disk.img", size, "ext4")
    with mounted(folder / "disk.img", folder / "disk") as at:
        disk = SmallDisk(folder / "disk.img", at)
        disk.mend()
        yield disk
