"""What is checked before a job is sent, whatever the scheduler; Docker's requests."""

import json
from pathlib import Path
from typing import Any

import pytest

from launch.paths import with_absolute_data
from launch.request import Request
from launch.submit import check, connected
from launch.workspace import ROOT
from tests.launch.test_component import request
from trainer.recipes import load_recipe
from trainer.typed_values import apply_overrides


def _built(**changes: Any) -> Any:
    asked = request(**({"machine": None} | changes))
    with connected(asked.scheduler) as connection:
        return connection.dry_run(asked, check(connection.scheduler, asked)).request


def test_docker_containers_share_a_network_and_know_the_first() -> None:
    built = _built(
        scheduler="local_docker",
        machine="cpu-2",
        procs_per_node=2,
        image="img:1",
        run_dir=Path("/runs/demo"),
        mounts=["/srv:/runs"],
    )
    hosts = {container.kwargs["environment"]["TORCHX_RANK0_HOST"] for container in built.containers}
    assert hosts == {built.containers[0].kwargs["name"]}
    assert {container.kwargs["network"] for container in built.containers} == {"torchx"}
    assert {container.kwargs["mem_limit"] for container in built.containers} == {"6912m"}


@pytest.mark.parametrize("scheduler", ["kubernetes", "local_docker"])
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"run_dir": Path("/runs/a")}, "needs --image and --run-dir, a path inside the container"),
        ({"image": "i", "run_dir": None}, "needs --image and --run-dir, a path inside the container"),
        ({"image": "i", "run_dir": Path("runs/a")}, "--run-dir runs/a is relative"),
        ({"image": "i", "run_dir": Path("/runs/a")}, "--run-dir /runs/a lies under no --mount"),
        ({"image": "i", "run_dir": Path("/runs/a"), "mounts": ["/x:/run"]}, "lies under no --mount"),
        ({"image": "i", "run_dir": Path("/runs/a"), "mounts": ["/x:/runs:ro"]}, "lies under a read-only --mount"),
        (
            {"image": "i", "run_dir": Path("/runs/a"), "mounts": ["/x:/runs", "/y:/runs/a:ro"]},
            "lies under a read-only --mount",
        ),
    ],
)
def test_runs_that_would_end_with_their_container_are_refused(
    scheduler: str, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        _built(scheduler=scheduler, **changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scheduler": "lsf"}, "unknown scheduler 'lsf': known are local_cwd, slurm, kubernetes, local_docker"),
        ({"scheduler": "local_cwd", "machine": "cpu-2"}, "--machine has no effect with scheduler local_cwd"),
        ({"scheduler": "local_cwd", "max_retries": 2}, "--max-retries has no effect with scheduler local_cwd"),
        (
            {"scheduler": "local_cwd", "procs_per_node": 1, "options": ["a=b"]},
            "--option a=b: scheduler local_cwd has no options",
        ),
    ],
)
def test_what_has_no_effect_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _built(**changes)


def _paths(asked: Request, *, runs_here: bool = False, in_container: bool = False) -> dict[str, str]:
    config = apply_overrides(load_recipe(asked.recipe), asked.overrides)
    sent = with_absolute_data(asked, config, runs_here=runs_here, in_container=in_container)
    return dict(override.split("=", 1) for override in sent.overrides)


def test_relative_data_is_what_the_caller_meant(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("mine", "more"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path)
    mix = ["data.path=mine", 'data.mix_paths=["more", "/abs", "s3://b/c"]', "data.mix_weights=[1,1,1,1]"]
    mix += ["data.max_samples=10"]
    sent = _paths(request(overrides=mix))
    assert sent["data.path"] == str(tmp_path / "mine")
    assert json.loads(sent["data.mix_paths"]) == [str(tmp_path / "more"), "/abs", "s3://b/c"]
    # The recipe's own data travels with the code, from any folder.
    assert _paths(request()) == {}
    # A local job runs where it is submitted, and finds what the recipe has in the checkout.
    assert _paths(request(overrides=["data.path=mine"]), runs_here=True) == {"data.path": "mine"}
    assert _paths(request(), runs_here=True) == {"data.path": str(ROOT / "data" / "kuairand_sample")}


@pytest.mark.parametrize(("path", "in_container"), [("nowhere", False), ("tests", True)])
def test_relative_data_that_no_node_would_find_is_refused(
    monkeypatch: pytest.MonkeyPatch, path: str, in_container: bool
) -> None:
    monkeypatch.chdir(ROOT)
    with pytest.raises(ValueError, match=f"data.path={path} "):
        _paths(request(overrides=[f"data.path={path}"]), in_container=in_container)
