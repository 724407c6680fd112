"""The job description, as data: no scheduler is needed to check it."""

from pathlib import PurePosixPath
from typing import Any

import pytest
from torchx.specs import AppDef, BindMount, Role

from launch.components import app_name, train
from launch.resources import MACHINES


def _train(**changes: Any) -> tuple[AppDef, Role]:
    arguments: dict[str, Any] = {
        "run_dir": PurePosixPath("/runs/demo"),
        "nodes": 2,
        "procs_per_node": 8,
        "machine": MACHINES["h200-8"],
        "python": "/venv/bin/python",
    }
    app = train("kuairand_sample", **(arguments | changes))
    (role,) = app.roles
    return app, role


def test_workers_are_a_module_with_an_argument_list() -> None:
    _, role = _train(overrides=["data.num_epochs=3", "a=b c"], plan=PurePosixPath("/plans/p.json"))
    assert role.entrypoint == "/venv/bin/python"
    split = role.args.index("--")
    node, trainer = role.args[:split], role.args[split + 1 :]
    assert node[:6] == ["-m", "launch.node", "--nodes", "2", "--procs-per-node", "8"]
    assert trainer[:6] == ["-m", "trainer", "train", "kuairand_sample", "--run-dir", "/runs/demo"]
    assert trainer[6:] == ["--plan", "/plans/p.json", "--set", "data.num_epochs=3", "--set", "a=b c"]


def test_one_replica_a_node_asks_for_the_whole_machine() -> None:
    _, role = _train(max_retries=2)
    machine = MACHINES["h200-8"]
    assert role.num_replicas == 2
    assert (role.resource.cpu, role.resource.gpu, role.resource.memMB) == (machine.cpus, 8, machine.memory_mib)
    assert role.max_retries == 2


def test_dollar_signs_of_the_user_are_not_macros() -> None:
    _, role = _train(run_dir=PurePosixPath("/runs/$HOME"))
    assert "/runs/$$HOME" in role.args


def test_names_suit_the_strictest_scheduler() -> None:
    assert app_name("KuaiRand_sample.v2") == "kuairand-sample-v2"


def test_mounts() -> None:
    _, role = _train(mounts=["/data:/mnt/data"])
    assert role.mounts == [BindMount(src_path="/data", dst_path="/mnt/data")]
    with pytest.raises(ValueError, match="--mount 'data:/x' must be SRC:DST with two absolute paths"):
        _train(mounts=["data:/x"])
