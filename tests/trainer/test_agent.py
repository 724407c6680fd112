"""torchrun with its failures in a line."""

import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.parametrize(
    ("end", "message"),
    [
        ("sys.exit('error: no luck')", "rank 1 failed: it ended with status 1"),
        ("os.kill(os.getpid(), signal.SIGKILL)", "rank 1 failed: it was ended by SIGKILL"),
    ],
)
def test_a_failure_names_the_rank_without_a_traceback(tmp_path: Path, end: str, message: str) -> None:
    script = tmp_path / "job.py"
    script.write_text(f"import os, signal, sys, time\nif os.environ['RANK'] == '1':\n    {end}\ntime.sleep(60)\n")
    command = [sys.executable, "-m", "trainer.agent", "--standalone", "--nproc-per-node=2", str(script)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == message
    assert "Traceback" not in done.stderr
