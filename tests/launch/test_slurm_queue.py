"""What Slurm says of jobs, with and without accounting, and what it is told (22.05's words)."""

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from torchx.specs import AppState

from launch import component, records, submit
from launch.__main__ import main
from launch.records import JobRecord
from launch.schedulers import slurm_queue
from launch.schedulers.slurm import Slurm
from launch.schedulers.slurm_queue import SlurmError, SlurmJob, app_state, parse_scontrol
from launch.schedulers.slurm_reasons import NEVER
from launch.submit import check, check_no_other, connected, no_other_job
from launch.workspace import ROOT
from tests.launch.test_component import request
from trainer.command_line import WrongUse
from trainer.exit_status import WRONG_USE

START = 1_800_000_000.0


def _answers(monkeypatch: pytest.MonkeyPatch, **answers: Any) -> list[list[str]]:
    asked: list[list[str]] = []

    def run(
        command: list[str], patience_s: float = 0.0, environment: object = None
    ) -> "subprocess.CompletedProcess[str]":
        asked.append(command)
        code, output, errors = answers[command[0]]
        return subprocess.CompletedProcess(command, code, output, errors)

    monkeypatch.setattr(slurm_queue, "run", run)
    return asked


SCONTROL = """\
JobId=1 JobName=a UserId=root(0) JobState=RUNNING Reason=None TimeLimit=1:00 EndTime=1767225600 \
NodeList=n[1-2] Command=/a JobState=b WorkDir=/runs/a b/jobs/x StdErr=/dev/null
JobId=7 ArrayJobId=5 ArrayTaskId=1 JobName=b JobState=PENDING Reason=PartitionTimeLimit TimeLimit=UNLIMITED EndTime=1
JobId=9 JobName=other UserId=root(0) JobState=DREAMING Reason=None
garbage = = JobState
"""
SACCT = "\x1f".join(["9", "CANCELLED by 0", "n1", "0:15", "None", "/runs"]) + "\nhalf a line\n"
NO_ACCOUNTING = (1, "", "Slurm accounting storage is disabled\n")
FORGOTTEN = (1, "", "slurm_load_jobs error: Invalid job id specified\n")


def test_scontrol_is_read_whatever_others_jobs_look_like() -> None:
    first, second, third = parse_scontrol(SCONTROL)
    assert first == SlurmJob(
        job_id="1",
        slurm_state="RUNNING",
        nodes="n[1-2]",
        end_time=1767225600.0,
        work_dir="/runs/a b/jobs/x",
    )
    assert (second.job_id, second.state, second.end_time) == ("5_1", AppState.PENDING, None)
    assert third.state == AppState.UNKNOWN


@pytest.mark.parametrize(
    ("word", "state"),
    [("COMPLETING", AppState.RUNNING), ("CANCELLED by 1000", AppState.CANCELLED), ("", AppState.UNKNOWN)],
)
def test_states_that_torchx_does_not_know(word: str, state: AppState) -> None:
    assert app_state(word) == state


def test_what_scontrol_has_forgotten_sacct_knows(monkeypatch: pytest.MonkeyPatch) -> None:
    _answers(monkeypatch, scontrol=FORGOTTEN, sacct=(0, SACCT, ""))
    found = Slurm("test").status("9", None)
    assert found is not None
    assert (found.state, found.reason) == (AppState.CANCELLED, "CANCELLED by 0, exit code 0:15")


def test_a_job_whose_nodes_do_not_have_its_folder_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    # Seen on 22.05: the run directory is the login node's own, and nothing is written anywhere.
    told = "JobId=7 JobName=x JobState=FAILED Reason=JobLaunchFailure ExitCode=0:53 WorkDir=/tmp/r"
    _answers(monkeypatch, scontrol=(0, told, ""))
    found = Slurm("test").status("7", None)
    assert found is not None
    assert found.reason.endswith("node cannot write in /tmp/r: keep --run-dir on a file system that all nodes share")


def test_a_running_job_names_its_nodes_that_have_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    _answers(monkeypatch, scontrol=(0, SCONTROL, ""), sinfo=(0, "n1 allocated\nn2 down*\n", ""))
    found = Slurm("test").status("1", None)
    assert found is not None
    assert (found.state, found.reason) == (AppState.RUNNING, "node n2 is down*")


