"""Session-wide set-up: without a GPU, Triton kernels run in the interpreter, chosen before Triton is imported; what
goes to one process where tests run in several; commands that a test writes itself.
"""

import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

# Tests that nohup started hear what others hear.
signal.signal(signal.SIGHUP, signal.SIG_DFL)

if not any(Path("/dev").glob("nvidia[0-9]*")):
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Where tests run in several processes, a module is one's, and so are all that start this machine's Slurm."""
    functions = [item for item in items if isinstance(item, pytest.Function)]
    slurm = {function.path for function in functions if "running_cluster" in function.fixturenames}
    for item in items:
        item.add_marker(pytest.mark.xdist_group("slurm" if item.path in slurm else str(item.path)))


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
