"""How a job within its allocation has Slurm start it again; what real clusters show: `on_slurm/test_cluster.py`."""

import itertools
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from launch import allocation, attempts, fit_nodes, records, signals
from launch.allocation import Allocation
from launch.fit_nodes import Question
from launch.schedulers import slurm_queue
from launch.steps import Steps
from trainer.exit_status import FAILED, STOPPED

MOMENTS = "StartTime=1796010994 PreemptTime="
LIMIT = "QOSMaxSubmitJobPerUserLimit"


def _allocation(folder: Path, nodes: int = 1) -> Allocation:
    job_dir = records.folder_of(folder, "20261129-120000-ab12")
    job_dir.mkdir(parents=True, exist_ok=True)
    (job_dir / "job.sh").touch()
    steps = Steps(code_dir=job_dir, nodes=nodes, cpus_per_task=1)
    return Allocation(
        job_id="7",
        job_dir=job_dir,
        run_dir=folder,
        max_retries=0,
        max_restarts=0,
        steps=steps,
        question=Question(steps=steps, interpreter="true", run_dir=folder, job_dir=job_dir, data=(), procs_per_node=1),
        command=("true",),
    )


@pytest.mark.parametrize(("restarts", "submissions"), [(1, 0), (0, 1)])
def test_a_requeue_that_is_taken_without_an_answer_has_no_successor_beside_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, commands: Callable[..., None], restarts: int, submissions: int
) -> None:
    monkeypatch.setattr(slurm_queue, "ASK_AGAIN_S", 0.0)
    asked = (
        f"test -e {tmp_path}/asked || {{ touch {tmp_path}/asked; echo 'Socket timed out on send/recv' >&2; exit 1; }}"
    )
    refused = "echo 'Requested operation is presently disabled for job 7' >&2; exit 1"
    commands(
        scontrol=f'case "$*" in *requeue*) {asked}; {refused} ;; esac\n'
        f"echo JobId=7 JobState=COMPLETING Restarts={restarts}",
        sbatch=f"echo x >> {tmp_path}/sent; echo 8",
    )
    assert _allocation(tmp_path).go_on("stopped") == STOPPED
    assert len(list(tmp_path.glob("sent"))) == submissions


@pytest.mark.parametrize(
    ("told", "reason", "goes_on"),
    [
        (f"COMPLETING Restarts=0 {MOMENTS}1796010996", "preempted", "job 8 goes on"),
        (f"COMPLETING Restarts=1 {MOMENTS}1796010996", "preempted", "requeued"),
        # Within the time that it is given to make way.
        (f"RUNNING Restarts=0 {MOMENTS}1796010996", "preempted", "requeued"),
        # That of an earlier start: someone has cancelled this one.
        (f"COMPLETING Restarts=0 {MOMENTS}1796005200", "ended from outside", ""),
        (f"COMPLETING Restarts=0 {MOMENTS}None", "ended from outside", ""),
    ],
)
def test_a_preempted_job_goes_on_and_a_cancelled_one_does_not(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    commands: Callable[..., None],
    capfd: pytest.CaptureFixture[str],
    told: str,
    reason: str,
    goes_on: str,
) -> None:
    monkeypatch.setenv("SLURM_JOB_NODELIST", "n1")
    commands(
        srun="""case "$*" in *fitness*) echo '{"node": "n1", "problems": []}' ;; *) exit 3 ;; esac""",
        scontrol=f'case "$*" in *hostnames*) echo n1 ;; *) echo JobId=7 Reason=None JobState={told} ;; esac',
        sbatch=f"echo x >> {tmp_path}/sent; echo 8",
    )
    assert _allocation(tmp_path).run() == STOPPED
    assert [(attempt.ended, attempt.reason) for attempt in attempts.read(tmp_path)] == [("taken", reason)]
    assert capfd.readouterr().out.endswith(f"the job ends with status 3: {reason}{goes_on and '; ' + goes_on}\n")
    assert (tmp_path / "sent").exists() == ("job 8" in goes_on)


def test_a_node_of_which_slurm_never_tells_is_not_waited_for_once_another_has_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, commands: Callable[..., None], capfd: pytest.CaptureFixture[str]
) -> None:
    """srun waits for ever unless it is told otherwise, also of a node where the daemon of its step was killed."""
    monkeypatch.setenv("SLURM_JOB_NODELIST", "n1")
    last = 'for word; do case "$word" in --wait=*) wait=${word#*=} ;; esac; done'
    commands(
        srun=f"""case "$*" in *fitness*) echo '{{"node": "n1", "problems": []}}'; exit ;; esac
        {last}; [ $wait -gt 120 ] && exit 3; exit 1""",
        scontrol='case "$*" in *hostnames*) echo n1 ;; *) echo JobId=7 JobState=RUNNING Restarts=0 ;; esac',
    )
    assert _allocation(tmp_path).run() == STOPPED
    assert "stopped in good order; requeued" in capfd.readouterr().out