def test_a_job_that_can_never_start_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    _answers(monkeypatch, scontrol=(0, SCONTROL, ""))
    found = Slurm("test").status("5_1", None)
    assert found is not None
    assert found.reason == f"can never start because {NEVER['PartitionTimeLimit']} (PartitionTimeLimit)"


def _record(folder: Path) -> JobRecord:
    return JobRecord(handle="slurm://longview/7", recipe="r", run_dir="/r", job_dir=str(folder), pid=1, time=0.0)


@pytest.mark.parametrize(("status", "state"), [("0", AppState.SUCCEEDED), ("1: why", AppState.FAILED)])
def test_a_job_that_all_have_forgotten_is_read_from_its_output(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, status: str, state: AppState
) -> None:
    _answers(monkeypatch, sacct=NO_ACCOUNTING, scontrol=FORGOTTEN)
    assert Slurm("test").status("7", None) is None
    (tmp_path / "job.out").write_text(f"the job ends with status 3: requeued\nthe job ends with status {status}\n")
    found = Slurm("test").status("7", _record(tmp_path))
    assert found is not None
    assert (found.state, found.reason) == (state, status.partition(": ")[2])


@pytest.mark.parametrize(
    ("told", "address"), [("NodeName=n1 NodeAddr=10.0.0.7 NodeHostName=host Port=1", "10.0.0.7"), ("", "n1")]
)
def test_a_node_is_found_where_slurm_finds_it(commands: Callable[..., None], told: str, address: str) -> None:
    commands(scontrol=f"echo '{told}'")
    assert slurm_queue.node_address("n1") == address


@pytest.mark.parametrize(
    ("seconds", "left"), [(-9, "0:00:00"), (3661.5, "1:01:01"), (2 * 86400 + 60.5, "2 days 0:01:00")]
)
def test_the_time_left_is_told(monkeypatch: pytest.MonkeyPatch, seconds: float, left: str) -> None:
    _answers(monkeypatch, scontrol=(0, f"JobId=1 JobState=RUNNING TimeLimit=1 EndTime={int(START + seconds)}", ""))
    monkeypatch.setattr(time, "time", lambda: START)
    found = Slurm("test").status("1", None)
    assert found is not None
    assert found.time_left == left


