"""A process that trains outlives whoever reads what it says."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
SPEAKS = """
import logging, sys
from trainer.health.output import outlive_output
outlive_output()
logging.basicConfig(filename=sys.argv[1])
for number in range(2):
    print("word", flush=True)
    print("word", file=sys.stderr)
with open(sys.argv[1] + ".work", "w") as file:
    file.write(str(file.fileno()))
"""


def _speak(log: Path, **streams: object) -> "subprocess.CompletedProcess[bytes]":
    return subprocess.run([sys.executable, "-c", SPEAKS, str(log)], cwd=ROOT, check=False, timeout=60, **streams)


@pytest.mark.parametrize("why", ["Broken pipe", "No space left on device"])
def test_words_that_nobody_takes_are_lost_and_the_work_is_done(tmp_path: Path, why: str) -> None:
    if why == "Broken pipe":
        read, write = os.pipe()
        os.close(read)
    else:
        write = os.open("/dev/full", os.O_WRONLY)
    done = _speak(tmp_path / "log", stdout=write, stderr=write)
    os.close(write)
    assert done.returncode == 0 and (tmp_path / "log.work").is_file()
    told = sorted(line.split("this process")[0] for line in (tmp_path / "log").read_text().splitlines() if why in line)
    assert [line.rpartition("the ")[2] for line in told] == ["standard error of ", "standard output of "]


def test_words_that_somebody_takes_arrive(tmp_path: Path) -> None:
    done = _speak(tmp_path / "log", capture_output=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"word\nword\n", b"word\nword\n")


def test_no_file_gets_the_number_of_a_stream_that_was_closed(tmp_path: Path) -> None:
    """What libraries say to the standard error would be written into it."""

    def close() -> None:
        for descriptor in range(3):
            os.close(descriptor)

    assert _speak(tmp_path / "log", preexec_fn=close).returncode == 0
    assert int((tmp_path / "log.work").read_text()) > 2
