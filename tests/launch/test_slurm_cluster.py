"""Jobs on a real Slurm of two nodes: every process joins, the demo trains and resumes, and a run gets to its end.

What goes on in several allocations waits for Slurm far longer than it works: those jobs are sent first, one beside the
other, and looked at last.
"""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from torchx.specs import AppState, Role

from embeddings.hardware import NODES
from launch import attempts, component, logs, records
from launch.progress import newest_checkpoint
from launch.records import JobRecord
from launch.request import Request
from launch.schedulers import slurm_queue
from launch.schedulers.slurm import Slurm, SlurmRequest
from launch.schedulers.slurm_queue import NEVER, SlurmError
from launch.submit import check, connected
from launch.sweep import runs_of
from launch.workspace import ROOT
from tests.support.slurm import UNSHARED, Cluster, missing_programs, slurm_cluster
from tests.support.small_data import small_dataset
from tests.support.training import SMALL, losses, read_lines, train
from trainer.run_dir import RunDir

TIMEOUT_S = 300
BARE_PYTHON = Path(sys.base_prefix, "bin", "python3")
"""The interpreter that this environment was made from, without its packages."""
ENDED = (AppState.SUCCEEDED, AppState.FAILED, AppState.CANCELLED)
STEPS = 700
"""Of a counting job, a tenth of a second each: more than a minute's allocation has room for."""


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    missing = missing_programs()
    if missing or os.geteuid() != 0:
        reason = f"needs root and Slurm (missing: {missing}): python -m tests.support.slurm install"
        if os.environ.get("CI"):
            pytest.fail(reason)
        pytest.skip(reason)
    with slurm_cluster(tmp_path_factory.mktemp("slurm")) as running, pytest.MonkeyPatch.context() as patch:
        patch.setenv("SLURM_CONF", running.environment["SLURM_CONF"])
        # Jobs inherit it: with other numbers of threads, sums differ in their last bits.
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setattr(records, "FILE", running.folder / "jobs.jsonl")
        yield running


@pytest.fixture(scope="module")
def robbed(cluster: Cluster) -> JobRecord:
    """A job whose second node goes down; the first of all jobs, so that it takes no other one's node."""
    record = _count(cluster.folder / "robbed", "60", "5")
    _until_counting(record)
    node = ["scontrol", "update", "nodename=longview-n2"]
    assert slurm_queue.run([*node, "state=down", "reason=test"]).returncode == 0
    _until(lambda: "running" not in str(Slurm("test").status(_job_id(record), record)).lower(), record)
    # It may have come back by itself.
    slurm_queue.run([*node, "state=resume"])
    return record


@pytest.fixture(scope="module")
def limited(cluster: Cluster) -> JobRecord:
    """A job whose minute is not enough."""
    return _count(cluster.folder / "limited", str(STEPS), options=["time=1"])


@pytest.fixture(scope="module")
def chained(cluster: Cluster) -> JobRecord:
    """A job that may not be requeued, warned as a site does it."""
    record = _count(cluster.folder / "chained", "150", options=["no-requeue="])
    _warn(record)
    return record


@pytest.mark.parametrize("name", NODES)
def test_every_machine_type_is_accepted(cluster: Cluster, name: str, tmp_path: Path) -> None:
    machine = NODES[name]
    options = ["partition=gpu", "time=1:00:00", "comment=a 'b' \"c\" #d $e"]
    procs = machine.gpus or machine.cpus
    with connected("slurm") as connection:
        request = _request(tmp_path / "a b", procs_per_node=procs, machine=name, options=options)
        built = connection.dry_run(request, check(connection.scheduler, request)).request
    (tmp_path / "job.sh").write_text(built.script())
    sbatch = slurm_queue.run(["sbatch", "--test-only", str(tmp_path / "job.sh")])
    assert sbatch.returncode == 0, sbatch.stderr
    assert "longview-g[1-2]" in sbatch.stderr