def test_another_job_of_the_same_number_is_not_ours(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    folder = tmp_path / "20261129-120000-ab12"
    for work_dir, found in ((folder, True), (tmp_path / "20261128-120000-cd34", False)):
        _answers(monkeypatch, scontrol=(0, f"JobId=7 JobName=x JobState=RUNNING WorkDir={work_dir}", ""))
        assert (Slurm("test").status("7", _record(folder)) is not None) == found
    # Which is still the other one's, and stays.
    with pytest.raises(ValueError, match="slurm no longer knows job 7"):
        Slurm("test").cancel_job("7", _record(folder))


def test_list_shows_ours_with_recipe_and_run_only(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    records.save_in(tmp_path, _record(tmp_path))
    ours = f"JobId=7 JobName=x JobState=RUNNING WorkDir={tmp_path} StdErr=/e\n"
    _answers(monkeypatch, sacct=NO_ACCOUNTING, scontrol=(0, SCONTROL + ours, ""))
    (job,) = Slurm("test").jobs()
    assert (job.app_id, job.state, job.record) == ("7", AppState.RUNNING, _record(tmp_path))


def test_a_controller_that_does_not_answer_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    _answers(monkeypatch, scontrol=(1, "", "Unable to contact slurm controller\n"))
    with pytest.raises(SlurmError, match="scontrol failed: Unable to contact slurm controller"):
        Slurm("test").status("1", None)


def test_a_controller_that_is_away_for_a_while_is_waited_for_by_a_job_only(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, commands: Callable[..., None]
) -> None:
    # Answers the third time it is asked.
    calls = f"echo x >> {tmp_path}/calls; test $(wc -l < {tmp_path}/calls) -gt 2"
    error = "slurm_load_jobs error: Unable to contact slurm controller (connect failure)"
    commands(scontrol=f"{calls} || {{ echo '{error}' >&2; exit 1; }}; echo JobId=7 JobState=RUNNING Reason=None")
    monkeypatch.setattr(slurm_queue, "ASK_AGAIN_S", 0.0)
    with pytest.raises(SlurmError, match="Unable to contact slurm controller"):
        slurm_queue.find_job("7")
    found = slurm_queue.find_job("7", 60.0)
    assert found is not None
    assert (found.slurm_state, (tmp_path / "calls").read_text()) == ("RUNNING", "x\n" * 3)


def test_what_is_no_jobs_number_is_no_job(tmp_path: Path, commands: Callable[..., None]) -> None:
    commands(sbatch="echo 'Usage: sbatch [OPTIONS(0)...] script'")
    with connected("slurm") as connection:
        asked = request(run_dir=tmp_path / "run", options=["help="])
        with pytest.raises(SlurmError, match="sbatch gave no number of a job but said 'Usage: sbatch "):
            connection.submit(asked, check(connection.scheduler, asked))


def test_nodes_are_found_beside_what_a_site_says(commands: Callable[..., None]) -> None:
    greets = "echo '*** Welcome to west: maintenance=Tuesday NodeAddr=help@site ***'"
    address = "echo NodeName=n1 NodeAddr=10.0.0.7"
    commands(
        scontrol=f"{greets}; case $* in *hostnames*) printf 'n1\\nn2.site\\n' ;; *) {address} ;; esac",
        sinfo=f"{greets}; printf 'n1 allocated\\nn2 down*\\n'",
    )
    assert slurm_queue.node_names("n[1-2]") == ["n1", "n2.site"]
    assert slurm_queue.node_address("n1") == "10.0.0.7"
    assert slurm_queue.lost_nodes("n[1-2]") == {"n2": "down*"}


@pytest.mark.parametrize("number", ["17", "17;", "17\n"])
def test_a_jobs_number_is_found_beside_what_a_site_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, commands: Callable[..., None], number: str
) -> None:
    monkeypatch.setattr(records, "FILE", tmp_path / "jobs.jsonl")
    greeting = "printf '%s\\n' 'Welcome to 1 of 2 clusters' '--> verifying 3 limits...OK' '{}' 'charged: 5 h'"
    commands(sbatch=greeting.format(number))
    with connected("slurm") as connection:
        asked = request(run_dir=tmp_path / "run")
        assert connection.submit(asked, check(connection.scheduler, asked)).handle.endswith("/17")


@pytest.mark.parametrize(("taken", "calls"), [(True, 1), (False, 2)])
def test_a_job_that_is_taken_without_an_answer_is_not_sent_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, commands: Callable[..., None], taken: bool, calls: int
) -> None:
    monkeypatch.setattr(records, "FILE", tmp_path / "jobs.jsonl")
    monkeypatch.setattr(slurm_queue, "ASK_AGAIN_S", 0.0)
    error = "sbatch: error: Batch job submission failed: Socket timed out on send/recv operation"
    first = f"echo x >> {tmp_path}/calls; test $(wc -l < {tmp_path}/calls) -gt 1"
    commands(
        sbatch=f"{first} || {{ echo '{error}' >&2; exit 1; }}; echo 17",
        scontrol=f'echo "JobId=17 JobState=PENDING WorkDir=$(dirname {tmp_path}/run/jobs/*/job.sh)" | grep WorkDir='
        + ("/" if taken else "nowhere || true"),
    )
    with connected("slurm") as connection:
        asked = request(run_dir=tmp_path / "run")
        record = connection.submit(asked, check(connection.scheduler, asked))
    assert record.handle == "slurm://longview/17"
    assert (tmp_path / "calls").read_text() == "x\n" * calls


SUBMIT = """
import sys
from pathlib import Path
from launch import records
from launch.__main__ import main
records.FILE = Path(sys.argv[1])
sys.exit(main(sys.argv[2:]))
"""


