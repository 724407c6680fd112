"""Debian 13 in a folder, for its Slurm 24.11: made once by debootstrap, kept in the user's cache.

Its programs run in a mount namespace in which /usr is Debian 13's and all else this machine's: its Slurm then starts
this checkout's jobs, with this machine's interpreter.
"""

import os
import shutil
import subprocess
from pathlib import Path

FOLDER = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"), "longview", "debian-13")
"""Where it is kept: 400 MiB."""
FAILED = FOLDER.with_name("debian-13.failed")
"""Why it could not be made the last time."""
MIRROR = "http://deb.debian.org/debian"
# Python for the libraries that another interpreter needs, such as libffi and OpenSSL.
PACKAGES = ("slurm-wlm", "munge", "python3")
TIMEOUT_S = 900


def make() -> None:
    """Make the folder, if it does not exist.

    Raises:
        RuntimeError: it cannot be made; says why, as `reason_for_none` does from then on.
    """
    if FOLDER.is_dir():
        return
    FOLDER.parent.mkdir(parents=True, exist_ok=True)
    partial = FOLDER.with_name("debian-13.partial")
    shutil.rmtree(partial, ignore_errors=True)
    command = ["debootstrap", "--variant=minbase", f"--include={','.join(PACKAGES)}", "trixie", str(partial), MIRROR]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
        words = [line for line in (done.stdout + done.stderr).splitlines() if line.startswith("E:")]
        reason = "" if done.returncode == 0 else " ".join(words) or f"exit status {done.returncode}"
    except (OSError, subprocess.TimeoutExpired) as error:
        reason = str(error)
    if reason:
        shutil.rmtree(partial, ignore_errors=True)
        FAILED.write_text(reason)
        raise RuntimeError(f"Debian 13 cannot be made in {FOLDER}: {reason}")
    partial.rename(FOLDER)
    FAILED.unlink(missing_ok=True)


def reason_for_none() -> str:
    """Why there is no Debian 13 here; empty where there is."""
    if FOLDER.is_dir():
        return ""
    why = FAILED.read_text() if FAILED.is_file() else "nobody has tried"
    return f"no Slurm 24.11: Debian 13 is not in {FOLDER} ({why}): python -m tests.support.slurm install"


def mounts(system: Path) -> list[str]:
    """The shell's commands that put a system's /usr in the place of this machine's, in a namespace."""
    # What is installed here by hand stays; a recursive bind takes it along.
    return [f"mount --bind /usr/local '{system}/usr/local'", f"mount --rbind '{system}/usr' /usr"]
