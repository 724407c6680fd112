"""Reading Slurm's words, with and without accounting.  The words are those of Slurm 22.05."""

import subprocess
from pathlib import Path

import pytest
from torchx.specs import AppState

from launch import records, slurm
from launch.slurm import AnySlurm, JobPart, SlurmError, app_state, parse_sacct, parse_scontrol, state_of

SCONTROL = """\
JobId=1 HetJobId=1 HetJobOffset=0 JobName=trainer-0 UserId=root(0) JobState=RUNNING Reason=None Command=/a JobState=b
JobId=2 HetJobId=1 HetJobOffset=1 JobName=trainer-1 UserId=root(0) JobState=PENDING Reason=None Command=/a b
JobId=9 JobName=other-0 UserId=root(0) JobState=COMPLETED Reason=None
"""
SACCT = "1+0|trainer-0|COMPLETED\n1+1|trainer-1|CANCELLED by 0\n"


def test_scontrol_is_read() -> None:
    assert parse_scontrol(SCONTROL) == [
        JobPart(job_id="1", name="trainer-0", state=AppState.RUNNING),
        JobPart(job_id="1", name="trainer-1", state=AppState.PENDING),
        JobPart(job_id="9", name="other-0", state=AppState.SUCCEEDED),
    ]


def test_sacct_is_read() -> None:
    assert parse_sacct(SACCT) == [
        JobPart(job_id="1", name="trainer-0", state=AppState.SUCCEEDED),
        JobPart(job_id="1", name="trainer-1", state=AppState.CANCELLED),
    ]


@pytest.mark.parametrize(
    ("states", "whole"),
    [
        ((AppState.RUNNING, AppState.PENDING), AppState.RUNNING),
        ((AppState.SUCCEEDED, AppState.FAILED), AppState.FAILED),
        ((AppState.SUCCEEDED, AppState.SUCCEEDED), AppState.SUCCEEDED),
        ((), AppState.UNKNOWN),
    ],
)
def test_state_of_a_job_of_several_parts(states: tuple[AppState, ...], whole: AppState) -> None:
    assert state_of([JobPart(job_id="1", name="trainer-0", state=state) for state in states]) == whole


def test_states_that_torchx_does_not_know() -> None:
    assert app_state("COMPLETING") == AppState.RUNNING
    assert app_state("CANCELLED by 1000") == AppState.CANCELLED
    with pytest.raises(SlurmError, match="slurm reports state 'DREAMING'"):
        app_state("DREAMING")


def _answers(monkeypatch: pytest.MonkeyPatch, **answers: tuple[int, str, str]) -> None:
    def run(command: list[str]) -> subprocess.CompletedProcess[str]:
        code, output, errors = answers[command[0]]
        return subprocess.CompletedProcess(command, code, output, errors)

    monkeypatch.setattr(slurm, "_run", run)


NO_ACCOUNTING = (1, "", "Slurm accounting storage is disabled\n")


def test_without_accounting_scontrol_answers_and_the_reason_is_logged(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    _answers(monkeypatch, sacct=NO_ACCOUNTING, scontrol=(0, SCONTROL, ""))
    described = AnySlurm("test").describe("1")
    assert described is not None
    assert described.state == AppState.RUNNING
    assert [replica.id for replica in described.roles_statuses[0].replicas] == [0, 1]
    assert "sacct failed (Slurm accounting storage is disabled): asking scontrol" in caplog.text


def test_with_accounting_sacct_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    _answers(monkeypatch, sacct=(0, SACCT, ""))
    described = AnySlurm("test").describe("1")
    assert described is not None
    assert described.state == AppState.CANCELLED


def test_list_has_one_line_a_job(monkeypatch: pytest.MonkeyPatch) -> None:
    _answers(monkeypatch, sacct=NO_ACCOUNTING, scontrol=(0, SCONTROL, ""))
    assert [(job.app_id, job.state) for job in AnySlurm("test").list()] == [
        ("1", AppState.RUNNING),
        ("9", AppState.SUCCEEDED),
    ]


@pytest.mark.parametrize(("code", "state"), [("0", AppState.SUCCEEDED), ("143", AppState.FAILED)])
def test_a_forgotten_job_is_read_from_its_output(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, code: str, state: AppState
) -> None:
    forgotten = (1, "", "slurm_load_jobs error: Invalid job id specified\n")
    _answers(monkeypatch, sacct=NO_ACCOUNTING, scontrol=forgotten)
    assert AnySlurm("test").describe("7") is None
    (tmp_path / "slurm-7.out").write_text(f"+ echo 'job exited with code 9'\njob exited with code {code}\n")
    monkeypatch.setattr(records, "FILE", tmp_path / "jobs.jsonl")
    records.save(
        records.JobRecord(handle="slurm://longview/7", recipe="r", run_dir="/r", job_dir=str(tmp_path), pid=1, time=0.0)
    )
    described = AnySlurm("test").describe("7")
    assert described is not None
    assert described.state == state


def test_a_controller_that_does_not_answer_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    _answers(monkeypatch, sacct=NO_ACCOUNTING, scontrol=(1, "", "Unable to contact slurm controller\n"))
    with pytest.raises(SlurmError, match="scontrol failed: Unable to contact slurm controller"):
        AnySlurm("test").describe("1")
