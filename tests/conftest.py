"""Session-wide set-up: without a GPU, Triton kernels run in the interpreter, chosen before Triton is imported; what
goes to one process where tests run in several; commands that a test writes itself.
"""

import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from xdist.remote import Producer
from xdist.scheduler import LoadFileScheduling

# Tests that nohup started hear what others hear.
signal.signal(signal.SIGHUP, signal.SIG_DFL)

if not any(Path("/dev").glob("nvidia[0-9]*")):
    os.environ.setdefault("TRITON_INTERPRET", "1")

# Tests run side by side: threads that wait for each other leave the cores to others.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")


class ModulesApart(LoadFileScheduling):
    """A module is one process's, and so are all that start this machine's Slurm: there is one cluster at a time."""

    def _split_scope(self, nodeid: str) -> str:
        folder, _, module = nodeid.split("::")[0].rpartition("/")
        return folder if folder.endswith("/on_slurm") else f"{folder}/{module}"


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> ModulesApart:
    """Where tests run in several processes."""
    return ModulesApart(config, log)


@pytest.fixture
def commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Put shell scripts, by name, before everything else that is on the path."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")

    def write(**scripts: str) -> None:
        for name, text in scripts.items():
            (folder / name).write_text(f"#!/bin/sh\n{text}\n")
            (folder / name).chmod(0o755)

    return write