def test_a_stop_that_comes_while_nodes_are_asked_starts_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, commands: Callable[..., None]
) -> None:
    monkeypatch.setenv("SLURM_JOB_NODELIST", "n1")
    commands(
        srun=f"""case "$*" in *fitness*) echo '{{"node": "n1", "problems": []}}' ;; *) touch {tmp_path}/run ;; esac""",
        scontrol='case "$*" in *hostnames*) echo n1 ;; *) echo JobId=7 JobState=RUNNING ;; esac',
    )
    monkeypatch.setattr(signals, "next_signal", lambda timeout_s: signal.SIGUSR1)
    assert _allocation(tmp_path).run() == STOPPED
    assert [attempt.ended for attempt in attempts.read(tmp_path)] == ["stopped"]
    assert not (tmp_path / "run").exists()


def test_a_successor_that_a_limit_forbids_is_said_in_slurms_words(
    tmp_path: Path, commands: Callable[..., None], capfd: pytest.CaptureFixture[str]
) -> None:
    refused = 'case "$*" in *requeue*) echo no >&2; exit 1 ;; esac; echo JobId=7 JobState=RUNNING'
    commands(scontrol=refused, sbatch=f"echo 'sbatch: error: {LIMIT}' >&2; exit 1")
    assert _allocation(tmp_path).go_on("stopped in good order") == FAILED
    words = f"stopped in good order; Slurm takes no other job to go on with it: sbatch failed: sbatch: error: {LIMIT}"
    assert capfd.readouterr().out == f"the job ends with status 1: {words}\n"


def test_a_successor_has_nothing_of_the_job_that_sends_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, commands: Callable[..., None]
) -> None:
    of_job = {"SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": "1", "SLURM_MEM_PER_CPU": "100", "SLURMD_NODENAME": "n1"}
    kept = {"SLURM_CONF": "/etc/slurm.conf", "NCCL_DEBUG": "WARN", "SLURM_TIME_FORMAT": "%s"}
    for name, value in {**of_job, **kept}.items():
        monkeypatch.setenv(name, value)
    refused = 'case "$*" in *requeue*) exit 1 ;; esac; echo JobId=7 JobState=RUNNING Restarts=1'
    commands(scontrol=refused, sbatch=f"env > {tmp_path}/sent; echo 8")
    assert _allocation(tmp_path).go_on("stopped in good order") == STOPPED
    sent = dict(line.partition("=")[::2] for line in (tmp_path / "sent").read_text().splitlines())
    assert {name: value for name, value in sent.items() if name.startswith(("SLURM", "NCCL"))} == kept


def test_a_run_directory_that_cannot_be_written_is_one_line(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], commands: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_JOB_NODELIST", "n1")
    commands(srun="exit 1", scontrol="echo n1")
    # As over a quota, nothing can be added to it.
    (tmp_path / attempts.FILE).mkdir()
    assert _allocation(tmp_path).run() == FAILED
    *_, error, last = capfd.readouterr().out.splitlines()
    assert error.startswith("error: ") and attempts.FILE in error and "Is a directory" in error
    assert last == f"the job ends with status 1: {error.removeprefix('error: ')}"


def test_a_node_that_has_gone_is_left_to_slurm_and_one_that_never_answers_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, commands: Callable[..., None]
) -> None:
    """It loses its power in the middle of a run, and Slurm, which takes minutes to notice, still counts it as there."""
    monkeypatch.setenv("SLURM_JOB_NODELIST", "n[1-2]")
    first = """echo '{"node": "n1", "problems": []}'"""
    second = (
        """test -e gone && echo "srun: error: n2: Communication failure" || echo '{"node": "n2", "problems": []}'"""
    )
    commands(
        srun=f"""cd {tmp_path}; case "$*" in *fitness*) {first}; {second} ;; *) touch gone; exit 1 ;; esac""",
        scontrol=f"""case "$*" in *hostnames*) printf 'n1\\nn2\\n' ;;
        *requeue*) echo requeued >> {tmp_path}/sent ;; *) echo JobId=7 JobState=RUNNING Restarts=0 ;; esac""",
        sbatch=f"echo $* >> {tmp_path}/sent; echo 8",
    )
    for _ in range(2):
        assert _allocation(tmp_path, nodes=2).run() == STOPPED
    why = "node n2 does not answer: srun: error: n2: Communication failure"
    assert [(attempt.ended, attempt.reason) for attempt in attempts.read(tmp_path)] == [("unfit", why)] * 2
    requeued, successor = (tmp_path / "sent").read_text().splitlines()
    assert requeued == "requeued"
    assert "--dependency=afternotok:7 --exclude=n2 " in successor


def test_a_first_node_on_which_no_step_ends_is_not_waited_for_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, commands: Callable[..., None]
) -> None:
    monkeypatch.setenv("SLURM_JOB_NODELIST", "n1")
    monkeypatch.setattr(fit_nodes, "PATIENCE_S", 0.2)
    commands(
        srun="exec sleep 600",
        scontrol=f"""case "$*" in *hostnames*) echo n1 ;; *requeue*) echo requeued >> {tmp_path}/sent ;;
        *) echo JobId=7 JobState=RUNNING Restarts=0 ;; esac""",
    )
    assert _allocation(tmp_path).run() == STOPPED
    (attempt,) = attempts.read(tmp_path)
    assert (attempt.ended, attempt.reason) == (
        "unfit",
        "node n1 does not answer: no step has come to its end there for 0.2 s",
    )
    assert (tmp_path / "sent").read_text() == "requeued\n"
    assert not list((tmp_path / "jobs").glob("*/preflight-*"))


