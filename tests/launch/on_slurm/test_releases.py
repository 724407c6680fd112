"""What every release of Slurm must take from us and give: Debian 12's 22.05 and Debian 13's 24.11, both real."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from torchx.specs import AppState

from embeddings.hardware import NODES
from launch import attempts
from launch.schedulers import slurm_queue
from launch.schedulers.slurm import Slurm
from launch.submit import check, connected
from tests.launch.on_slurm.conftest import known
from tests.support import debian13
from tests.support.slurm import Cluster, slurm_cluster
from tests.support.slurm_jobs import batch_output, count, counted, expect, job_id, request, send, until, warn

AGAIN_S = 75
"""From a stop to the next start of a requeued job."""


@pytest.fixture(scope="module", params=["22.05", "24.11"])
def release(
    request: pytest.FixtureRequest, running_cluster: Cluster, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[str]:
    """A release's cluster, known to the launcher; 24.11's beside the other."""
    if request.param == "24.11":
        if debian13.reason_for_none():
            pytest.skip(debian13.reason_for_none())
        with slurm_cluster(tmp_path_factory.mktemp("slurm"), debian13.FOLDER) as newer, known(newer):
            yield request.param
    else:
        with known(running_cluster):
            yield request.param


def test_the_controller_is_of_the_release(release: str) -> None:
    assert f" {release}." in slurm_queue.run(["scontrol", "--version"]).stdout


def test_every_machine_type_is_accepted(release: str, tmp_path: Path) -> None:
    options = ["partition=gpu", "time=1:00:00", "comment=a 'b' \"c\" #d $e"]
    for name, machine in NODES.items():
        procs = machine.gpus or machine.cpus
        with connected("slurm") as connection:
            asked = request(tmp_path / "a b", procs_per_node=procs, machine=name, options=options)
            built = connection.dry_run(asked, check(connection.scheduler, asked)).request
        (tmp_path / "job.sh").write_text(built.script())
        sbatch = slurm_queue.run(["sbatch", "--test-only", str(tmp_path / "job.sh")])
        assert sbatch.returncode == 0, (name, sbatch.stderr)
        assert "longview-g[" in sbatch.stderr, name


def test_two_hundred_nodes_are_one_job(release: str, tmp_path: Path) -> None:
    record = count(tmp_path, "1", nodes=200, options=["partition=wide", "hold="])
    queue = slurm_queue.run(["squeue", "--noheader", "--partition=wide", "--format=%A %D"])
    assert queue.stdout.split() == [job_id(record), "200"]
    Slurm("test").cancel_job(job_id(record), record)


def test_nodes_find_each_other_from_a_folder_of_any_name(release: str, tmp_path: Path) -> None:
    run_dir = tmp_path / "l'\u00e9t\u00e9 \u65e5\u672c $HOME #1"
    record = send(
        request(run_dir, options=["comment=\u00fc 'a' \"b\" $HOME"]), ["-m", "tests.launch.tiny_job", str(run_dir)]
    )
    expect(record, AppState.SUCCEEDED)
    assert [(run_dir / f"rank-{rank}").read_text() for rank in (0, 1)] == ["2 1", "2 1"]
    found = slurm_queue.find_job(job_id(record))
    assert found is not None
    assert found.nodes == "longview-n[1-2]"
    listed = {job.record.handle: job.state for job in Slurm("test").jobs() if job.record}
    assert listed[record.handle] == AppState.SUCCEEDED


def test_a_warned_job_saves_and_soon_runs_again(release: str, tmp_path: Path) -> None:
    record = count(tmp_path, "40")
    warn(record)
    until(lambda: bool(attempts.read(tmp_path)), record)
    log = tmp_path / "logs" / "rank-0.log"
    until(lambda: log.read_text().count("counting: from step") == 2, record, timeout_s=AGAIN_S)
    expect(record, AppState.SUCCEEDED)
    assert [attempt.ended for attempt in attempts.read(tmp_path)] == ["stopped", "done"]
    assert "requeued" in batch_output(record)
    assert counted(tmp_path) == list(range(1, 41))