def test_nodes_find_each_other(robbed: JobRecord, limited: JobRecord, chained: JobRecord, tmp_path: Path) -> None:
    record = _send(_request(tmp_path), ["-m", "tests.launch.tiny_job", str(tmp_path)])
    _expect(record, AppState.SUCCEEDED)
    assert [(tmp_path / f"rank-{rank}").read_text() for rank in (0, 1)] == ["2 1", "2 1"]
    listed = {job.record.handle: job.state for job in Slurm("test").jobs() if job.record}
    assert listed[record.handle] == AppState.SUCCEEDED


def test_the_demo_trains_on_two_nodes_and_goes_on_as_if_it_had_never_stopped(cluster: Cluster, tmp_path: Path) -> None:
    steps = ("max_steps=60", "data.num_epochs=2")
    record = _train(tmp_path / "run", *steps)
    _warn(record)
    _expect(record, AppState.SUCCEEDED)
    assert [attempt.ended for attempt in attempts.read(tmp_path / "run")] == ["stopped", "done"]
    lines = read_lines(tmp_path / "run" / "metrics.jsonl")
    assert {line["world_size"] for line in lines} == {2}
    assert losses(lines) == losses(train(tmp_path / "unbroken", 2, *steps))
    assert sorted(path.name for path in (tmp_path / "run" / "logs").iterdir()) == ["rank-0.log", "rank-1.log"]


def test_a_run_that_always_fails_stops_with_the_reason(cluster: Cluster, tmp_path: Path) -> None:
    record = _count(tmp_path, "30", "100", "1", "2", "always", max_retries=2, max_restarts=2)
    _expect(record, AppState.FAILED)
    ends = [(attempt.ended, attempt.progress) for attempt in attempts.read(tmp_path)]
    assert ends == [("failed", False)] * 3
    assert "3 failures in a row without a new checkpoint, --max-retries is 2" in _batch_output(record)
    fault = logs.first_failure(record, logs.last_start(record))
    assert fault is not None
    assert (fault.rank, "out of luck" in fault.words) == (1, True)


def test_a_failure_after_progress_costs_no_retry(cluster: Cluster, tmp_path: Path) -> None:
    _expect(_count(tmp_path, "10", "3", "1", "8"), AppState.SUCCEEDED)
    ends = [(attempt.ended, attempt.step) for attempt in attempts.read(tmp_path)]
    assert [ended for ended, _ in ends] == ["failed", "done"]
    # It began again after the last checkpoint before the failure; its partner had one step more or less.
    assert ends[0][1] >= 6


@pytest.mark.parametrize(
    ("option", "words"),
    [("partition=nope", "invalid partition specified: nope"), ("colour=red", "unrecognized option '--colour=red'")],
)
def test_what_slurm_refuses_is_said_in_its_words(cluster: Cluster, tmp_path: Path, option: str, words: str) -> None:
    with pytest.raises(SlurmError, match=f"sbatch failed: .*{words}"):
        _count(tmp_path, "1", options=[option])
    assert list((tmp_path / "jobs").iterdir()) == []


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"procs_per_node": 64}, "PartitionConfig"),
        ({"nodes": 3}, "PartitionNodeLimit"),
        ({"options": ["partition=gpu", "time=13:00:00"]}, "PartitionTimeLimit"),
    ],
)
def test_what_slurm_takes_but_can_never_start_is_said_by_status(
    cluster: Cluster, tmp_path: Path, changes: dict[str, object], word: str
) -> None:
    record = _count(tmp_path, "1", **changes)
    reason = f"can never start because {NEVER[word]} ({word})"
    _until(lambda: reason in str(Slurm("test").status(_job_id(record), record)), record)
    Slurm("test").cancel_job(_job_id(record), record)


@pytest.mark.parametrize(
    ("python", "words"),
    [("/nowhere/python", "/nowhere/python: No such file|not found"), (str(BARE_PYTHON), "No module named")],
)
def test_an_environment_that_is_none_is_said(cluster: Cluster, tmp_path: Path, python: str, words: str) -> None:
    record = _count(tmp_path, "1", python=python)
    _expect(record, AppState.FAILED)
    found = logs.first_failure(record, logs.span_of(record))
    assert found is not None
    assert re.search(words, found.words)