def test_nodes_that_were_taken_while_they_were_asked_are_not_unfit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, commands: Callable[..., None]
) -> None:
    """Slurm starts the job again by itself: a successor without these nodes would wait for ever beside it."""
    monkeypatch.setenv("SLURM_JOB_NODELIST", "n1")
    commands(
        srun="echo 'srun: error: Unable to confirm allocation for job 7: Job is pending execution' >&2; exit 1",
        scontrol=f"""case "$*" in *hostnames*) echo n1 ;; *requeue*) echo requeued >> {tmp_path}/sent ;;
        *) echo JobId=7 JobState=PENDING Restarts=1 ;; esac""",
        sbatch=f"echo $* >> {tmp_path}/sent; echo 8",
    )
    for _ in range(2):
        assert _allocation(tmp_path).run() == STOPPED
    assert [attempt.ended for attempt in attempts.read(tmp_path)] == ["taken"] * 2
    assert not (tmp_path / "sent").exists()


def test_a_time_limit_that_is_set_while_the_run_goes_is_obeyed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, commands: Callable[..., None]
) -> None:
    monkeypatch.setenv("SLURM_JOB_NODELIST", "n1")
    monkeypatch.setattr(allocation, "LOOK_S", 0.0)
    monkeypatch.setattr(allocation, "TELL_S", 0.0)
    # The clock is set back again and again.
    seconds = itertools.count(time.time() + 1e6, -100.0)
    monkeypatch.setattr(allocation.time, "time", lambda: next(seconds))
    run = f"""trap 'exit 3' USR1; touch {tmp_path}/runs; while :; do sleep 0.1; done"""
    # Without a limit at the first look, and until the run is there.
    limit = f"""echo x >> {tmp_path}/looks
        test $(wc -l < {tmp_path}/looks) != 1 -a -e {tmp_path}/runs || TimeLimit=UNLIMITED
        echo JobId=7 JobState=RUNNING TimeLimit=${{TimeLimit:-1}} EndTime=$(date +%s)"""
    commands(
        srun=f"""case "$*" in *fitness*) echo '{{"node": "n1", "problems": []}}' ;; *) {run} ;; esac""",
        scontrol=f"""case "$*" in *hostnames*) echo n1 ;; *requeue*) ;; *) {limit} ;; esac""",
    )
    assert _allocation(tmp_path).run() == STOPPED
    assert [attempt.ended for attempt in attempts.read(tmp_path)] == ["stopped"]


@pytest.mark.parametrize("listed", ["n1", "n1,n2"])
def test_an_allocation_of_another_size_is_one_line(
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    commands: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
    listed: str,
) -> None:
    # Somebody has changed the job while it waited, or while it ran: scontrol update JobId=7 NumNodes=1.
    monkeypatch.setenv("SLURM_JOB_NODELIST", listed)
    job = "echo JobId=7 JobState=RUNNING NodeList=n1"
    commands(scontrol=f"""case "$*" in *hostnames*) echo "$3" | tr , '\\n' ;; *) {job} ;; esac""")
    assert _allocation(tmp_path, nodes=2).run() == FAILED
    words = "the allocation has 1 nodes, the job was sent for 2: submit it again with --nodes 1, and it goes on"
    assert words in capfd.readouterr().out.splitlines()[0]


@pytest.mark.parametrize(("newest", "goes_on"), [(8, True), (5, False)])
def test_after_a_kill_the_job_goes_on_as_after_any_failure(
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    commands: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
    newest: int,
    *,
    goes_on: bool,
) -> None:
    """The memory killer of the first node has taken this job's own process; --max-retries is 0."""
    attempts.note(tmp_path, "another", ended="stopped", reason="", before=0, after=5)
    monkeypatch.setattr(allocation, "newest_checkpoint", lambda run: newest)
    commands(scontrol=f'case "$*" in *requeue*) touch {tmp_path}/asked ;; *) echo JobId=7 JobState=RUNNING ;; esac')
    assert _allocation(tmp_path).run(killed=137) == (STOPPED if goes_on else FAILED)
    assert (tmp_path / "asked").exists() == goes_on
    why = "launch.allocation was killed by signal 9; requeued" if goes_on else "1 failures in a row without"
    assert why in capfd.readouterr().out


def test_a_damaged_run_directory_is_one_line(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], commands: Callable[..., None]
) -> None:
    commands(srun="exit 1")
    (tmp_path / "config.json").write_text("{")
    assert _allocation(tmp_path).run() == FAILED
    error, last = capfd.readouterr().out.splitlines()
    assert error.startswith(f"error: {tmp_path}/config.json is not valid JSON")
    assert last == f"the job ends with status 1: {error.removeprefix('error: ')}"