def test_an_interrupt_while_a_job_is_sent_loses_no_job(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, commands: Callable[..., None]
) -> None:
    monkeypatch.setattr(records, "FILE", tmp_path / "jobs.jsonl")
    commands(sbatch="kill -INT $PPID; echo 17")
    # A process of its own: another thread of this one, which pytest may have, would take the signal.
    size = ["--nodes", "1", "--procs-per-node", "1"]
    job = ["submit", "kuairand_sample", "--scheduler", "slurm", *size, "--run-dir", str(tmp_path / "run")]
    command = [sys.executable, "-c", SUBMIT, str(records.FILE), *job]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "slurm://longview/17\n"), done.stderr
    record = records.find("slurm://longview/17")
    assert record is not None and record.run_dir == str(tmp_path / "run")


def test_an_interrupt_while_the_code_is_copied_leaves_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(copy: Path) -> None:
        assert (copy / "launch" / "node.py").is_file()
        raise KeyboardInterrupt

    monkeypatch.setattr(submit, "share_with_older", interrupted)
    with connected("slurm") as connection:
        asked = request(run_dir=tmp_path / "run")
        with pytest.raises(KeyboardInterrupt):
            connection.submit(asked, check(connection.scheduler, asked))
    assert list((tmp_path / "run" / "jobs").iterdir()) == []


def test_a_checkout_that_cannot_be_written_still_sends_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, commands: Callable[..., None]
) -> None:
    monkeypatch.setattr(records, "FILE", Path("/proc/runs/jobs.jsonl"))
    commands(sbatch="echo 17")
    with connected("slurm") as connection:
        asked = request(run_dir=tmp_path / "run")
        record = connection.submit(asked, check(connection.scheduler, asked))
    assert records.find_in(Path(record.job_dir)) == record
    assert "/proc/runs/jobs.jsonl cannot be written (No such file or directory)" in caplog.text


@pytest.mark.parametrize(
    ("state", "options"), [("PENDING", []), ("RUNNING", []), ("RUNNING", ["dependency=singleton"]), ("FAILED", [])]
)
def test_a_run_directory_is_one_jobs_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, state: str, options: list[str]
) -> None:
    monkeypatch.setattr(records, "FILE", tmp_path / "jobs.jsonl")
    folders = [tmp_path / "jobs" / name for name in "ab"]
    for number, folder in enumerate(folders):
        records.save(replace(_record(folder), handle=f"slurm://longview/{number}", time=float(number)))
    _answers(monkeypatch, scontrol=(0, f"JobId=1 JobName=a JobState={state} Reason=None", ""))
    asked = request(run_dir=tmp_path, options=options)
    if state == "FAILED" or options:
        check_no_other(Slurm("test"), asked)
    else:
        with pytest.raises(
            ValueError, match=f"job slurm://longview/1 .* is {state}: cancel it, .*dependency=afterany:1"
        ):
            check_no_other(Slurm("test"), asked)


def test_a_job_is_named_by_its_handle_a_successors_or_its_run_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(records, "FILE", tmp_path / "jobs.jsonl")
    assert main(["status", str(tmp_path)]) == WRONG_USE
    for number, name in enumerate("ab"):
        job = _record(tmp_path / "jobs" / name)
        records.save(replace(job, handle=f"slurm://longview/{number}", run_dir=str(tmp_path), time=float(number)))
    folder = tmp_path / "jobs" / "b"
    records.save_in(folder, replace(records.of_run(tmp_path)[-1], handle="slurm://longview/9"))
    asked = _answers(monkeypatch, scontrol=(0, "JobId=9 JobName=a JobState=RUNNING Reason=None", ""))
    for named in (str(tmp_path), "slurm://longview/1", "slurm://longview/9"):
        asked.clear()
        assert main(["status", named]) == 0
        assert asked == [["scontrol", "--oneliner", "show", "job", "9"]]
    # Of another checkout.
    records.FILE.unlink()
    assert main(["status", str(tmp_path)]) == 0
    assert "no job was submitted in" in capsys.readouterr().err