def test_a_sweep_is_one_array_of_runs_with_a_directory_each(cluster: Cluster, tmp_path: Path) -> None:
    base = _request(tmp_path / "sweep", nodes=1, overrides=["seed=0..1", "max_steps=4"])
    runs = runs_of(base)
    with (
        _running(lambda asked: ["-m", "tests.launch.counting_job", str(asked.run_dir), "4", "2", "0", "3"]),
        connected("slurm") as connection,
    ):
        sent = connection.sweep(runs, base, check(connection.scheduler, runs[0]))
    assert [Path(record.run_dir).name for record in sent] == ["seed=0", "seed=1"]
    assert len({record.handle.rpartition("_")[0] for record in sent}) == 1
    for record in sent:
        _expect(record, AppState.SUCCEEDED)
        assert _counted(Path(record.run_dir)) == [1, 2, 3, 4]
        # Each failed once and was started again by itself.
        assert [attempt.ended for attempt in attempts.read(Path(record.run_dir))] == ["failed", "done"]
        assert "the job ends with status 0" in _batch_output(record)


def test_a_cancelled_job_has_saved_and_stays_cancelled(cluster: Cluster, tmp_path: Path) -> None:
    record = _count(tmp_path, "100000")
    _until_counting(record)
    Slurm("test").cancel_job(_job_id(record), record)
    _expect(record, AppState.CANCELLED)
    step = newest_checkpoint(RunDir(tmp_path))
    assert step > 0
    assert _counted(tmp_path) == list(range(1, step + 1))
    assert [attempt.ended for attempt in attempts.read(tmp_path)] == ["taken"]


@pytest.mark.parametrize("fault", ["other disk", "no interpreter", "no data"])
def test_a_node_that_is_not_fit_is_named_and_nothing_starts(cluster: Cluster, tmp_path: Path, fault: str) -> None:
    interpreter, options = None, {}
    run_dir = cluster.folder / UNSHARED / "run" if fault == "other disk" else tmp_path
    if fault == "no interpreter":
        interpreter = "/nowhere/python"
    if fault == "no data":
        # There on the first node and on this one, as on a login node.
        (cluster.folder / UNSHARED / "data").mkdir()
        options = {"overrides": [f"data.path={cluster.folder / UNSHARED / 'data'}"]}
    record = _send(_request(run_dir, **options), ["-m", "x"], interpreter=interpreter)
    _expect(record, AppState.FAILED)
    found = logs.first_failure(record, logs.span_of(record))
    assert found is not None
    says = {"other disk": "has no folder", "no interpreter": "has no interpreter", "no data": "cannot read the data"}
    node = "longview-n1" if fault == "no interpreter" else "longview-n2"
    assert found.words.startswith(f"error: node {node}")
    assert says[fault] in found.words
    assert "Slurm has no other nodes for it" in _batch_output(record)
    assert [attempt.ended for attempt in attempts.read(run_dir)] == ["unfit"]


def test_a_node_that_goes_down_costs_no_retry(robbed: JobRecord) -> None:
    _expect(robbed, AppState.SUCCEEDED)
    assert _counted(Path(robbed.run_dir)) == list(range(1, 61))
    assert "failed" not in [attempt.ended for attempt in attempts.read(Path(robbed.run_dir))]


def test_where_requeueing_is_forbidden_a_successor_goes_on(chained: JobRecord) -> None:
    _expect(chained, AppState.SUCCEEDED)
    assert [attempt.ended for attempt in attempts.read(Path(chained.run_dir))] == ["stopped", "done"]
    successor = records.find(chained.handle)
    assert successor is not None
    assert successor.handle != chained.handle


def test_a_run_longer_than_the_time_limit_gets_to_its_end(limited: JobRecord) -> None:
    _expect(limited, AppState.SUCCEEDED)
    ends = [attempt.ended for attempt in attempts.read(Path(limited.run_dir))]
    assert ends[-1] == "done"
    assert set(ends[:-1]) == {"stopped"}
    assert _counted(Path(limited.run_dir)) == list(range(1, STEPS + 1))


