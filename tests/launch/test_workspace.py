"""The code that travels with a job."""

import errno
import os
from pathlib import Path

import pytest

from launch.workspace import ROOT, check_workspace, share_with_older, workspace_size


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


@pytest.mark.parametrize("links", [True, False])
def test_copies_of_the_same_code_take_the_room_of_one(
    links: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And each stays what was copied, where there are no hard links as well."""
    if not links:
        monkeypatch.setattr(os, "link", _no_links)
    code = {"setup.py": "same", "launch/node.py": "same", "launch/other.py": "new"}
    older = code | {"launch/other.py": "old", "launch/gone.py": "gone"}
    for name, files in (("20261129-100000-aaaa", older), ("20261129-110000-bbbb", code)):
        for path, text in files.items():
            (tmp_path / name / path).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name / path).write_text(text)
        share_with_older(tmp_path / name)
    copies = [tmp_path / "20261129-100000-aaaa", tmp_path / "20261129-110000-bbbb"]
    for copy, files in zip(copies, (older, code), strict=True):
        assert {str(path.relative_to(copy)): path.read_text() for path in copy.rglob("*") if path.is_file()} == files
    shared = {path for path in code if (copies[0] / path).samefile(copies[1] / path)}
    assert shared == ({"setup.py", "launch/node.py"} if links else set())


def _no_links(*arguments: object) -> None:
    raise OSError(errno.EPERM, os.strerror(errno.EPERM))
