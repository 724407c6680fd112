"""Host memory as the machine or the groups of this process limit it."""

from pathlib import Path

import pytest

from embeddings.measuring.host import free_memory, host_memory_gib

GIB = 2**30


def groups(root: Path, version: int, limits: dict[str, str], seen_as: str = "job/step") -> tuple[Path, Path]:
    """A tree of groups with these limits by path, each with 1 GiB in use, half of which is files' cache: the arguments
    of a process that is said to be in `seen_as`."""
    limit, used, prefix = {
        1: ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_"),
        2: ("memory.max", "memory.current", ""),
    }[version]
    for path, text in limits.items():
        folder = root / ("memory" if version == 1 else "") / path
        folder.mkdir(parents=True, exist_ok=True)
        (folder / limit).write_text(f"{text}\n")
        (folder / used).write_text(f"{GIB}\n")
        (folder / "memory.stat").write_text(
            f"{prefix}inactive_file {GIB // 4}\n{prefix}active_file {GIB // 4}\nanon 1\n"
        )
    own = root / "own"
    own.write_text(f"5:cpu,memory:/{seen_as}\n1:name=systemd:/\n" if version == 1 else f"0::/{seen_as}\n")
    return own, root


def test_memory_is_the_machines_where_nothing_limits_it(tmp_path: Path) -> None:
    meminfo = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    gib = int(meminfo["MemTotal"].split()[0]) / 2**20
    for own in (tmp_path / "missing", groups(tmp_path, 2, {"job": "max", "job/step": "max"})[0]):
        assert gib - 0.25 <= host_memory_gib(1, own, tmp_path) <= gib
        assert free_memory(own, tmp_path) <= gib * GIB


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize(
    "limits",
    [
        {"job/step": str(2 * GIB), "job": str(3 * GIB)},
        # Slurm limits the job, or the node's processes a level above.
        {"job/step": str(9 * GIB), "job": str(2 * GIB)},
        # A container may see its own group alone, at the root.
        {"": str(2 * GIB)},
    ],
)
def test_the_tightest_group_counts_wherever_it_stands(version: int, limits: dict[str, str], tmp_path: Path) -> None:
    own, root = groups(tmp_path, version, limits)
    assert host_memory_gib(1, own, root) == 2.0
    assert free_memory(own, root) == 2 * GIB - GIB // 2, "what is cached of files makes room"


@pytest.mark.parametrize(("limit", "processes", "gib"), [(2 * GIB, 1, 2.0), (2**31 + 5, 2, 1.0), (GIB, 3, 0.25)])
def test_a_limit_is_shared_by_the_processes_of_a_node(limit: int, processes: int, gib: float, tmp_path: Path) -> None:
    assert host_memory_gib(processes, *groups(tmp_path, 2, {"job": str(limit)})) == gib


def test_what_exceeds_its_limit_has_nothing_left(tmp_path: Path) -> None:
    assert free_memory(*groups(tmp_path, 2, {"job": "1000"})) == 0
