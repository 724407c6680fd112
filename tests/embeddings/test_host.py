"""Host memory as a container or the machine limits it."""

from pathlib import Path

import pytest

from embeddings.host import host_memory_gib


def test_memory_is_the_machines_where_nothing_limits_it(tmp_path: Path) -> None:
    meminfo = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    gib = int(meminfo["MemTotal"].split()[0]) / 2**20
    assert gib - 0.25 <= host_memory_gib(1, (tmp_path / "missing",)) <= gib
    (tmp_path / "memory.max").write_text("max\n")
    assert host_memory_gib(1, (tmp_path / "memory.max",)) == host_memory_gib(1, (tmp_path / "missing",))


@pytest.mark.parametrize(("limit", "processes", "gib"), [(2 * 2**30, 1, 2.0), (2**31 + 5, 2, 1.0), (2**30, 3, 0.25)])
def test_a_containers_limit_is_shared_by_its_processes(tmp_path: Path, limit: int, processes: int, gib: float) -> None:
    (tmp_path / "memory.max").write_text(f"{limit}\n")
    assert host_memory_gib(processes, (tmp_path / "memory.max",)) == gib
