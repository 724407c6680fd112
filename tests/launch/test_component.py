"""The job description, as data: no scheduler is needed to check it."""

import inspect
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from torchx.specs import AppDef, BindMount, Role, VolumeMount

from embeddings.hardware import NODES
from launch.component import train
from launch.request import Request, takes_request


def request(**changes: Any) -> Request:
    arguments: dict[str, Any] = {
        "recipe": "kuairand_sample",
        "scheduler": "slurm",
        "nodes": 2,
        "procs_per_node": 8,
        "machine": "h200-8",
        "run_dir": Path("/runs/demo"),
    }
    return Request(**(arguments | changes))


def _train(**changes: Any) -> tuple[AppDef, Role]:
    app = train(request(**changes))
    (role,) = app.roles
    return app, role


def test_workers_are_a_module_with_an_argument_list() -> None:
    _, role = _train(
        python="/venv/bin/python",
        overrides=["data.num_epochs=3", "data.path=b c"],
        plan=Path("/plans/p.json"),
        profile="100:5",
    )
    assert role.entrypoint == "/venv/bin/python"
    split = role.args.index("--")
    node, trainer = role.args[:split], role.args[split + 1 :]
    assert node[:6] == ["-m", "launch.node", "--nodes", "2", "--procs-per-node", "8"]
    assert trainer[:6] == ["-m", "trainer", "train", "kuairand_sample", "--run-dir", "/runs/demo"]
    assert trainer[6:10] == ["--plan", "/plans/p.json", "--profile", "100:5"]
    assert trainer[10:] == ["--set", "data.num_epochs=3", "--set", "data.path=b c"]


def test_one_replica_a_node_asks_for_the_whole_machine() -> None:
    _, role = _train(max_retries=2)
    machine = NODES["h200-8"]
    assert role.num_replicas == 2
    assert (role.resource.cpu, role.resource.gpu, role.resource.memMB) == (machine.cpus, 8, machine.host_mib)
    assert role.max_retries == 2


def test_dollar_signs_of_the_user_are_not_macros() -> None:
    _, role = _train(run_dir=Path("/runs/$HOME"), overrides=["data.path=${app_id}"])
    assert {"/runs/$$HOME", "data.path=$${app_id}"} <= set(role.args)


def test_jobs_are_named_after_recipe_and_run_for_the_strictest_scheduler() -> None:
    assert request(run_dir=Path("/runs/Sweep 3.b")).job_name == "kuairand-sample-sweep-3-b"
    assert request(run_dir=Path("/runs/kuairand_sample")).job_name == "kuairand-sample"
    assert len(request(run_dir=Path("/runs", "x" * 90)).job_name) <= 40


def test_mounts() -> None:
    _, role = _train(mounts=["/data:/mnt/data:ro", "claim:/runs"])
    assert role.mounts == [
        BindMount(src_path="/data", dst_path="/mnt/data", read_only=True),
        VolumeMount(src="claim", dst_path="/runs"),
    ]


@pytest.mark.parametrize("mount", ["data", "/data:x", "/data:/x:rw", ":/x", "a/b:/x"])
def test_malformed_mounts_are_refused(mount: str) -> None:
    with pytest.raises(ValueError, match=f"--mount '{mount}'"):
        _train(mounts=[mount])


def test_a_command_takes_every_field_of_a_request() -> None:
    seen: list[Request] = []

    @takes_request
    def command(request: Request, loud: bool = False) -> None:
        assert loud
        seen.append(request)

    parameters = inspect.signature(command).parameters
    assert list(parameters) == [*(entry.name for entry in fields(Request)), "loud"]
    values = {entry.name: getattr(request(), entry.name) for entry in fields(Request)}
    command(**values, loud=True)
    assert seen == [request()]
