"""The job description, as data: no scheduler is needed to check it."""

import inspect
import subprocess
import sys
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from torchx.specs import AppDef, BindMount, Role, VolumeMount

from embeddings.hardware import NODES
from launch.component import job, train
from launch.request import Request, takes_request
from launch.workspace import ROOT
from trainer.exit_status import WRONG_USE


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
    app = job(request(**changes))
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


def test_torchx_takes_the_arguments_of_submit(
    tmp_path: Path, commands: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    command = [sys.executable, "-m", "torchx.cli.main", "run", "-s", "local_cwd", f"{ROOT}/launch/component.py:train"]
    # An interpreter that writes down what it is given: TorchX does not always show the last lines of a short job.
    commands(python=f'echo "$@" >> "{tmp_path}/given"')
    command += ["kuairand_sample", "--nodes", "2", "--procs-per-node", "1", "--python", str(tmp_path / "bin/python")]
    done = subprocess.run(
        [*command, "--run-dir", "Mary's $x", "--set", "max_steps=2"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    for node in range(2):
        place = f"-m launch.node --nodes 2 --procs-per-node 1 --node-rank {node} "
        trains = f" -- -m trainer train kuairand_sample --run-dir {tmp_path}/Mary's $x --set max_steps=2"
        assert any(place in line and trains in line for line in (tmp_path / "given").read_text().splitlines()), node
    assert "a job of `launch submit` continues by itself" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["kuairand_sampel"], "unknown recipe 'kuairand_sampel'"),
        (["kuairand_sample", "--option", "time=3"], "--option has no effect with scheduler torchx run: leave it out"),
        (["kuairand_sample", "--set", "data.path=nowhere"], "data.path=nowhere names nothing"),
    ],
)
def test_what_torchx_cannot_send_is_one_line(
    capfd: pytest.CaptureFixture[str], arguments: list[str], words: str
) -> None:
    with pytest.raises(SystemExit) as ended:
        train(*arguments, "--nodes", "2", "--procs-per-node", "8")
    assert ended.value.code == WRONG_USE
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith(f"error: {words}")
