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
from launch import records
from launch.environment import FIT
from launch.schedulers.slurm import OURS
from launch.schedulers.slurm_script import SlurmRequest
from launch.submit import check, connected
from launch.sweep import runs_of
from launch.workspace import ROOT
from tests.launch.test_component import request
from trainer.exit_status import WRONG_USE

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


def test_a_sweep_may_start_a_few_runs_at_a_time() -> None:
    base = request(overrides=["seed=0..3"], options=["array=%2"])
    runs = runs_of(base)
    with connected("slurm") as connection:
        script = str(connection.dry_run_of_sweep(runs, base, check(connection.scheduler, runs[0])))
    assert "--array=0-3%2" in _options(script)


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
        ({"options": ["array=%4"]}, "--option array=%4 is for a sweep's many runs"),
        ({"mounts": ["/d:/d"]}, "--mount has no effect with scheduler slurm without --image"),
        ({"options": ["container-name=a"]}, "--option container-name has no effect .* without --image"),
        ({"image": "i", "mounts": ["claim:/d"]}, "--mount claim:/d: on slurm give SRC as an absolute path"),
        ({"image": "i", "run_dir": Path("/runs/a b")}, "--run-dir /runs/a b cannot be mounted in a container"),
        ({"options": ["main"]}, "--option 'main' is not KEY=VALUE"),
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
        interpreter=f"""case "$*" in "-m launch.environment") kill -USR1 $$; exit {FIT} ;;
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


def test_an_interpreter_that_ends_well_whatever_it_has_run_is_refused(
    tmp_path: Path, commands: Callable[..., None]
) -> None:
    """Its failed jobs would count as done."""
    commands(interpreter='echo "$@" >&2; true')
    folder, command = str(tmp_path), ("interpreter", "-m", "launch.allocation")
    asked = SlurmRequest(job_dir=folder, options={}, environment={}, commands=(command,), job_dirs=(folder,))
    done = subprocess.run(["bash", "-c", asked.script()], capture_output=True, text=True, check=False, timeout=30)
    assert (done.returncode, done.stdout) == (WRONG_USE, f"the job ends with status {WRONG_USE}\n")
    error = "error: interpreter ends with 0 whatever it has run: let its last line begin with exec"
    assert done.stderr.splitlines() == ["-m launch.environment", error]


def test_with_an_image_nodes_run_in_it_and_what_talks_to_slurm_outside(
    tmp_path: Path, commands: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(records, "FILE", tmp_path / "jobs.jsonl")
    commands(sbatch="echo 17")
    run_dir = tmp_path / "first"
    options = ["container-writable=", "no-container-mount-home=", "account=abc"]
    asked = request(image="reg#a/b:1", mounts=["/d:/d", "/s:/x:ro"], options=options, run_dir=run_dir, python="python3")
    with connected("slurm") as connection:
        # Sent, for TorchX names another image than asked for then.
        record = connection.submit(asked, check(connection.scheduler, asked))
    script = Path(record.job_dir, "job.sh").read_text()
    assert "container" not in " ".join(_options(script))
    assert "container" not in _script()
    assert f"(deaf {sys.executable} -m launch.environment torchx typer)" in script
    (line,) = re.findall("^set -- (.*)$", script, flags=re.MULTILINE)
    words = shlex.split(line)
    outside, inside = words[: words.index("--")], words[words.index("--") + 1 :]
    assert (outside[0], inside[0]) == (sys.executable, "python3")
    assert [word.removeprefix("--step-option=") for word in outside if word.startswith("--step-option=")] == [
        "--container-image=reg#a/b:1",
        f"--container-mounts={run_dir}:{run_dir},/d:/d,/s:/x:ro",
        "--container-writable",
        "--no-container-mount-home",
    ]


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
