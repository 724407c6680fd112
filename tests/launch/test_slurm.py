"""Slurm's requests as sbatch and a shell would read them."""

import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from embeddings.hardware import NODES
from launch.schedulers.slurm import OURS, SlurmRequest
from launch.submit import check, connected
from launch.workspace import ROOT
from tests.launch.test_component import request

LISTENS = "-c " + shlex.quote(
    f"""import sys, time
sys.path.insert(0, {str(ROOT)!r})
from launch import signals
time.sleep(0.3)
signals.hold()
sys.exit(3 if signals.next_signal(20.0) == int(sys.argv[1]) else 9)"""
)
"""Arguments of Python that wait for a signal as a job does, some time after their start."""


def _script(**changes: Any) -> str:
    with connected("slurm") as connection:
        asked = request(**changes)
        return str(connection.dry_run(asked, check(connection.scheduler, asked)))


def _options(script: str) -> list[str]:
    return [line.removeprefix("#SBATCH ") for line in script.splitlines() if line.startswith("#SBATCH")]


@pytest.mark.parametrize("name", NODES)
@pytest.mark.parametrize("nodes", [1, 200])
def test_a_job_of_any_size_is_one_job_of_whole_machines(name: str, nodes: int) -> None:
    machine = NODES[name]
    script = _script(machine=name, nodes=nodes, procs_per_node=machine.gpus or machine.cpus)
    options = _options(script)
    assert {f"--nodes={nodes}", "--ntasks-per-node=1", "--exclusive", "--requeue"} <= set(options)
    assert f"--cpus-per-task={machine.cpus}" in options
    assert [option for option in options if "gpu" in option] == [f"--gpus-per-node={machine.gpus}"] * bool(machine.gpus)
    assert script.count("launch.node") == 1
    assert "hetjob" not in script


def test_a_node_reads_its_number_and_the_first_nodes_name() -> None:
    script = _script()
    assert "--node-rank SLURM_NODEID --first-node-variable TORCHX_RANK0_HOST" in script
    assert "--job-name=kuairand-sample-demo" in script
    assert f"cd {Path('/runs/demo/jobs/DRY-RUN')} || lacks 'folder /runs/demo/jobs/DRY-RUN: keep --run-dir on" in script


def test_without_a_machine_a_job_asks_for_cores_only() -> None:
    options = _options(_script(machine=None, nodes=1, procs_per_node=2))
    assert "--cpus-per-task=2" in options
    assert not [option for option in options if "mem" in option or "gpu" in option or "exclusive" in option]


def test_any_option_of_sbatch_passes_and_takes_the_place_of_ours() -> None:
    asked = ["account=abc", "qos=high", "exclude=n[7-9]", "signal=B:USR1@60", "comment=a b#c", "gres=gpu:h100:8"]
    options = _options(_script(options=[*asked, "no-requeue=", "mem=0", "cpus_per_task=16"]))
    assert {"--account=abc", "--qos=high", "--exclude='n[7-9]'", "--signal=B:USR1@60", "--comment='a b#c'"} <= set(
        options
    )
    assert {"--gres=gpu:h100:8", "--no-requeue", "--mem=0", "--cpus-per-task=16"} <= set(options)
    assert {option.partition("=")[0] for option in options}.isdisjoint({"--requeue", "--gpus-per-node"})


def test_when_a_job_may_start_is_not_asked_of_its_successors() -> None:
    script = _script(options=["hold=", "begin=now+1hour", "account=abc"])
    assert script.splitlines()[0].startswith("sbatch --parsable --hold --begin=now+1hour ")
    assert {option.partition("=")[0] for option in _options(script)}.isdisjoint({"--hold", "--begin"})
    assert "--account=abc" in _options(script)


