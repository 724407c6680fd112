"""Limits of open files and threads: raised as far as they may be, and one line where that is too little."""

import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from trainer.health import limits
from trainer.health.limits import THREADS_A_PROCESS, raise_limits

ROOT = Path(__file__).resolve().parents[3]
NODE = ["-m", "launch.node", "--nodes=1", "--procs-per-node=2", "--node-rank=0", "--first-node-variable=X", "--", "-V"]


@pytest.mark.parametrize(
    ("arguments", "status", "ranks"), [(NODE, 5, 2), (["-m", "trainer", "train", "kuairand_sample"], 1, 1)]
)
def test_too_few_open_files_are_one_line(tmp_path: Path, arguments: list[str], status: int, ranks: int) -> None:
    run = [] if arguments is NODE else ["--run-dir", str(tmp_path / "run")]
    command = ["/bin/sh", "-c", 'ulimit -n 40; exec "$@"', "sh", sys.executable, *arguments, *run]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == status, done.stderr
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert f"lets a process have 40 files and connections open, one of {ranks} ranks may need" in line
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(("user", "more", "enough"), [(1000, 2, True), (1000, -1, False), (0, -1, True)])
def test_too_few_threads_are_one_line_for_all_but_the_superuser(
    monkeypatch: pytest.MonkeyPatch, user: int, more: int, enough: bool
) -> None:
    allowed = {resource.RLIMIT_NOFILE: 10**6, resource.RLIMIT_NPROC: 70 + 8 * THREADS_A_PROCESS + more}
    monkeypatch.setattr(resource, "getrlimit", lambda limit: (10, allowed[limit]))
    monkeypatch.setattr(resource, "setrlimit", lambda limit, to: None)
    monkeypatch.setattr(limits, "threads_of_user", lambda: 70)
    monkeypatch.setattr(os, "geteuid", lambda: user)
    if enough:
        raise_limits(ranks=8, processes=8)
    else:
        with pytest.raises(OSError, match=r"of which 70 are there, and 8 ranks need some 512: .*ulimit -Hu"):
            raise_limits(ranks=8, processes=8)


COUNT = """
import os, threading
from trainer.health.limits import threads_of_user
# One that no other process has.
os.setuid(54321)
for _ in range(3):
    threading.Thread(target=threading.Event().wait, daemon=True).start()
print(threads_of_user())
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="becomes another user")
def test_a_users_threads_are_counted() -> None:
    done = subprocess.run([sys.executable, "-c", COUNT], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.stdout == "4\n", done.stderr
