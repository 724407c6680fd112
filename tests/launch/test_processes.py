"""The processes of a node: how they start, are told to stop, and fail."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from launch.node import job_status
from launch.processes import Place
from trainer.exit_status import FAILED, STOPPED, WRONG_USE

ROOT = Path(__file__).resolve().parents[2]

NODE = [sys.executable, "-m", "launch.node", "--nodes", "1", "--procs-per-node", "2", "--node-rank", "0"]
NODE += ["--first-node-variable", "FIRST", "--"]

# Hears signals as the trainer does, says that it can, and stops in good order.
OBEDIENT = """
import sys, time
from pathlib import Path
from trainer.health.stop_signal import STOP
STOP.listen()
STOP.heeded = True
Path(sys.argv[1], os.environ["RANK"]).touch()
while not STOP.requested:
    time.sleep(0.02)
sys.exit(3)
"""


def test_a_rank_that_is_asked_to_stop_alone_takes_the_others_with_it(tmp_path: Path) -> None:
    """Before ranks have met nobody else learns of it, and they would wait for it until their meeting times out."""
    done = _run(_script(tmp_path, f"if os.environ['RANK'] == '1':\n    sys.exit({STOPPED})\n{OBEDIENT}"), str(tmp_path))
    assert (done.returncode, done.stderr) == (STOPPED, "")


def _script(folder: Path, text: str) -> Path:
    path = folder / "job.py"
    path.write_text(f"import os, signal, sys, time\n{text}")
    return path


def _run(script: Path, *arguments: str) -> "subprocess.CompletedProcess[str]":
    command = [*NODE, str(script), *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)


def test_a_node_that_is_suspended_and_resumed_goes_on(tmp_path: Path) -> None:
    # As long as its wait for signals, which Python answers with what no signal is.
    suspend = "node = os.getppid()\nos.kill(node, signal.SIGSTOP)\nsignal.sigtimedwait([], 1.5)\n"
    script = _script(tmp_path, f"if os.environ['RANK'] == '1':\n    sys.exit()\n{suspend}os.kill(node, signal.SIGCONT)")
    done = _run(script)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(
    ("end", "status", "message"),
    [
        ("sys.exit(2)", WRONG_USE, "rank 1 failed: it ended with status 2 (node 0, "),
        (
            "os.kill(os.getpid(), signal.SIGKILL)",
            FAILED,
            "rank 1 failed: it was ended by SIGKILL (by its guard, or by hand) (node 0, ",
        ),
    ],
)
def test_a_failure_names_the_rank_and_ends_the_others(tmp_path: Path, end: str, status: int, message: str) -> None:
    # Rank 0 gives back the signals that were held for it, and would wait for ever.
    waits = "signal.pthread_sigmask(signal.SIG_SETMASK, [])\nsignal.pause()"
    done = _run(_script(tmp_path, f"if os.environ['RANK'] == '1':\n    {end}\n{waits}"))
    assert job_status(done.returncode) == status
    assert message in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr


def test_a_process_that_the_memory_killer_took_is_named_with_it(tmp_path: Path) -> None:
    counted = tmp_path / "vmstat"
    counted.write_text("nr_free_pages 5\noom_kill 7\n")
    script = _script(tmp_path, f"open({str(counted)!r}, 'w').write('oom_kill 8')\nos.kill(os.getpid(), signal.SIGKILL)")
    agent = "import pathlib, sys\nfrom launch import node, processes\n"
    agent += f"processes.MEMORY_EVENTS = pathlib.Path({str(counted)!r})\nsys.exit(node.main(sys.argv[1:]))"
    command = [sys.executable, "-c", agent, *NODE[3:], str(script)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert "failed: it was ended by SIGKILL as memory ran out, the node's or what its job may have" in done.stderr


# The agent, which loses its patience sooner.
IMPATIENT = """
import sys
from trainer.health import stopped
stopped.LOOK_S, stopped.LOOKS = 0.05, 3
from launch.node import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.parametrize("procs", [1, 2])
def test_a_process_that_a_signal_has_stopped_is_named_and_ends_the_job(tmp_path: Path, procs: int) -> None:
    script = _script(tmp_path, f"if os.environ['RANK'] == '{procs - 1}':\n    os.kill(os.getpid(), signal.SIGSTOP)\n")
    script.write_text(f"{script.read_text()}signal.pthread_sigmask(signal.SIG_SETMASK, [])\nsignal.pause()")
    node = ["--nodes", "1", "--procs-per-node", str(procs), "--node-rank", "0", "--first-node-variable", "FIRST", "--"]
    command = [sys.executable, "-c", IMPATIENT, *node, str(script)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert job_status(done.returncode) == FAILED
    assert f"rank {procs - 1} failed: it has been stopped by a signal (SIGSTOP) for" in done.stderr


def test_the_job_ends_with_the_process_that_started_it(tmp_path: Path) -> None:
    script = _script(tmp_path, OBEDIENT)
    starts = f"import subprocess, sys\nsubprocess.Popen({[*NODE, str(script), str(tmp_path)]!r})\nsys.stdin.read()"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(
        [sys.executable, "-c", starts], cwd=ROOT, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        while len(list(tmp_path.iterdir())) < 3:
            assert process.poll() is None
        process.kill()
        # The ranks hold this pipe too.
        assert process.stdout is not None and process.stdout.read() == b""


def test_a_shells_lower_limit_of_open_files_is_not_the_jobs(tmp_path: Path) -> None:
    script = _script(
        tmp_path, "import resource\nsoft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)\nsys.exit(soft != hard)"
    )
    command = ["sh", "-c", 'ulimit -S -n 64 && exec "$@"', "sh", *NODE, str(script)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr


def test_processes_know_their_place(tmp_path: Path) -> None:
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "OMP_NUM_THREADS")
    environment = Place(nodes=3, procs_per_node=2, node_rank=1, first_host="a", port=7).variables(1, {"PATH": "p"})
    assert [environment[name] for name in names] == ["3", "1", "6", "2", "a", "1"]
    assert (environment["MASTER_PORT"], environment["PATH"]) == ("7", "p")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
@pytest.mark.parametrize("early", [False, True])
def test_a_stop_reaches_every_process_at_whatever_moment(tmp_path: Path, number: signal.Signals, early: bool) -> None:
    script = _script(tmp_path, OBEDIENT)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen([*NODE, str(script), str(tmp_path)], env=environment, cwd=ROOT) as process:
        # Early: the processes exist and have not come to listen; the signal is held back for them.
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
        while len(children.read_text().split()) < 2:
            assert process.poll() is None
        while not early and len(list(tmp_path.iterdir())) < 3:
            assert process.poll() is None
        process.send_signal(number)
        assert job_status(process.wait(timeout=60)) == STOPPED


def test_a_second_interrupt_ends_what_does_not_stop(tmp_path: Path) -> None:
    script = _script(tmp_path, "while True:\n    time.sleep(1)")
    with subprocess.Popen([*NODE, str(script)], cwd=ROOT, stderr=subprocess.PIPE) as process:
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
        while len(children.read_text().split()) < 2:
            assert process.poll() is None
        process.send_signal(signal.SIGINT)
        while process.poll() is None and signal.SIGINT in _pending(process.pid):
            pass
        process.send_signal(signal.SIGINT)
        assert job_status(process.wait(timeout=60)) == FAILED


def _pending(pid: int) -> set[int]:
    """Signals of the process that wait to be taken."""
    text = Path(f"/proc/{pid}/status").read_text()
    bits = int(text.split("ShdPnd:")[1].split()[0], 16)
    return {number for number in range(1, 64) if bits >> (number - 1) & 1}
