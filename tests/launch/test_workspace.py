"""The code that travels with a job."""

from pathlib import Path

import pytest

from launch.workspace import ROOT, check_workspace, workspace_size


def test_the_checkout_travels_without_tests_environments_and_runs() -> None:
    entries = set(workspace_size(ROOT))
    assert {"launch", "trainer", "setup.py"} <= entries
    assert entries.isdisjoint({".venv", ".git", "runs", "tests", ".mypy_cache"})
    assert check_workspace(ROOT) < 16


def test_a_large_workspace_is_refused_by_its_largest_entries(tmp_path: Path) -> None:
    (tmp_path / "checkpoint").mkdir()
    (tmp_path / "checkpoint" / "table.bin").write_bytes(bytes(3 * 2**20))
    (tmp_path / "code.py").write_text("pass\n")
    with pytest.raises(ValueError, match=r"is 3 MiB, the limit is 1 \(checkpoint 3 MiB.*\.torchxignore"):
        check_workspace(tmp_path, limit_mib=1)
    (tmp_path / ".torchxignore").write_text("checkpoint\n")
    assert check_workspace(tmp_path, limit_mib=1) < 1