def test_of_two_submissions_at_once_one_is_sent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, commands: Callable[..., None]
) -> None:
    monkeypatch.setattr(records, "FILE", tmp_path / "jobs.jsonl")
    commands(sbatch="sleep 0.3; echo 17", scontrol="echo JobId=17 JobState=PENDING Reason=None")
    asked = request(run_dir=tmp_path / "run")

    def send(_: int) -> str:
        with connected("slurm") as connection:
            try:
                with no_other_job(connection.scheduler, [asked], asked.absolute_run_dir):
                    return connection.submit(asked, check(connection.scheduler, asked)).handle
            except WrongUse as error:
                return str(error)

    with ThreadPoolExecutor(2) as threads:
        told = sorted(threads.map(send, range(2)))
    assert [words.partition(" in ")[0] for words in told] == ["job slurm://longview/17", "slurm://longview/17"]


@pytest.mark.parametrize(("kept", "busy"), [("moved", True), ("copied", False), ("linked", True)])
def test_a_copy_of_a_run_directory_has_none_of_its_jobs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kept: str, busy: bool
) -> None:
    monkeypatch.setattr(records, "FILE", tmp_path / "jobs.jsonl")
    first, second = tmp_path / "first", tmp_path / "second"
    records.save(replace(_record(first / "jobs" / "a"), run_dir=str(first)))
    {"moved": shutil.move, "copied": shutil.copytree, "linked": os.symlink}[kept](first, second)
    _answers(monkeypatch, scontrol=(0, "JobId=7 JobName=a JobState=RUNNING Reason=None", ""))
    with pytest.raises(ValueError, match="is RUNNING: cancel it") if busy else nullcontext():
        check_no_other(Slurm("test"), request(run_dir=second))


def test_variables_of_a_shell_do_not_take_the_place_of_what_the_script_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, commands: Callable[..., None], caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(records, "FILE", tmp_path / "jobs.jsonl")
    overriding = {"SBATCH_PARTITION": "debug", "SBATCH_TIMELIMIT": "1", "SBATCH_OUTPUT": "x", "SBATCH_NO_REQUEUE": ""}
    overriding |= {"SBATCH_ERROR": "y", "SBATCH_ARRAY_INX": "0-9", "SBATCH_WAIT": "1", "SBATCH_OPEN_MODE": "truncate"}
    kept = {"SBATCH_ACCOUNT": "abc", "SBATCH_QOS": "high"}
    # Meant for a person's own srun; with SLURM_LABELIO=1 no node's answer could be read.
    of_srun = {"SLURM_TIME_FORMAT": "relative", "SLURM_LABELIO": "1", "SLURM_TIMELIMIT": "1"}
    for name, value in {**overriding, **kept, **of_srun}.items():
        monkeypatch.setenv(name, value)
    said = "sbatch: job moved to partition gpu2"
    commands(sbatch=f"env > {tmp_path}/seen; echo '{said}' >&2; echo 17", scontrol=f"env > {tmp_path}/asked; exit 1")
    with connected("slurm") as connection:
        asked = request(run_dir=tmp_path / "run", options=["partition=gpu", "time=12:00:00"])
        connection.submit(asked, check(connection.scheduler, asked))
    seen = dict(line.partition("=")[::2] for line in (tmp_path / "seen").read_text().splitlines())
    given = {name: value for name, value in seen.items() if name.startswith(("SBATCH_", "SLURM_"))}
    assert given == kept | {"SLURM_TIME_FORMAT": "%s"}
    assert said in caplog.messages
    with pytest.raises(SlurmError):
        slurm_queue.find_job("17")
    # Otherwise the end of an allocation could not be read, and the run not be told of it.
    assert "SLURM_TIME_FORMAT=%s" in (tmp_path / "asked").read_text().splitlines()


def test_a_job_that_slurm_refuses_leaves_no_copy_of_the_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, commands: Callable[..., None]
) -> None:
    commands(sbatch=f"test -f {tmp_path}/run/jobs/*/launch/node.py && echo no partition gpu >&2\nexit 1")
    with connected("slurm") as connection:
        asked = request(run_dir=tmp_path / "run")
        options = check(connection.scheduler, asked)
        with pytest.raises(SlurmError, match="sbatch failed: no partition gpu"):
            connection.submit(asked, options)
    assert list((tmp_path / "run" / "jobs").iterdir()) == []
    assert component.job(asked).roles[0].num_replicas == 2