def _request(run_dir: Path, **changes: object) -> Request:
    values: dict[str, object] = {"recipe": "kuairand_sample", "scheduler": "slurm", "nodes": 2, "procs_per_node": 1}
    return Request(**(values | {"run_dir": run_dir} | changes))  # type: ignore[arg-type]


def _count(run_dir: Path, *arguments: str, **changes: object) -> JobRecord:
    command = ["-m", "tests.launch.counting_job", str(run_dir), *arguments]
    return _send(_request(run_dir, **changes), command)


def _send(request: Request, command: list[str], interpreter: str | None = None) -> JobRecord:
    """Submit a job that runs `command` on every process instead of the trainer; the nodes' interpreter may be another
    than the batch script's."""
    with _running(lambda asked: command) as patch, connected("slurm") as connection:
        if interpreter is not None:
            script = SlurmRequest.script
            patch.setattr(
                SlurmRequest, "script", lambda self: script(self).replace(f" -- {sys.executable}", f" -- {interpreter}")
            )
        return connection.submit(request, check(connection.scheduler, request))


@contextmanager
def _running(command: Callable[[Request], list[str]]) -> Iterator[pytest.MonkeyPatch]:
    """Let jobs run another command than the trainer's for the duration of the block."""
    real = component._role

    def role_of(asked: Request) -> Role:
        role = real(asked)
        role.args = [*role.args[: role.args.index("--")], "--", *command(asked)]
        # The job's copy of the code leaves the tests out.
        role.env["PYTHONPATH"] = str(ROOT)
        return role

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(component, "_role", role_of)
        yield patch


def _job_id(record: JobRecord) -> str:
    """Of the job, or of the one that goes on from it."""
    newest = records.find(record.handle) or record
    return newest.handle.rpartition("/")[2]


def _expect(record: JobRecord, state: AppState) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while time.monotonic() < deadline:
        found = Slurm("test").status(_job_id(record), record)
        if found is not None and found.state in ENDED:
            if found.state == state:
                return
            if not (found.state == AppState.FAILED and _job_id(record) != record.handle.rpartition("/")[2]):
                pytest.fail(f"{record.handle} {found}\n{_batch_output(record)}\n{_node_output(record)}")
        signal.sigtimedwait([], 0.3)
    Slurm("test").cancel_job(_job_id(record), record)
    pytest.fail(f"{record.handle} has not ended after {TIMEOUT_S} s\n{_batch_output(record)}\n{_node_output(record)}")


def _until_counting(record: JobRecord) -> None:
    _until(RunDir(Path(record.run_dir)).metrics_file.exists, record)


def _until(true: Callable[[], bool], record: JobRecord) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while not true():
        assert time.monotonic() < deadline, _batch_output(record)
        signal.sigtimedwait([], 0.1)


def _warn(record: JobRecord) -> None:
    """What a site's own early warning, --signal=USR1@..., does."""
    _until_counting(record)
    assert slurm_queue.run(["scancel", "--signal=USR1", _job_id(record)]).returncode == 0


def _counted(run_dir: Path) -> list[int]:
    return sorted({line["step"] for line in read_lines(run_dir / "metrics.jsonl")})


def _train(run_dir: Path, *overrides: str) -> JobRecord:
    """Submit the demo, made small, as a user does."""
    size = ("--scheduler", "slurm", "--nodes", "2", "--procs-per-node", "1", "--option", "partition=main")
    command = [sys.executable, "-m", "launch", "submit", "kuairand_sample", *size, "--run-dir", str(run_dir)]
    command += ["--set", f"data.path={small_dataset()}", *SMALL, *overrides]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (record,) = filter(None, map(records.find_in, (run_dir / "jobs").iterdir()))
    assert done.stdout.strip() == record.handle
    return record


def _batch_output(record: JobRecord) -> str:
    path = Path(record.job_dir, "job.out")
    return path.read_text() if path.exists() else "no output"


def _node_output(record: JobRecord) -> str:
    return "".join(path.read_text()[-2000:] for path in sorted(Path(record.job_dir).glob("node-*.out")))
