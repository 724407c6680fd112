"""Requests as each scheduler would receive them (TorchX's dry run), and requests that are refused."""

from pathlib import Path
from typing import Any

import pytest

from launch.slurm import SlurmError
from launch.submit import Request, check_options, dry_run, runner, submit


def _request(scheduler: str, **changes: Any) -> Request:
    arguments: dict[str, Any] = {
        "recipe": "kuairand_sample",
        "nodes": 2,
        "procs_per_node": 8,
        "run_dir": Path("/runs/demo"),
    }
    return Request(scheduler=scheduler, **(arguments | changes))


def _built(request: Request) -> Any:
    with runner(request.scheduler) as torchx:
        check_options(torchx, request)
        return dry_run(torchx, request, request.app()).request


def test_local_processes_inherit_nothing_from_a_shell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    request = _built(_request("local_cwd", nodes=1, procs_per_node=2, run_dir=None))
    (replica,) = request.role_params["trainer"]
    assert replica.args[1:3] == ["-m", "launch.node"]
    assert replica.args[-2:] == ["--run-dir", str(tmp_path / "runs" / "kuairand_sample")]
    assert list(tmp_path.iterdir()) == []


def test_slurm_job_is_heterogeneous_and_names_its_resources() -> None:
    request = _built(_request("slurm", machine="h200-8", max_retries=3, options=("partition=gpu", "time=1:00:00")))
    assert request.job_dir == "/runs/demo/jobs/DRY-RUN"
    script = request.materialize()
    header = [line for line in script.splitlines() if line.startswith("#SBATCH")]
    assert header[1] == "#SBATCH hetjob"
    for node, line in enumerate(header[::2]):
        for option in (
            f"--job-name=trainer-{node}",
            "--requeue",
            "--partition=gpu",
            "--time=1:00:00",
            "--cpus-per-task=184",
            "--gpus-per-task=8",
            "--mem=1900000",
        ):
            assert option in line.split()
    # srun takes the cores a task from its own option only (Slurm 22.05 and later).
    assert script.count("--cpus-per-task=184") == 4
    assert script.count("--first-node-variable SLURM_JOB_NODELIST_HET_GROUP_0") == 2
    assert "export TORCHX_MAX_RETRIES=3" in script
    assert "--run-dir /runs/demo" in script


def test_slurm_without_a_machine_asks_for_cores_only() -> None:
    header = _built(_request("slurm", nodes=1, procs_per_node=2)).materialize().split("set -evx")[0]
    assert "--cpus-per-task=2" in header
    assert "--mem" not in header
    assert "gpu" not in header


def test_slurm_quotes_what_the_user_typed() -> None:
    script = _built(_request("slurm", overrides=("name=a b$(c)",), run_dir=Path("/runs/$HOME"))).materialize()
    assert "--run-dir '/runs/$HOME' --set 'name=a b$(c)'" in script


def test_kubernetes_job_has_a_pod_a_node() -> None:
    request = _built(
        _request("kubernetes", machine="h200-8", image="img:1", options=("queue=q",), mounts=("/nfs:/nfs",))
    )
    spec = request.resource["spec"]
    assert (spec["schedulerName"], spec["queue"], len(spec["tasks"])) == ("volcano", "q", 2)
    for rank, task in enumerate(spec["tasks"]):
        (container,) = task["template"].spec.containers
        assert container.image == "img:1"
        assert container.command[:3] == ["python", "-m", "launch.node"]
        assert container.command[container.command.index("--node-rank") + 1] == str(rank)
        assert container.resources.limits == {"cpu": "184000m", "memory": "1900000M", "nvidia.com/gpu": "8"}
        assert "/nfs" in [mount.mount_path for mount in container.volume_mounts]
        variable = container.command[container.command.index("--first-node-variable") + 1]
        assert variable == ("TORCHX_RANK0_HOST" if rank == 0 else "VC_TRAINER_0_HOSTS")


def test_docker_containers_share_a_network_and_know_the_first() -> None:
    request = _built(_request("local_docker", machine="cpu-2", procs_per_node=2, image="img:1"))
    hosts = {container.kwargs["environment"]["TORCHX_RANK0_HOST"] for container in request.containers}
    assert hosts == {request.containers[0].kwargs["name"]}
    assert {container.kwargs["network"] for container in request.containers} == {"torchx"}
    assert {container.kwargs["mem_limit"] for container in request.containers} == {"7000m"}


@pytest.mark.parametrize(
    ("scheduler", "changes", "message"),
    [
        ("lsf", {}, "unknown scheduler 'lsf': known are local_cwd, slurm, kubernetes, local_docker"),
        ("kubernetes", {}, "scheduler kubernetes needs --image and --run-dir"),
        ("local_docker", {"image": "i", "run_dir": None}, "scheduler local_docker needs --image and --run-dir"),
        ("slurm", {"image": "i"}, "--image and --mount have no effect with scheduler slurm"),
        ("local_cwd", {"machine": "cpu-2"}, "--machine and --max-retries have no effect with scheduler local_cwd"),
        ("slurm", {"machine": "cpu-2"}, "--procs-per-node 8 on machine cpu-2, which has 2 cores"),
        (
            "slurm",
            {"options": ("partitions=main",)},
            "--option 'partitions=main' is not KEY=VALUE with a key of slurm: .*partition",
        ),
        ("slurm", {"options": ("job_dir=/x",)}, "--option 'job_dir=/x' is not KEY=VALUE"),
        ("kubernetes", {"image": "i"}, "kubernetes: .*queue.*--option"),
    ],
)
def test_impossible_requests_are_refused(scheduler: str, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _built(_request(scheduler, **changes))


def test_a_job_that_slurm_refuses_leaves_no_copy_of_the_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sbatch = tmp_path / "bin" / "sbatch"
    sbatch.parent.mkdir()
    sbatch.write_text(
        '#!/bin/sh\ntest -f "${0%/bin/sbatch}"/run/jobs/*/launch/node.py && echo no partition gpu >&2\nexit 1\n'
    )
    sbatch.chmod(0o755)
    monkeypatch.setenv("PATH", f"{sbatch.parent}:/usr/bin:/bin")
    request = _request("slurm", run_dir=tmp_path / "run")
    with runner("slurm") as torchx, pytest.raises(SlurmError, match="sbatch failed: no partition gpu"):
        submit(torchx, request, request.app())
    assert list((tmp_path / "run" / "jobs").iterdir()) == []
