"""How a job within its allocation has Slurm start it again; what real clusters show is in `test_slurm_cluster.py`."""

from collections.abc import Callable
from pathlib import Path

import pytest

from launch.allocation import Allocation
from launch.schedulers import slurm_queue
from trainer.exit_status import STOPPED


@pytest.mark.parametrize(("restarts", "submissions"), [(1, 0), (0, 1)])
def test_a_requeue_that_is_taken_without_an_answer_has_no_successor_beside_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, commands: Callable[..., None], restarts: int, submissions: int
) -> None:
    monkeypatch.setattr(slurm_queue, "ASK_AGAIN_S", 0.0)
    (tmp_path / "job.sh").touch()
    asked = (
        f"test -e {tmp_path}/asked || {{ touch {tmp_path}/asked; echo 'Socket timed out on send/recv' >&2; exit 1; }}"
    )
    refused = "echo 'Requested operation is presently disabled for job 7' >&2; exit 1"
    commands(
        scontrol=f'case "$*" in *requeue*) {asked}; {refused} ;; esac\n'
        f"echo JobId=7 JobState=COMPLETING Restarts={restarts}",
        sbatch=f"echo x >> {tmp_path}/sent; echo 8",
    )
    allocation = Allocation(
        job_id="7",
        code_dir=tmp_path,
        job_dir=tmp_path,
        run_dir=tmp_path,
        nodes=1,
        cpus_per_task=1,
        max_retries=0,
        max_restarts=0,
        data=(),
        procs_per_node=1,
        command=("true",),
    )
    assert allocation.go_on("stopped") == STOPPED
    assert len(list(tmp_path.glob("sent"))) == submissions
