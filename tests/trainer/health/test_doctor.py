"""What the doctor says of this machine, in one line each."""

import subprocess
import sys
from pathlib import Path

import pytest

from trainer.health import doctor
from trainer.health.doctor import look_at_machine, pinned_versions

ROOT = Path(__file__).resolve().parents[3]


def test_a_machine_that_is_fit_gets_a_line_a_matter_and_what_to_type() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "trainer", "doctor"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    lines = done.stdout.splitlines()
    assert done.returncode == int(any(line.startswith("BAD") for line in lines))
    assert all(line[:5] in ("ok   ", "BAD  ") for line in lines)
    assert "python -m launch submit" in lines[-1]


def test_other_versions_than_the_tested_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "pinned_versions", lambda platform_set: {"torch": "0.1", "no-such-package": "7"})
    (found,) = (finding for finding in look_at_machine() if not finding.ok)
    assert "torch " in found.text
    assert "(tested: 0.1), no-such-package missing (tested: 7)" in found.text


def test_a_full_shared_memory_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "MIN_SHARED_MIB", 2**40)
    assert any("/dev/shm" in finding.text and not finding.ok for finding in look_at_machine())


@pytest.mark.parametrize("platform_set", ["cpu", "cuda"])
def test_both_sets_name_torch(platform_set: str) -> None:
    assert {"torch", "torchrec", "triton"} <= pinned_versions(platform_set).keys()
