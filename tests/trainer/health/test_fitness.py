"""Each fault of a node, injected alone, is one line that names it; a node without one is fit."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from launch import fit_nodes
from launch.fit_nodes import Unfit, read_answers
from trainer.health import fitness
from trainer.health.fitness import Facts, facts_here, gpu_faults, problems, xid_faults
from trainer.run import late_files

ROOT = Path(__file__).resolve().parents[3]
TOKEN = ".preflight-1-2"


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    (tmp_path / TOKEN).write_text(TOKEN)
    return tmp_path


def _found(first: Facts, here: Facts, run_dir: Path, **changes: Any) -> list[str]:
    arguments: dict[str, Any] = {"data": [str(run_dir)], "procs_per_node": 1}
    return list(problems(first, here, run_dir=run_dir, **(arguments | changes)))


def test_a_node_like_the_first_is_fit(run_dir: Path) -> None:
    here = facts_here(TOKEN)
    assert here.packages.keys() >= {"torch", "numpy"}
    assert _found(here, here, run_dir) == []


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"code": "0"}, "its code in .* is not the first node's"),
        ({"python": "3.9.1"}, r"its Python is 3\.9\.1, the first node's 3\."),
        ({"packages": {"torch": "1.0"}}, r"its torch is 1\.0, the first node's"),
        ({"driver": "NVIDIA 1"}, "its NVIDIA driver is NVIDIA 1, the first node's missing"),
        ({"time": -60.0}, "its clock is 60 s behind the first node's"),
        ({"time": 600.0}, "its clock is 600 s ahead of the first node's"),
    ],
)
def test_what_differs_is_named(run_dir: Path, change: dict[str, Any], words: str) -> None:
    first = facts_here(TOKEN)
    if "time" in change:
        change = {"time": first.time + change["time"]}
    if "packages" in change:
        change = {"packages": first.packages | change["packages"]}
    (found,) = _found(first, replace(first, **change), run_dir)
    assert re.match(words, found)


def test_a_disk_that_is_another_one_is_found_by_a_token(run_dir: Path) -> None:
    here = facts_here(TOKEN)
    (run_dir / TOKEN).write_text("an old one")
    (found,) = _found(here, here, run_dir)
    assert found.startswith("it does not see what the first node has written")


def test_data_that_cannot_be_read_is_named(run_dir: Path) -> None:
    here = facts_here(TOKEN)
    (found,) = _found(here, here, run_dir, data=["/nowhere/data"])
    assert found == "it cannot read the data in /nowhere/data"


@pytest.mark.parametrize("full", ["run directory", "/dev/shm", "temporary folder"])
def test_a_full_disk_is_named(run_dir: Path, monkeypatch: pytest.MonkeyPatch, full: str) -> None:
    places = {"run directory": str(run_dir), "/dev/shm": "/dev/shm", "temporary folder": str(run_dir / "tmp")}
    (run_dir / "tmp").mkdir()
    monkeypatch.setattr(fitness.tempfile, "gettempdir", lambda: places["temporary folder"])
    room = {places[full]: SimpleNamespace(free=0)}
    monkeypatch.setattr(shutil, "disk_usage", lambda path: room.get(str(path), SimpleNamespace(free=2**40)))
    here = facts_here(TOKEN)
    (found,) = _found(here, here, run_dir)
    assert found.startswith(f"its {full} {places[full]} has 0 MiB free")


@pytest.mark.parametrize(
    ("listing", "words"),
    [
        ("0, 0\n1, 0\n", []),
        ("0, [N/A]\n1, [N/A]\n", []),
        (
            "0, 0\n",
            [
                "it has 1 working GPUs for this job, which starts 2 processes there: ask for as many GPUs (launch's "
                "--machine does)"
            ],
        ),
        ("0, 0\n1, 7\n", ["its GPU 1 has 7 uncorrected memory errors: reset or replace it"]),
    ],
)
def test_broken_gpus_are_named(listing: str, words: list[str]) -> None:
    assert list(gpu_faults(listing, 2)) == words


KERNEL_LOG = """\
[    1.000000] NVRM: loading NVIDIA UNIX Open Kernel Module for x86_64  580.1
[ 9000.000000] NVRM: Xid (PCI:0000:1a:00): 31, pid=77, name=python, Ch 00000001, MMU Fault: ENGINE GRAPHICS
[ 9001.500000] NVRM: Xid (PCI:0000:3b:00): 79, pid='<unknown>', name=<unknown>, GPU has fallen off the bus.
[ 9001.600000] NVRM: Xid (PCI:0000:3b:00): 79, pid='<unknown>', name=<unknown>, GPU has fallen off the bus.
[ 9002.000000] something of Xid (PCI:0000:5e:00): 79
"""
FALLEN = "its GPU at 0000:3b:00 has reported Xid 79 (it has fallen off the bus): reset it, or restart the node"


@pytest.mark.parametrize(("uptime_s", "words"), [(9100.0, [FALLEN]), (90000.0, [])])
def test_a_gpu_that_has_reported_a_hardware_fault_is_named(uptime_s: float, words: list[str]) -> None:
    # A program's own fault (31) is none of the node's, and what was long ago has been dealt with.
    assert list(xid_faults(KERNEL_LOG, uptime_s)) == words


@pytest.mark.parametrize("variable", ["HOME", "TRITON_HOME", "TRITON_CACHE_DIR"])
def test_a_folder_for_compiled_kernels_that_cannot_be_made_is_named(
    run_dir: Path, commands: Callable[..., None], monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    """As where nodes lack the home, or have it read-only."""
    commands(**{"nvidia-smi": "echo '0, 0'", "dmesg": ""})
    first = replace(facts_here(TOKEN), driver="NVIDIA 1", packages={"fbgemm-gpu": "1"})
    for name in ("TRITON_HOME", "TRITON_CACHE_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(run_dir))
    assert _found(first, first, run_dir) == []
    # Not even root makes a folder below a file.
    monkeypatch.setenv(variable, str(run_dir / TOKEN / "cache"))
    (found,) = _found(first, first, run_dir)
    assert found.startswith(f"it cannot write compiled kernels to {run_dir / TOKEN}/cache")
    assert found.endswith("set TRITON_CACHE_DIR to a folder that it can write")


def test_a_folder_whose_compiled_kernels_cannot_be_run_is_named(
    run_dir: Path, commands: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    commands(**{"nvidia-smi": "echo '0, 0'", "dmesg": ""})
    first = replace(facts_here(TOKEN), driver="NVIDIA 1", packages={"fbgemm-gpu": "1"})
    monkeypatch.setenv("TRITON_CACHE_DIR", str(run_dir))
    monkeypatch.setattr(os, "statvfs", lambda path: SimpleNamespace(f_flag=os.ST_NOEXEC))
    monkeypatch.setattr(fitness, "_short_of_space", lambda run_dir: ())
    (found,) = _found(first, first, run_dir)
    assert found.startswith(f"it may not run what lies in {run_dir}, which is mounted noexec: set TRITON_CACHE_DIR to")


def test_a_node_without_a_temporary_folder_is_named(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def none() -> str:
        raise FileNotFoundError

    monkeypatch.setattr(fitness.tempfile, "gettempdir", none)
    here = facts_here(TOKEN)
    assert _found(here, here, run_dir) == ["it has no temporary folder that can be written: set TMPDIR to one"]


def test_nodes_with_gpus_ask_the_driver_and_the_kernel(run_dir: Path, commands: Callable[..., None]) -> None:
    stamp = float(Path("/proc/uptime").read_text().split()[0])
    line = f"[{stamp:.6f}] NVRM: Xid (PCI:0000:3b:00): 79, GPU has fallen off the bus."
    commands(**{"nvidia-smi": "echo '0, 0'; echo '1, 3'", "dmesg": f"echo '{line}'"})
    first = replace(facts_here(TOKEN), driver="NVIDIA 1", packages={"fbgemm-gpu": "1"})
    broken = "its GPU 1 has 3 uncorrected memory errors: reset or replace it"
    assert _found(first, first, run_dir, procs_per_node=2) == [broken, FALLEN]
    # The version set for CPUs needs none.
    for_cpus = replace(first, packages={"fbgemm-gpu-cpu": "1"})
    assert _found(for_cpus, for_cpus, run_dir, procs_per_node=2) == []
    # A job that has not asked for any sees none.
    commands(**{"nvidia-smi": "echo No devices were found; exit 6", "dmesg": "exit 1"})
    (none,) = _found(first, first, run_dir, procs_per_node=2)
    assert none.startswith("it has 0 working GPUs for this job, which starts 2 processes there: ask for as many GPUs")


def test_the_code_is_told_by_its_content(tmp_path: Path) -> None:
    (tmp_path / "launch").mkdir()
    (tmp_path / "launch" / "a.py").write_text("x = 1")
    before = fitness.code_digest(tmp_path)
    (tmp_path / "launch" / "a.py").write_text("x = 2")
    assert fitness.code_digest(tmp_path) != before


def test_a_node_answers_in_a_line_without_torch_or_torchx(run_dir: Path) -> None:
    first = json.dumps({**json.loads(fitness.as_argument(facts_here(TOKEN))), "python": "2.7"})
    block = "import sys, runpy\nfor name in ('torch', 'torchx', 'typer'): sys.modules[name] = None\n"
    block += "runpy.run_module('trainer.health.fitness', run_name='__main__')"
    arguments = ["--as", first, "--run-dir", str(run_dir), "--procs-per-node", "1"]
    done = subprocess.run(
        [sys.executable, "-c", block, *arguments], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1, done.stderr
    (answer,) = read_answers(done.stdout, [json.loads(done.stdout)["node"]])
    assert answer.answers and "the first node's 2.7" in answer.why


def test_nodes_that_say_nothing_are_not_fit() -> None:
    words = '{"node": "a", "problems": []}\n{"node": "b", "problems": ["x", "y"]}\n'
    words += "srun: error: c: task 2: Exited\nerror: node c has no folder /r\nsrun: error: d: task 3: Killed\n"
    assert read_answers(words, ["a", "b", "c", "d", "e"]) == [
        Unfit("b", "node b: x; y", answers=True),
        Unfit("c", "node c has no folder /r", answers=True),
        Unfit("d", "node d does not answer: srun: error: d: task 3: Killed", answers=False),
        Unfit("e", "node e does not answer", answers=False),
    ]
    image = "slurmstepd{}: error: pyxis: failed\nslurmstepd{}: error: pyxis:     [ERROR] No such file: /i\n"
    for of_node, why in (("", True), ("-a", True), ("-b", False)):
        words = f"{image.format(of_node, of_node)}srun: error: a: task 0: Exited\n"
        told = "pyxis:     [ERROR] No such file: /i" if why else "srun: error: a: task 0: Exited"
        assert read_answers(words, ["a"]) == [Unfit("a", f"node a does not answer: {told}", answers=False)]
    step = "srun: fatal: SLURM_MEM_PER_CPU and SLURM_MEM_PER_NODE are mutually exclusive."
    assert read_answers(step, ["a"]) == [Unfit("a", f"node a does not answer: {step}", answers=False)]


def test_a_node_that_cannot_reach_the_first_one_says_so() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        place = f"127.0.0.1:{server.getsockname()[1]}"
        assert list(fitness.out_of_reach(place)) == []
    (blocked,) = fitness.out_of_reach(place)
    assert blocked.startswith(
        f"it cannot reach the first node at 127.0.0.1, port {place.partition(':')[2]} (Connection"
    )
    (unknown,) = fitness.out_of_reach("node.invalid:1")
    assert unknown.startswith("it cannot reach the first node at node.invalid, port 1 (")


def test_a_checkpoint_that_a_file_system_shows_late_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    complete = tmp_path / "checkpoints" / "step-00000020" / "COMPLETE"
    waited: list[float] = []
    made: dict[int, Callable[[], None]] = {2: complete.parent.mkdir, 4: complete.touch}

    def sleep(seconds: float) -> None:
        waited.append(seconds)
        if len(waited) in made:
            made[len(waited)]()

    monkeypatch.setattr(late_files, "time", SimpleNamespace(monotonic=lambda: float(len(waited)), sleep=sleep))
    complete.parent.parent.mkdir()
    assert list(fitness.unseen(complete)) == []
    assert len(waited) == 4
    waited.clear()
    made.clear()
    complete.unlink()
    (words,) = fitness.unseen(complete)
    assert words.startswith(f"it does not see the newest checkpoint, {complete.parent}: put it on a file system")
    assert late_files.LAG_S < len(waited) < fit_nodes.PATIENCE_S
