"""One of several clusters of a site (`sbatch --clusters`): a job's handle says which, and all that is asked of it goes
there.  Slurm's commands are stand-ins that answer for the cluster that they are asked for."""

from collections.abc import Callable
from pathlib import Path

import pytest
from torchx.specs import AppState

from launch import records
from launch.schedulers import slurm_queue
from launch.schedulers.slurm import Slurm
from launch.submit import check, connected
from tests.launch.test_component import request

ELSEWHERE = 'test "$SLURM_CLUSTERS" = west || { echo "slurm_load_jobs error: Invalid job id specified" >&2; exit 1; }'


@pytest.fixture
def west(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, commands: Callable[..., None]) -> Path:
    """Number 17 of cluster west runs, here there is none; the file that notes what was cancelled."""
    monkeypatch.setattr(records, "FILE", tmp_path / "jobs.jsonl")
    commands(
        sbatch="echo '17;west'",
        scontrol=f"{ELSEWHERE}\necho JobId=17 JobState=RUNNING Reason=None NodeList=w1",
        sacct="exit 1",
        scancel=f"{ELSEWHERE}\necho $1 >> {tmp_path}/cancelled",
    )
    return tmp_path / "cancelled"


def test_a_jobs_handle_leads_to_its_cluster(tmp_path: Path, west: Path) -> None:
    with connected("slurm") as connection:
        asked = request(run_dir=tmp_path / "run", options=["clusters=west"])
        record = connection.submit(asked, check(connection.scheduler, asked))
    assert record.handle == "slurm://longview/west:17"
    found = Slurm("test").status("west:17", None)
    assert found is not None and (found.state, found.nodes) == (AppState.RUNNING, "w1")
    assert Slurm("test").status("17", None) is None
    Slurm("test").cancel_job("west:17", None)
    assert west.read_text() == "17\n"


def test_a_job_that_another_cluster_takes_without_an_answer_is_not_sent_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, west: Path, commands: Callable[..., None]
) -> None:
    monkeypatch.setattr(slurm_queue, "ASK_AGAIN_S", 0.0)
    commands(sbatch=f"echo x >> {tmp_path}/sent; echo 'Socket timed out on send/recv operation' >&2; exit 1")
    script = tmp_path / "job.sh"
    script.write_text("#!/bin/bash\n#SBATCH --clusters=west\n")
    assert slurm_queue.submit(["sbatch", str(script)], lambda job: job.job_id == "17") == "west:17"
    assert (tmp_path / "sent").read_text() == "x\n"


def test_a_job_that_another_cluster_of_a_federation_runs_is_told_from_there(commands: Callable[..., None]) -> None:
    here, there = "JobId=67108870 JobState=REVOKED", "JobId=67108870 JobState=RUNNING NodeList=e1"
    commands(scontrol=f'case "$*" in *federation*) echo "{here}"; echo "{there}" ;; *) echo "{here}" ;; esac')
    found = Slurm("test").status("67108870", None)
    assert found is not None and (found.state, found.nodes) == (AppState.RUNNING, "e1")


@pytest.mark.parametrize(("words", "member"), [("5_[1-3]", "5"), ("5_1", "5_1"), ("5", "5")])
def test_accounting_calls_members_as_the_controller_does(words: str, member: str) -> None:
    (job,) = slurm_queue.parse_sacct("\x1f".join([words, "PENDING", "None assigned", "0:0", "None", "/runs"]))
    assert job.job_id == member