@pytest.mark.parametrize("key", OURS)
def test_options_that_the_job_sets_are_refused(key: str) -> None:
    with pytest.raises(ValueError, match=f"--option {key}=1: the job sets sbatch's --{key} itself"):
        _script(options=[f"{key}=1"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"options": ["p=main"]}, "--option p=main: give the long name"),
        ({"options": ["comment=a\nb"]}, "--option comment: its value must be one line"),
        ({"options": ["main"]}, "--option 'main' is not KEY=VALUE"),
        ({"image": "i"}, "--image has no effect with scheduler slurm"),
        ({"mounts": ["/a:/b"]}, "--mount has no effect with scheduler slurm"),
        ({"machine": "cpu-2"}, "--procs-per-node 8 on machine cpu-2, which has 2 cores"),
    ],
)
def test_impossible_requests_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _script(**changes)


def test_what_the_user_typed_arrives_as_typed(tmp_path: Path) -> None:
    """The script's command, read by a shell, is the argument list of the component."""
    typed = ["name=a b$(c)", "data.path=${app_id} $HOME 'q' \"r\" \\ `d` \u00fc", "data.path=$$"]
    (line,) = re.findall("^set -- (.*)$", _script(overrides=typed, run_dir=Path("/runs/$HOME x")), flags=re.MULTILINE)
    shown = subprocess.run(["/bin/sh", "-c", f"printf '%s\\0' {line}"], capture_output=True, text=True, check=True)
    words = shown.stdout.split("\0")
    assert [words[i + 1] for i, word in enumerate(words) if word == "--set"] == typed
    assert [words[i + 1] for i, word in enumerate(words) if word == "--run-dir"] == ["/runs/$HOME x"] * 2


@pytest.mark.parametrize(
    ("command", "status", "told"),
    [
        ("exit 4", 4, ""),
        # Slurm may tell the shell alone, --signal=B:USR1@600, or all, and before anything listens.
        (f"kill -USR1 $PPID $$; exec {sys.executable} {LISTENS} {signal.SIGUSR1:d}", 3, ""),
        (f"kill -TERM $PPID $$; exec {sys.executable} {LISTENS} {signal.SIGTERM:d}", 3, ""),
        ("kill -KILL $$", 5, "-m launch.allocation --killed 137 --run-dir /r/a b -- python"),
    ],
)
def test_the_script_passes_on_signals_and_outlives_what_it_runs(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    commands: Callable[..., None],
    command: str,
    status: int,
    told: str,
) -> None:
    # A user's own file, which a shell without -p would obey.
    (tmp_path / "bashrc").write_text("exit 0")
    monkeypatch.setenv("BASH_ENV", str(tmp_path / "bashrc"))
    commands(
        interpreter=f"""case "$*" in "-m launch.environment") kill -USR1 $$ ;;
        *--killed*) echo "$*" > {tmp_path}/told; exit 5 ;; *) {command} ;; esac"""
    )
    words = ("interpreter", "-m", "launch.allocation", "--run-dir", "/r/a b", "--", "python")
    folder = str(tmp_path)
    asked = SlurmRequest(job_dir=folder, options={}, environment={}, commands=(words,), job_dirs=(folder,))
    script = tmp_path / "job.sh"
    script.write_text(asked.script())
    script.chmod(0o755)
    assert subprocess.run([script], check=False, timeout=30).returncode == status
    assert (tmp_path / "told").exists() == bool(told)
    assert not told or (tmp_path / "told").read_text() == f"{told}\n"


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"machine": None, "procs_per_node": 2}, True),
        ({"machine": None, "options": ["partition=gpu", "gres=disk:1"]}, True),
        ({"machine": None, "options": ["gres=gpu:8"]}, False),
        ({"machine": "h100-8"}, False),
        ({"machine": "cpu-2", "procs_per_node": 2}, False),
    ],
)
def test_a_job_that_asks_for_no_gpu_says_so(
    caplog: pytest.LogCaptureFixture, changes: dict[str, Any], *, says: bool
) -> None:
    _script(**changes)
    assert ("no GPU: where nodes have GPUs, name their type with --machine" in caplog.text) == says
